"""Tells what a data file holds: by its first bytes where they say it, else by its name."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from moerun.errors import FileError, FormatError
from moerun.user_files import check_not_utf16, open_regular

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "npy"]

_HEAD_BYTES = 16 * 2**10
_GZIP = b"\x1f\x8b"
_NPY = b"\x93NUMPY"
_PARQUET = b"PAR1"
_ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".npy": "npy",
}
_OTHERS = (
    (rb"PK\x03\x04", "a zip archive"),
    (rb"%PDF-", "a PDF document"),
    (rb"\x28\xb5\x2f\xfd", "packed by zstd"),
    (rb"\xfd7zXZ\x00", "packed by xz"),
    (rb"BZh[1-9]1AY&SY", "packed by bzip2"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (rb"ARROW1\x00", "an Arrow file"),
    (rb"Obj\x01", "an Avro file"),
    (rb"SQLite format 3\x00", "an SQLite database"),
    (rb"\x89HDF\r\n", "an HDF5 file"),
    (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a", "a picture"),
    (rb"\x7fELF", "a program"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
)
_KNOWN = (
    "Data are text, JSON lines, JSON, CSV and TSV as UTF-8, also packed by gzip, parquet, and "
    "token ids as .npy"
)


@dataclass(frozen=True)
class DataStream:
    """An open data file.

    Attributes:
        kind: what it holds.
        bytes: what is in it, unpacked, from the beginning.
        file: the open file itself.
        size: bytes of the file when it was opened.
    """

    kind: Kind
    bytes: BinaryIO
    file: BinaryIO
    size: int


@contextlib.contextmanager
def open_data(path: Path, text_field: str) -> Iterator[DataStream]:
    """Open a data file and find out what it holds.

    First bytes that only one format has decide, then the ending of the name, in any case. A name
    without an ending is JSON lines if the first line is an object with the text field; any other
    file is text, also one that looks like JSON.

    Args:
        path: the file.
        text_field: name of the text in JSON lines.

    Raises:
        MissingFileError, FileError: it cannot be read, or is no regular file.
        FormatError: it is empty, or of a format that is not read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = _head(file)
        if not head:
            raise FormatError(f"{path} is empty")
        if not head.startswith(_GZIP):
            yield DataStream(_kind_of(path, path.name, head, file, text_field), file, file, size)
            return
        with explaining_gzip(path):
            head = _head(_unpacked(file))
        name = path.name[:-3] if path.suffix.lower() == ".gz" else path.name
        kind = _kind_of(path, name, head, None, text_field)
        if kind in ("npy", "parquet"):
            raise FormatError(
                f"{path} is a {kind} file packed by gzip, which is not read; unpack it with gunzip"
            )
        yield DataStream(kind, _unpacked(file), file, size)


@contextlib.contextmanager
def explaining_gzip(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged gzip file into a FormatError."""
    import zlib

    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path} is not a gzip file that can be read: {error}") from None


def _unpacked(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=file, mode="rb")))


def _head(stream: BinaryIO) -> bytes:
    try:
        head = stream.read(_HEAD_BYTES)
        stream.seek(0)
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise FileError(f"{stream.name} cannot be read: {error.strerror or error}") from error
    return head


def _kind_of(path: Path, name: str, head: bytes, file: BinaryIO | None, text_field: str) -> Kind:
    """Return the kind of the data called `name`; `file` is their file unless they are packed."""
    ending = os.path.splitext(name)[1].lower()
    if head.startswith(_NPY):
        return "npy"
    if head.startswith(_PARQUET) and (ending == ".parquet" or file is None or _ends(file)):
        return "parquet"
    for magic, what in _OTHERS:
        if re.match(magic, head):
            raise FormatError(f"{path} is {what}, which is not read. {_KNOWN}")
    if ending in (".npy", ".parquet"):
        raise FormatError(
            f"{path} is not a {ending if ending == '.npy' else 'parquet'} file that can be read: "
            f"it begins with {head[:8]!r}"
        )
    check_not_utf16(head, str(path))
    if b"\0" in head:
        raise FormatError(f"{path} is not text: the byte at offset {head.index(0)} is 0. {_KNOWN}")
    if not ending:
        return "jsonl" if _is_object_with(head, text_field) else "text"
    return _ENDINGS.get(ending, "text")


def _ends(file: BinaryIO) -> bool:
    """Return whether a file ends as parquet does."""
    try:
        file.seek(-len(_PARQUET), os.SEEK_END)
        end = file.read()
        file.seek(0)
    except OSError:
        return False
    return end == _PARQUET


def _is_object_with(head: bytes, text_field: str) -> bool:
    """Return whether the first line is a JSON object with the text field, or begins as one."""
    line, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    if not end and len(head) == _HEAD_BYTES:  # the line is longer than the head
        key = json.dumps(text_field).encode()
        return re.match(rb"\{\s*\"", line) is not None and key in line
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and text_field in value
