"""A lock on what one process writes; the kernel releases it when the process ends."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import warnings
from pathlib import Path

from moerun.errors import FileError, MoerunWarning

_TRIES = 100
_PID_BYTES = 20


class WriteLock:
    """Held from its creation until `release`, or until the process ends however it does.

    Args:
        file: the lock file; its folder is made if it is missing.
        target: what is written, for the message.

    Raises:
        FileError: another process holds the lock, or the file cannot be made.
    """

    def __init__(self, file: Path, target: Path) -> None:
        self._path = file
        # The process that held the lock before may remove file and folder meanwhile.
        for _ in range(_TRIES):
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise FileError(f"{target} cannot be written: {error.strerror}") from error
            # A file object closes itself with the object that owns the lock.
            self._file = os.fdopen(handle, "r+b", buffering=0)
            _lock(self._file, target)
            if self._is_current():
                with contextlib.suppress(OSError):  # a full disk: only the message lacks it
                    self._file.truncate(0)
                    self._file.write(str(os.getpid()).encode())
                return
            self._file.close()
        raise FileError(f"{target} cannot be written: its lock {file} is removed again and again")

    def release(self) -> None:
        """Remove the lock file and let others write; releasing twice is fine."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if self._is_current():
                    self._path.unlink()
            self._file.close()

    def _is_current(self) -> bool:
        """Return whether the open lock file is still the one that others find."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False


def check_unlocked(file: Path, target: Path) -> None:
    """Refuse, before the work, a target that another process writes now.

    Args:
        file: the lock file, which may be missing.
        target: what is to be written, for the message.

    Raises:
        FileError: another process holds the lock.
    """
    try:
        handle = os.open(file, os.O_RDWR | os.O_NONBLOCK)
    except OSError:  # no lock file; what is wrong otherwise, the lock itself tells
        return
    with os.fdopen(handle, "r+b", buffering=0) as opened:
        _lock(opened, target)


def _lock(file: io.FileIO, target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(_PID_BYTES) or b""
        file.close()
        number = int(holder) if holder.isdigit() else None
        who = "another process" if number is None else f"another process ({number})"
        if number == os.getpid():
            who = "this process"
        raise FileError(
            f"{target} is being written by {who}: wait until that ends, or give another name"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{target}: this file system has no locks ({error.strerror}), so a second process "
            "that writes to the same name is not refused",
            MoerunWarning,
            stacklevel=4,
        )
