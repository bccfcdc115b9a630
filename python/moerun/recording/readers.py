"""Reads data files in bounded pieces, each by what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moerun.errors import FileError, FormatError, MoerunError
from moerun.recording.array_reader import read_npy
from moerun.recording.data_formats import DataStream, explaining_gzip, open_data
from moerun.recording.piece import Piece
from moerun.recording.table_readers import read_csv, read_parquet
from moerun.recording.text_readers import read_json, read_jsonl, read_text


def read_pieces(file: Path, text_field: str, vocab_size: int) -> Iterator[Piece]:
    """Yield what is in a file, in order; see `open_data` for how it is read.

    Args:
        file: text, JSON lines (an object a line), JSON, CSV, TSV, parquet, or token ids (.npy).
        text_field: name of the text in JSON, CSV, TSV and parquet files.
        vocab_size: token ids must be below.

    Raises:
        FileError: the file cannot be read, or became shorter.
        FormatError: the file is empty, or something in it is wrong.
    """
    is_empty = True
    try:
        with open_data(file, text_field) as data, explaining_gzip(file):
            for piece in _pieces(data, file, text_field, vocab_size):
                is_empty = is_empty and len(piece.content) == 0
                yield piece
    except OSError as error:
        if isinstance(error, MoerunError):
            raise
        raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
    if is_empty:
        raise FormatError(f"{file} is empty: it holds no text")


def check_readable(file: Path, text_field: str) -> None:
    """Raise FileError or FormatError unless `file` holds something of a format that is read."""
    with open_data(file, text_field):
        pass


def _pieces(data: DataStream, file: Path, text_field: str, vocab_size: int) -> Iterator[Piece]:
    where = str(file)
    if data.kind == "npy":
        yield from read_npy(data.file, where, vocab_size)
        return
    if data.kind == "parquet":
        yield from read_parquet(file, text_field)
        return
    if data.kind == "jsonl":
        yield from read_jsonl(data.bytes, text_field, where)
    elif data.kind == "json":
        yield from read_json(data.bytes, text_field, where)
    elif data.kind in ("csv", "tsv"):
        delimiter = "," if data.kind == "csv" else "\t"
        yield from read_csv(data.bytes, text_field, where, delimiter=delimiter)
    else:
        yield from read_text(data.bytes, where)
    if data.bytes is data.file and data.file.tell() < data.size:
        raise FileError(f"{where} became shorter while it was read")
