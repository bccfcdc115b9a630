"""The border of the package: a library below refuses a value, and callers get a `MoerunError`.

Arguments are checked where they are used, with messages of their own. This is the net below:
values that no check has caught, and that numpy, a parser or the native module cannot take.
"""

from __future__ import annotations

import functools
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any

from moerun.errors import (
    FileError,
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    MoerunError,
    OutOfMemoryError,
)

_PACKAGE = str(Path(__file__).parent)
_LIBRARY = sysconfig.get_path("stdlib")


def translated(error: BaseException) -> MoerunError | None:
    """Return what `error` of a library means to the caller; None: it is not about a value."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnicodeError):
        return InvalidArgumentError(f"a name or a text is not valid Unicode: {text}")
    if isinstance(error, OverflowError):
        return InvalidArgumentError(f"a number is too large: {text}")
    if isinstance(error, RecursionError):
        return FormatError("a value is nested too deeply")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"not enough memory: {text}")
    if isinstance(error, FileNotFoundError):
        return MissingFileError(text)
    if isinstance(error, OSError):
        return FileError(text)
    if isinstance(error, ValueError) and "embedded null" in text:
        return InvalidArgumentError(f"a name holds a null character: {text}")
    if isinstance(error, ValueError) and ("too big" in text or "allowed size" in text):
        return OutOfMemoryError(f"not enough memory: {text}")
    return None


def guard(names: Iterable[str], module: str) -> None:
    """Put the public functions and classes of a package behind the border.

    Args:
        names: of functions and classes; other objects are left alone.
        module: the package that has them.
    """
    namespace = vars(sys.modules[module])
    for name in names:
        value = namespace.get(name)
        if isinstance(value, FunctionType):
            _replace(value, name, namespace)
        elif inspect.isclass(value) and value.__module__.startswith("moerun"):
            _guard_methods(value)


def _replace(function: FunctionType, name: str, namespace: dict[str, Any]) -> None:
    if hasattr(function, "__wrapped__") or not function.__module__.startswith("moerun"):
        return
    guarded = _guarded(function)
    namespace[name] = guarded
    # Also where it is defined: pickle and the other modules see one and the same function.
    vars(sys.modules[function.__module__])[function.__name__] = guarded


def _guard_methods(kind: type) -> None:
    for owner in kind.__mro__:
        if not owner.__module__.startswith("moerun") or issubclass(owner, BaseException):
            continue
        for name, member in list(vars(owner).items()):
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(member, classmethod | staticmethod):
                inner = member.__func__
                if isinstance(inner, FunctionType) and not hasattr(inner, "__wrapped__"):
                    setattr(owner, name, type(member)(_guarded(inner)))
            elif isinstance(member, FunctionType) and not hasattr(member, "__wrapped__"):
                setattr(owner, name, _guarded(member))


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MoerunError:
            raise
        except (
            TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError,
            MemoryError, OSError,
        ) as error:  # fmt: skip
            files = _files_of(error.__traceback__)
            if not all(map(_is_ours, files)):
                raise  # of the caller's own code: a progress function, an iterator
            known = translated(error)
            if known is None:
                if len(files) == 1:
                    raise  # the call itself is wrong: a missing argument, an unknown one
                text = " ".join(str(error).split())[:300]
                known = InvalidArgumentError(
                    f"{function.__qualname__} cannot take one of its arguments: "
                    f"{type(error).__name__}: {text}"
                )
            raise known from error

    return call


def _files_of(traceback: TracebackType | None) -> list[str]:
    """Return the files of the frames through which an exception came, the innermost last."""
    files = []
    while traceback is not None:
        files.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return files


def _is_ours(file: str) -> bool:
    """Whether a file belongs to the package or to a library that it uses."""
    is_library = "-packages" in file or file.endswith(".pyx")
    return is_library or file.startswith((_PACKAGE, _LIBRARY, "<frozen", "<string>"))
