"""Reads text, JSON lines and JSON from a stream of bytes, in bounded pieces."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from moerun.errors import FormatError
from moerun.recording import piece as pieces
from moerun.recording.piece import Piece, checked_text, in_pieces, some_names

_READ_BYTES = 256 * 2**10
VALUE_BYTES = 64 * 2**20  # a longer line or JSON value is taken for a mistake
_SPACE = re.compile(r"[ \t\r\n]*")


def read_text(stream: BinaryIO, where: str) -> Iterator[Piece]:
    """Yield a text as one document, cut at line ends."""
    rest = ""
    for text in _decoded(stream, where, pieces.TEXT_BYTES):
        rest += text
        # A piece ends after its last line end; without one, where it happens to end.
        cut = rest.rfind("\n") + 1 or len(rest)
        yield Piece(rest[:cut], False, where)
        rest = rest[cut:]
    yield Piece(rest, True, where)


def read_jsonl(stream: BinaryIO, text_field: str, where: str) -> Iterator[Piece]:
    """Yield the text of each line, which is an object."""
    number = 0
    while line := stream.readline(VALUE_BYTES + 1):
        number += 1
        here = f"{where}, line {number}"
        if len(line) > VALUE_BYTES:
            raise FormatError(f"{here} is longer than {VALUE_BYTES} bytes; is it JSON lines?")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            try:
                value = json.loads(line)
            except UnicodeDecodeError as error:
                raise not_utf8(here, error, 0) from None
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{here} is not JSON: {error}") from None
            yield from in_pieces(_text_of(value, text_field, here), here)


def read_json(stream: BinaryIO, text_field: str, where: str) -> Iterator[Piece]:
    """Yield the texts of a JSON array, or of values that stand one after the other.

    A value is an object with the text field, or a text.
    """
    values = _Values(stream, where)
    is_array = values.take("[")
    is_first = True
    while not values.at_end():
        if is_array and values.take("]"):
            if not values.at_end():
                raise values.wrong("expected the end of the file after the array")
            return
        if is_array and not is_first and not values.take(","):
            raise values.wrong("expected a comma or the end of the array")
        is_first = False
        here = values.here()
        value = values.next()
        if isinstance(value, str):
            yield from in_pieces(checked_text(value, "the text", here), here)
        else:
            yield from in_pieces(_text_of(value, text_field, here), here)
    if is_array:
        raise values.wrong("the array has no end")


def not_utf8(where: str, error: UnicodeDecodeError, start: int) -> FormatError:
    """Return an error that names the first byte that is wrong; `start` is where the data begin."""
    return FormatError(
        f"{where} is not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset "
        f"{start + error.start}"
    )


def _decoded(stream: BinaryIO, where: str, size: int) -> Iterator[str]:
    """Yield what is in a stream of UTF-8, without its byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    is_open = True
    while is_open:
        data = stream.read(size)
        is_open = len(data) != 0
        start = offset - len(decoder.getstate()[0])
        offset += len(data)
        if start == 0 and data.startswith(codecs.BOM_UTF8):
            data = data[len(codecs.BOM_UTF8) :]
            start = len(codecs.BOM_UTF8)
        try:
            yield decoder.decode(data, final=not is_open)
        except UnicodeDecodeError as error:
            raise not_utf8(where, error, start) from None


def _text_of(value: Any, text_field: str, where: str) -> str:
    if not isinstance(value, dict):
        raise FormatError(
            f"{where}: expected an object with the field {text_field!r}, found a "
            f"{type(value).__name__}"
        )
    if text_field not in value:
        raise FormatError(
            f"{where} has no field {text_field!r}, only {some_names(value)}; --text-field names "
            "another"
        )
    return checked_text(value[text_field], f"the field {text_field!r}", where)


class _Values:
    """JSON values that are read from a stream one by one."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self._parts = _decoded(stream, where, _READ_BYTES)
        self._where = where
        self._text = ""
        self._at = 0
        self._line = 1
        self._is_over = False
        self._decode = json.JSONDecoder().raw_decode

    def here(self) -> str:
        """Return how a message names this place."""
        return f"{self._where}, line {self._line}"

    def wrong(self, reason: str) -> FormatError:
        """Return an error that names this place."""
        return FormatError(f"{self.here()} is not JSON: {reason}")

    def at_end(self) -> bool:
        """Pass over white space; return whether nothing follows."""
        while True:
            self._pass(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text):
                return False
            if self._is_over:
                return True
            self._read(1)

    def take(self, sign: str) -> bool:
        """Pass over white space and, if it is next, a sign; return whether it was."""
        if self.at_end() or self._text[self._at] != sign:
            return False
        self._at += 1
        return True

    def next(self) -> Any:
        """Return the next value."""
        if self.at_end():
            raise self.wrong("the file ends where a value is expected")
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                size = len(self._text) - self._at
                if self._is_over or size > VALUE_BYTES:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise self.wrong(reason[:200]) from None
                # The value may go on in what is not read yet. With twice as much each time, even
                # a long value is parsed few times.
                self._read(max(size, _READ_BYTES))
                continue
            self._pass(end)
            return value

    def _pass(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, size: int) -> None:
        """Add `size` characters or more to the text, as far as there are any."""
        found = [self._text[self._at :]]
        while size > 0 and not self._is_over:
            part = next(self._parts, None)
            self._is_over = part is None
            found.append(part or "")
            size -= len(part or "")
        self._text = "".join(found)
        self._at = 0
