"""Keeps Ctrl-C and SIGTERM out of the moments in which a file is written."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Hold back Ctrl-C, and SIGTERM where it has a handler, until the end of the block.

    Only the main thread gets interrupts; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, Any]] = []
    # Not a signal that is ignored, or left to the system or to code that is not Python.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if pending:
        handlers[signal.Signals(pending[0][0])](*pending[0])
