"""Reads data files in bounded pieces: text, JSON lines, parquet, and token ids as .npy."""

from __future__ import annotations

import codecs
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import FileError, FormatError, MissingFileError, MoerunError

_TEXT_BYTES = 256 * 2**10  # of one piece
_LINE_BYTES = 64 * 2**20  # a longer line of a .jsonl file is taken for a mistake
_PARQUET_ROWS = 256
_NPY_TOKENS = 2**20  # rows up to this length can be sequences


@dataclass(frozen=True)
class Piece:
    """Part of a document: text, or token ids.

    Attributes:
        content: text, or token ids of shape (N).
        ends_document: whether the document ends here.
        where: how a message names the place.
        is_row: whether it is a whole row of a table of token ids, which may be a sequence as it is.
    """

    content: str | NDArray[Any]
    ends_document: bool
    where: str
    is_row: bool = False


def read_pieces(file: Path, text_field: str, vocab_size: int) -> Iterator[Piece]:
    """Yield what is in a file, in order; its name says how it is read.

    Args:
        file: *.jsonl (an object a line), *.parquet, *.npy (token ids), or any other text.
        text_field: name of the text in JSON lines and parquet files.
        vocab_size: token ids must be below.

    Raises:
        FileError: the file cannot be read.
        FormatError: the file is empty, or something in it is wrong.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    check_readable(file)
    try:
        if file.suffix == ".npy":
            pieces = _read_npy(file, vocab_size)
        elif file.suffix in readers:
            pieces = readers[file.suffix](file, text_field)
        else:
            pieces = _read_text(file)
        is_empty = True
        for piece in pieces:
            is_empty = is_empty and len(piece.content) == 0
            yield piece
    except OSError as error:
        if isinstance(error, MoerunError):
            raise
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
    if is_empty:
        raise FormatError(f"{file} is empty: it holds no text")


def check_readable(file: Path) -> None:
    """Raise FileError or FormatError unless `file` is a regular file with something in it."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{file} is not a regular file")
        with file.open("rb"):
            pass
    except FileNotFoundError:
        raise MissingFileError(f"{file} does not exist") from None
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror}") from error
    if status.st_size == 0:
        raise FormatError(f"{file} is empty")


def _read_text(file: Path) -> Iterator[Piece]:
    """Yield a text file as one document, cut at line ends."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    offset = 0
    with file.open("rb") as opened:
        while data := opened.read(_TEXT_BYTES):
            if offset == 0:
                data = data.removeprefix(codecs.BOM_UTF8)
            start = offset - len(decoder.getstate()[0])
            try:
                rest += decoder.decode(data)
            except UnicodeDecodeError as error:
                raise _not_utf8(str(file), error, start) from None
            offset += len(data)
            # A piece ends after its last line end; without one, where it happens to end.
            cut = rest.rfind("\n") + 1 or len(rest)
            yield Piece(rest[:cut], False, str(file))
            rest = rest[cut:]
    try:
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(str(file), error, offset - len(decoder.getstate()[0])) from None
    yield Piece(rest, True, str(file))


def _in_pieces(text: str, where: str) -> Iterator[Piece]:
    """Yield a document that is in memory, cut at line ends: its tokens take far more room."""
    first = 0
    while len(text) - first > _TEXT_BYTES:
        last = text.rfind("\n", first, first + _TEXT_BYTES) + 1 or first + _TEXT_BYTES
        yield Piece(text[first:last], False, where)
        first = last
    yield Piece(text[first:], True, where)


def _not_utf8(where: str, error: UnicodeDecodeError, start: int) -> FormatError:
    return FormatError(
        f"{where} is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset "
        f"{start + error.start}"
    )


def _read_jsonl(file: Path, text_field: str) -> Iterator[Piece]:
    with file.open("rb") as opened:
        number = 0
        while line := opened.readline(_LINE_BYTES + 1):
            number += 1
            where = f"{file}, line {number}"
            if len(line) > _LINE_BYTES:
                raise FormatError(f"{where} is longer than {_LINE_BYTES} bytes; is it JSON lines?")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield from _in_pieces(_text_of_line(line, text_field, where), where)


def _text_of_line(line: bytes, text_field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error, 0) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: expected an object with the field {text_field!r}, found a "
            f"{type(value).__name__}"
        )
    if text_field not in value:
        raise FormatError(
            f"{where} has no field {text_field!r}, only {_some(value)}; --text-field names another"
        )
    return _checked_text(value[text_field], text_field, where)


def _checked_text(value: Any, text_field: str, where: str) -> str:
    if not isinstance(value, str):
        raise FormatError(
            f"{where}: the field {text_field!r} must be text, not {type(value).__name__}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{where}: the field {text_field!r} is not valid Unicode: character {error.start} is "
            "a lone surrogate"
        ) from None
    return value


def _read_parquet(file: Path, text_field: str) -> Iterator[Piece]:
    import polars

    try:
        table = polars.scan_parquet(file, glob=False)
        schema = table.collect_schema()
        if text_field not in schema:
            raise FormatError(
                f"{file} has no column {text_field!r}, only {_some(schema)}; --text-field names "
                "another"
            )
        if schema[text_field] != polars.String:
            raise FormatError(
                f"{file}: the column {text_field!r} must be text, not {schema[text_field]}"
            )
        texts = table.select(text_field)
        num_rows = texts.select(polars.len()).collect().item()
        for first in range(0, num_rows, _PARQUET_ROWS):
            part = texts.slice(first, _PARQUET_ROWS).collect()[text_field]
            for row, text in enumerate(part, start=first):
                if text is not None:
                    yield from _in_pieces(text, f"{file}, row {row}")
    except (MoerunError, OSError):
        raise
    except polars.exceptions.PolarsError as error:
        raise FormatError(f"{file} is not a parquet file that can be read: {error}") from None
    except polars.exceptions.PanicException as error:  # not an Exception: broken files cause it
        raise FormatError(f"{file} is not a parquet file that can be read: {error}") from None


def _some(names: Any) -> str:
    shown = [repr(str(name)[:40]) for name in list(names)[:8]]
    return ", ".join(shown) + (", ..." if len(names) > 8 else "") if shown else "no field at all"


def _read_npy(file: Path, vocab_size: int) -> Iterator[Piece]:
    """Yield token ids: one dimension is a stream, of two each row is a document."""
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a wrong header ends in many ways
        raise FormatError(f"{file} is not a .npy file that can be read: {error}") from None
    if not isinstance(ids, np.ndarray):
        raise FormatError(f"{file} is an archive of arrays; save one array with numpy.save")
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise FormatError(
            f"{file}: expected integer token ids of one or two dimensions, found {ids.dtype} of "
            f"shape {ids.shape}"
        )
    rows = ids[None] if ids.ndim == 1 else ids
    for row, tokens in enumerate(rows):
        for first in range(0, len(tokens), _NPY_TOKENS):
            part = np.asarray(tokens[first : first + _NPY_TOKENS])
            outside = np.flatnonzero((part < 0) | (part >= vocab_size))
            if len(outside) != 0:
                at = first + int(outside[0])
                index = f"{at}" if ids.ndim == 1 else f"{row}, {at}"
                raise FormatError(
                    f"{file}: token id {part[outside[0]]} at [{index}] is outside the vocabulary: "
                    f"ids go from 0 to {vocab_size - 1}"
                )
            is_last = first + _NPY_TOKENS >= len(tokens)
            is_row = ids.ndim == 2 and len(part) == len(tokens)
            yield Piece(part.astype(np.int32), is_last, str(file), is_row)
