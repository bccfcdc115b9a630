"""Reads JSON of unknown origin: every text either gives plain values or a FormatError."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from moerun.errors import FormatError
from moerun.model_text import read_model_text

# Files of models nest three to six levels. The libraries below stop at 128.
_MOST_LEVELS = 100
_MOST_BYTES = 16 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value that a JSON text holds.

    Args:
        text: JSON; bytes are UTF-8.
        where: what errors call it, such as the name of the file.

    Raises:
        FormatError: it is not JSON, nests more than 100 levels, has a number too long to read, or
            a text with half a character (a lone surrogate).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not valid UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise FormatError(f"{where} is not valid JSON: too many levels") from None
    except ValueError:  # of int(): more than 4,300 digits
        raise FormatError(
            f"{where} is not valid JSON: it has a number of too many digits"
        ) from None
    _check_levels(value, where)
    if _SURROGATE.search(text):
        _check_characters(value, where)
    return value


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the JSON object that a text holds.

    Raises:
        FormatError: as `parse_json`, or it holds another type.
    """
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise FormatError(f"{where} must hold a JSON object, not {type(value).__name__}")
    return value


def read_json_object(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a regular file of at most `most_bytes` bytes.

    Raises:
        FormatError: as `parse_json_object`, or the file is too large.
        MissingFileError, FileError: it cannot be read.
    """
    return parse_json_object(read_model_text(path, most_bytes), str(path))


def _check_levels(value: Any, where: str) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MOST_LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise FormatError(f"{where} nests more than {_MOST_LEVELS} levels of JSON")


def _check_characters(value: Any, where: str) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                raise FormatError(
                    f"{where} has a text with half a character (a lone surrogate): {item[:40]!a}"
                ) from None
