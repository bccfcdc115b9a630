"""Files that a user names: only regular files are opened, and reads have a limit."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from moerun.arguments import shown
from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_READ_BYTES = 2**30  # Linux reads no more than 2 GiB at once


def user_path(name: Any, what: str = "path") -> Path:
    """Return a path from outside, with `~` replaced by the home directory.

    Args:
        name: a str or a path.
        what: how a message calls the argument.

    Raises:
        InvalidArgumentError: it is something else, empty, or no name that a file can have.
    """
    try:
        text = os.fspath(name)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{what} must be a str or a path, not {shown(name)}")
    if not text:
        raise InvalidArgumentError(f"{what} is empty; name a file or a directory")
    if "\0" in text:
        raise InvalidArgumentError(f"{what} {shown(text)} holds a null character")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{what} {shown(text)} is not valid Unicode: character {error.start} is a lone "
            "surrogate"
        ) from None
    except RuntimeError:
        raise InvalidArgumentError(
            f"{what} {text}: there is no user {text[1:].split('/')[0]!r} on this machine"
        ) from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, without waiting for a pipe's other end.

    Raises:
        InvalidArgumentError: `path` is not a str or a path.
        MissingFileError: there is no such file.
        FileError: it is a directory, a pipe, a socket or a device, or cannot be opened.
    """
    file = user_path(path)
    try:
        _check_regular(file, os.stat(file))  # first: to open a device can have effects
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            _check_regular(file, os.fstat(handle))
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except FileError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"there is no file {file}") from None
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from error


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return what is in a regular file of at most `limit` bytes.

    Raises:
        InvalidArgumentError, MissingFileError, FileError: as `open_regular`.
        FormatError: the file is larger.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            # The size of a file can lie, or change: the read has the limit, too.
            data = file.read(limit + 1) if size <= limit else b""
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    if max(size, len(data)) > limit:
        raise FormatError(
            f"{path} is too large: expected at most {limit:,} bytes, found {max(size, len(data)):,}"
        )
    return data


def read_text_bounded(path: str | os.PathLike[str], limit: int) -> str:
    """Return the text of a regular UTF-8 file of at most `limit` bytes, without its BOM.

    Raises:
        InvalidArgumentError, MissingFileError, FileError: as `open_regular`.
        FormatError: the file is larger, or not UTF-8.
    """
    return decoded(read_bounded(path, limit), str(path))


def decoded(data: bytes, where: str) -> str:
    """Return the text of UTF-8 `data` without its BOM.

    Raises:
        FormatError: it is UTF-16 or not valid UTF-8; `where` names it.
    """
    check_not_utf16(data, where)
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(codecs.BOM_UTF8) else 0)
        raise FormatError(
            f"{where} is not valid UTF-8: byte 0x{data[offset]:02x} at offset {offset}"
        ) from None


def check_not_utf16(start: bytes, where: str) -> None:
    """Raise FormatError if a file that begins with `start` is UTF-16 or UTF-32."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise FormatError(
            f"{where} is UTF-16 or UTF-32 text: its first bytes are a byte order mark. Save it as "
            "UTF-8, for example with: iconv -f UTF-16 -t UTF-8"
        )


def read_at(file: BinaryIO, offset: int, buffer: Any, where: str) -> None:
    """Fill `buffer` with the bytes of an open file from `offset` on.

    Args:
        file: opened by `open_regular`; its own position stays.
        offset: bytes from the beginning.
        buffer: a writable contiguous buffer.
        where: how a message names the file.

    Raises:
        FileError: the file cannot be read, or ends too early: it became shorter meanwhile.
    """
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file.fileno(), [view[done : done + _READ_BYTES]], offset + done)
        except OSError as error:
            raise FileError(f"{where} cannot be read: {error.strerror or error}") from error
        if count == 0:
            raise FileError(
                f"{where} became shorter while it was read: expected {len(view)} bytes from offset "
                f"{offset}, found {done}"
            )
        done += count


def _check_regular(file: Path, status: os.stat_result) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            raise FileError(f"{file} is {kind}, expected a regular file")
