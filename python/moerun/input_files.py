"""Reads files of unknown origin: regular files only, of bounded size, with typed errors."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from moerun.errors import FileError, FormatError, MissingFileError
from moerun.lfs_pointer import check_not_lfs_pointer


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: of the file.
        most_bytes: largest size that is read.

    Raises:
        MissingFileError: there is no such file.
        FileError: it is no regular file (a pipe, a device, a folder), or it cannot be read.
        FormatError: it is larger than `most_bytes`.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileError(f"{path} is no regular file")
            data = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist") from None
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a NUL character
        raise FileError(f"{str(path)!r} cannot be read: {error}") from None
    if len(data) > most_bytes:
        raise FormatError(f"{path} is larger than {most_bytes} bytes, the most that is read")
    return data


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a regular file, which must be UTF-8; a byte order mark is left out.

    Raises:
        FormatError: it is not UTF-8, or a git-lfs pointer; else as `read_bytes`.
    """
    data = read_bytes(path, most_bytes).removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not valid UTF-8: byte {error.start}") from None
    check_not_lfs_pointer(text, str(path))
    return text
