"""Reads the text column of tables: CSV and TSV from a stream of bytes, parquet from its file."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moerun.errors import FormatError, MoerunError
from moerun.recording.piece import Piece, in_pieces, some_names
from moerun.recording.text_readers import VALUE_BYTES, not_utf8
from moerun.user_files import decoded

_PARQUET_ROWS = 256


def read_csv(stream: BinaryIO, text_field: str, where: str, *, delimiter: str) -> Iterator[Piece]:
    """Yield the texts of a column; the first row names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), VALUE_BYTES))
    lines = _Lines(stream, where)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    try:
        for row in rows:
            lines.end_row()
            here = f"{where}, line {rows.line_num}"
            if not row:  # an empty line
                continue
            if columns is None:
                columns = row
                if text_field not in columns:
                    raise FormatError(
                        f"{here}: the first row has no column {text_field!r}, only "
                        f"{some_names(columns)}; --text-field names another"
                    )
                column = columns.index(text_field)
                continue
            if len(row) != len(columns):
                raise FormatError(
                    f"{here}: the row has {len(row)} fields, expected {len(columns)} as in the "
                    "first row"
                )
            yield from in_pieces(row[column], here)
    except csv.Error as error:
        raise FormatError(
            f"{where}, line {rows.line_num} is not a row of a table: {error}"
        ) from None


class _Lines:
    """The lines of a stream of UTF-8; refuses a row that does not end."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self._stream = stream
        self._where = where
        self._row_bytes = 0
        self._number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(VALUE_BYTES + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._row_bytes += len(line)
        here = f"{self._where}, line {self._number}"
        if self._row_bytes > VALUE_BYTES:
            raise FormatError(f"{here}: the row is longer than {VALUE_BYTES} bytes; is it a table?")
        if self._number == 1:
            return decoded(line, here)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(here, error, 0) from None

    def end_row(self) -> None:
        """Note that a row ended with the last line."""
        self._row_bytes = 0


def read_parquet(file: Path, text_field: str) -> Iterator[Piece]:
    """Yield the texts of a column of a parquet file."""
    import polars

    try:
        table = polars.scan_parquet(file, glob=False)
        schema = table.collect_schema()
        if text_field not in schema:
            raise FormatError(
                f"{file} has no column {text_field!r}, only {some_names(schema)}; --text-field "
                "names another"
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
                    yield from in_pieces(text, f"{file}, row {row}")
    except (MoerunError, OSError):
        raise
    except polars.exceptions.PolarsError as error:
        raise FormatError(f"{file} is not a parquet file that can be read: {error}") from None
    except polars.exceptions.PanicException as error:  # not an Exception: broken files cause it
        raise FormatError(f"{file} is not a parquet file that can be read: {error}") from None
