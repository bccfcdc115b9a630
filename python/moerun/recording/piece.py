"""A piece of a document, and how documents that are in memory become pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from moerun.errors import FormatError

TEXT_BYTES = 256 * 2**10  # of one piece


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


def in_pieces(text: str, where: str) -> Iterator[Piece]:
    """Yield a document that is in memory, cut at line ends: its tokens take far more room."""
    first = 0
    while len(text) - first > TEXT_BYTES:
        last = text.rfind("\n", first, first + TEXT_BYTES) + 1 or first + TEXT_BYTES
        yield Piece(text[first:last], False, where)
        first = last
    yield Piece(text[first:], True, where)


def checked_text(value: Any, what: str, where: str) -> str:
    """Return `value` if it is text that can be encoded.

    Args:
        value: of a file.
        what: how a message calls it, such as "the field 'text'".
        where: how a message names the place.

    Raises:
        FormatError: it is something else.
    """
    if not isinstance(value, str):
        raise FormatError(f"{where}: {what} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{where}: {what} is not valid Unicode: character {error.start} is a lone surrogate"
        ) from None
    return value


def some_names(names: Any) -> str:
    """Return the first of some names, quoted, for a message."""
    shown = [repr(str(name)[:40]) for name in list(names)[:8]]
    return ", ".join(shown) + (", ..." if len(names) > 8 else "") if shown else "no field at all"
