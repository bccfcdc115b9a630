"""Runs commands with a time limit, and leaves nothing of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class Deadline:
    """When everything must have ended."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


@dataclass
class Done:
    status: int | None  # None: it was stopped at its limit
    lines: list[str]  # the last ones

    def last_line(self) -> str:
        return next((text for text in reversed(self.lines) if text.strip()), "").strip()


class Background:
    """A command in a process group of its own, so that all of it can be ended."""

    def __init__(
        self, command: Sequence[str], on_line: Callable[[str], None] | None = None
    ) -> None:
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None] | None) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self._lines = [*self._lines[-199:], text.rstrip("\n")]
            if on_line is not None:
                on_line(text)

    def wait(self, seconds: float) -> Done:
        """Waits for its end; ends it where that takes longer, or where waiting is interrupted."""
        try:
            status: int | None = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            self.end()
        return Done(status, self._lines)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)


def run(
    command: Sequence[str], seconds: float, on_line: Callable[[str], None] | None = None
) -> Done:
    return Background(command, on_line).wait(seconds)
