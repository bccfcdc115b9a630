"""Calls into the tokenizers library that may panic or not end: each gives a value or an error."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from moerun.errors import FormatError, MoerunError

_Value = TypeVar("_Value")
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it


def guarded(call: Callable[[], _Value], where: str) -> _Value:
    """Return what a call into the tokenizers library gives.

    Args:
        call: it.
        where: the file that decides what the library does.

    Raises:
        FormatError: the call fails. A panic in the library, too, ends here.
    """
    try:
        return call()
    except (MoerunError, MemoryError):
        raise
    except BaseException as error:
        # The library's panics are no Exceptions, and their class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = str(error).strip() or type(error).__name__
        raise FormatError(f"{where} is not a tokenizer that works: {text[:500]}") from None


def guarded_closely(call: Callable[[], _Value], where: str, most_seconds: float) -> _Value:
    """Return what a call gives that may take long or panic; nothing is printed.

    The call runs in a thread of its own, which is left behind when it takes too long. Meanwhile
    standard error is kept back: the library writes to it when it panics.

    Args:
        call: it.
        where: the file that decides what the library does.
        most_seconds: time that it may take.

    Raises:
        FormatError: the call fails or takes longer.
    """
    values: list[_Value] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(guarded(call, where))
        except BaseException as error:
            errors.append(error)

    with _standard_error_kept_back() as drop:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(most_seconds)
        if errors:
            drop()
    if values:
        return values[0]
    if errors:
        raise errors[0]
    raise FormatError(
        f"{where} is not a tokenizer that works: a text took longer than {most_seconds:.0f} s"
    )


@contextlib.contextmanager
def _standard_error_kept_back() -> Iterator[Callable[[], None]]:
    """Keep back what is written to standard error until the end, where it is written or dropped.

    Yields:
        A function which says that it is to be dropped.
    """
    is_dropped = False

    def drop() -> None:
        nonlocal is_dropped
        is_dropped = True

    with _lock:
        try:
            real = os.dup(2)
        except OSError:  # standard error is closed
            yield drop
            return
        try:
            kept = os.memfd_create("moerun-standard-error")
        except OSError:
            os.close(real)
            yield drop
            return
        try:
            os.dup2(kept, 2)
            yield drop
        finally:
            os.dup2(real, 2)
            if not is_dropped and (size := os.lseek(kept, 0, os.SEEK_CUR)):
                with contextlib.suppress(OSError):
                    os.write(2, os.pread(kept, size, 0))
            os.close(real)
            os.close(kept)
