"""Ctrl-C and SIGTERM: both end a tool the same way, and without a word while it starts or ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from moerun_tools.startup import IS_TOOL

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CONSEQUENCE_S = 5.0  # an error so soon after a signal is taken for its consequence

_last: tuple[int, float] | None = None  # the last signal, and when it came


def leave_at_once() -> None:
    """Let a signal end the process from here on: it has begun nothing, or has done all.

    Python raises KeyboardInterrupt in the middle of an import, where some libraries print a
    traceback and others take it for a missing module.
    """
    _handle(_leave)


def interrupt_work() -> None:
    """Let a signal raise KeyboardInterrupt from here on."""
    _handle(_interrupt)


def exit_code() -> int:
    """Return the exit code after a KeyboardInterrupt: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (signal.SIGINT if _last is None else _last[0])


def has_just_come() -> bool:
    """Return whether an error that was raised now may be what a library made of a signal."""
    return _last is not None and time.monotonic() - _last[1] < _CONSEQUENCE_S


def end_if_terminated() -> None:
    """Raise KeyboardInterrupt if SIGTERM came, for code that goes on after Ctrl-C."""
    if _last is not None and _last[0] == signal.SIGTERM:
        raise KeyboardInterrupt


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    if not IS_TOOL:
        return
    for number in _SIGNALS:
        # A signal that the parent ignores stays ignored: nohup, or a script's background job.
        if signal.getsignal(number) != signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    global _last
    _last = (number, time.monotonic())
    raise KeyboardInterrupt
