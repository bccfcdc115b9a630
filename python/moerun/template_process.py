"""Renders chat templates in a child process, where they have little time and memory.

A template is a program of unknown origin. Limits inside the sandbox would need a check in every
operator, filter and comparison (nested lists that share their parts make any of them endless); the
kernel limits a process. Starting one takes 70 ms, once; a conversation of 20 turns then takes
0.65 ms instead of 0.14 (on two cores of an Emerald Rapids, with other work).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import marshal
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from moerun.errors import MoerunError

MOST_SECONDS = 1  # of a CPU
MOST_BYTES = 512 << 20  # of address space
MOST_CHARACTERS = 16 << 20
# The parent waits longer than the child computes: other programs may use the CPU.
_MOST_SECONDS_TO_WAIT = 60.0
_STATUS = {b"d": "done", b"r": "refused", b"f": "failed", b"i": "invalid"}


class TemplateProcess:
    """One child process, which is started when it is needed and after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget)

    def ask(self, source: str, variables: dict[str, Any] | None) -> tuple[str, str]:
        """Return what becomes of a template.

        Args:
            source: the template.
            variables: plain values for it; None: only find out whether it is valid.

        Returns:
            A status and a text: "done" and the text that the template makes; "refused" and what
            it says of the conversation; "invalid" or "failed" and why.

        Raises:
            MoerunError: the child process cannot be started.
        """
        request = {
            "source": source,
            "variables": variables,
            "most_characters": MOST_CHARACTERS,
            "most_seconds": MOST_SECONDS,
            "most_bytes": MOST_BYTES,
        }
        try:
            data = marshal.dumps(request)
        except ValueError:
            return "failed", "what the template is given nests too deep"
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self.close()
                self._start()
            try:
                return self._exchange(data)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the child process, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        child.wait()

    def _forget(self) -> None:
        """Leave the child to the process that this one was forked from."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            child.returncode = 0
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> None:
        worker = Path(__file__).with_name("template_worker.py")
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(worker), *_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
            )
        except (OSError, ValueError, TypeError) as error:  # TypeError: no sys.executable
            raise MoerunError(
                f"the process that renders chat templates cannot be started: {error}"
            ) from error

    def _exchange(self, data: bytes) -> tuple[str, str]:
        deadline = time.monotonic() + _MOST_SECONDS_TO_WAIT
        assert self._child is not None
        pipes = _Pipes(self._child, deadline)
        try:
            pipes.write(len(data).to_bytes(8, "little") + data)
            head = pipes.read(9)
            size = int.from_bytes(head[1:], "little")
            if head[:1] not in _STATUS or size > 4 * MOST_CHARACTERS:
                raise EOFError
            text = pipes.read(size).decode("utf-8", "surrogatepass")
        except TimeoutError:
            self.close()
            return "failed", f"it takes longer than {_MOST_SECONDS_TO_WAIT:.0f} s"
        except (EOFError, OSError, UnicodeDecodeError):
            return "failed", self._reason_of_end()
        status = _STATUS[head[:1]]
        # A text may have half a character, which its encoding refuses; a message may not.
        return status, text if status == "done" else text.encode(errors="replace").decode()

    def _reason_of_end(self) -> str:
        child = self._child
        assert child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
        code = child.returncode
        self.close()
        if code == 3:
            return f"it needs more than {MOST_BYTES >> 20} MiB of memory"
        if code is not None and -code in (24, 9):  # SIGXCPU; SIGKILL at the hard limit
            return f"it computes longer than {MOST_SECONDS} s"
        return f"the process that renders it ended (code {code})"


class _Pipes:
    """Both ends of a child process, with a deadline."""

    def __init__(self, child: subprocess.Popen[bytes], deadline: float) -> None:
        assert child.stdin is not None and child.stdout is not None
        self._in, self._out = child.stdin.fileno(), child.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._deadline = deadline

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._in, selectors.EVENT_WRITE)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self._in, rest[:65536]) :]

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._out, selectors.EVENT_READ)
            with contextlib.suppress(BlockingIOError):
                piece = os.read(self._out, min(size - len(data), 1 << 20))
                if not piece:
                    raise EOFError
                data += piece
        return bytes(data)

    def _wait(self, descriptor: int, event: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            if not selector.select(max(0.0, self._deadline - time.monotonic())):
                raise TimeoutError


def _folders() -> list[str]:
    """Return the folders in which Jinja and MarkupSafe are."""
    folders: dict[str, None] = {}
    for name in ("jinja2", "markupsafe"):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise MoerunError(f"the Python package {name} is not installed")
        folders[str(Path(found.origin).parent.parent)] = None
    return list(folders)


process = TemplateProcess()
atexit.register(process.close)
