"""A file that a tool writes: complete under its name, or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moerun.errors import FileError


def check_target(path: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Find out before the work whether a file can be written to `path`.

    Args:
        path: the file; one that is there will be replaced.
        inputs: files that must not be.

    Raises:
        FileError: its folder is not there, it is no plain file, or it is one of `inputs`.
    """
    if not path.parent.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists():
        if not path.is_file():
            raise FileError(f"cannot write {path}: it is there and not a plain file")
        if any(os.path.exists(each) and path.samefile(each) for each in inputs):
            raise FileError(f"cannot write {path}: the command reads from it; name another file")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside `path`, then give it its name.

    Raises:
        FileError: it cannot be written.
    """
    target = Path(os.path.realpath(path))  # what a link names, not the link
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp lets nobody else read
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
