"""A file that a tool will write."""

from __future__ import annotations

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
    folder = Path(os.path.realpath(path)).parent  # what a link names
    if not folder.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from None
    if path.exists():
        if not path.is_file():
            raise FileError(f"cannot write {path}: it is there and not a plain file")
        if any(os.path.exists(each) and path.samefile(each) for each in inputs):
            raise FileError(f"cannot write {path}: the command reads from it; name another file")
