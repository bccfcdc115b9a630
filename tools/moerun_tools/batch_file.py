"""The files of moe-run --batch: prompts, one a line, and what became of each."""

from __future__ import annotations

import codecs
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.user_files import read_bounded

# What a line may say of its own text, in place of the command line.
GENERATION_FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
)

_MAX_BYTES = 1 << 30
_MAX_DEPTH = 32
_MOST_NAMES = 10
_MAX_NAME = 60  # characters of a field's name in a message


@dataclass(frozen=True)
class BatchLine:
    """One prompt.

    Attributes:
        number: of its line in the file, from 1.
        prompt: the text.
        id: what the line calls itself; None: nothing.
        generation: those of GENERATION_FIELDS that the line has.
    """

    number: int
    prompt: str
    id: Any
    generation: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that is no prompt, and why."""

    number: int
    error: str


@dataclass
class BatchInput:
    """The lines of a file of prompts.

    Attributes:
        lines: in their order; lines without text are passed over.
        ignored: names of fields that mean nothing here; of many, the first ones.
        fingerprint: of the bytes.
    """

    lines: list[BatchLine | BadLine]
    ignored: list[str]
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> BatchInput:
        """Read a file of JSON lines, each a text or an object with a text `prompt`.

        Args:
            path: of the file; "-" is standard input.

        Raises:
            MissingFileError: there is no such file.
            FileError: it cannot be read, or is a pipe or a device.
            FormatError: it is too large to be a file of prompts.
            InvalidArgumentError: it has no line.
        """
        data = _read_stdin() if str(path) == "-" else _read_file(path)
        lines: list[BatchLine | BadLine] = []
        ignored: dict[str, None] = {}
        for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                lines.append(_parse(number, line, ignored))
            except FormatError as error:
                lines.append(BadLine(number, str(error)))
        if not lines:
            raise InvalidArgumentError(
                f"the batch file {path} is empty; it needs a line for each prompt, such as "
                '{"prompt": "import os"}'
            )
        names = list(ignored)
        if len(names) > _MOST_NAMES:
            names[_MOST_NAMES:] = [f"and {len(names) - _MOST_NAMES} more"]
        return cls(lines, names, hashlib.sha256(data).hexdigest())


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise FileError("the batch file - cannot be read: standard input is closed")
    try:
        data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"the batch file - cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise FormatError(
            f"the batch file - is too large: expected at most {_MAX_BYTES:,} bytes; divide it"
        )
    return data


def _read_file(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_BYTES)
    except MissingFileError:
        raise MissingFileError(f"the batch file {path} does not exist") from None
    except FileError as error:
        hint = ""
        if not path.is_file() and not path.is_dir():
            hint = f"; prompts from a pipe come by standard input: --batch - < {path}"
        raise FileError(f"the batch file cannot be read: {error}{hint}") from None


def _parse(number: int, line: bytes, ignored: dict[str, None]) -> BatchLine:
    value = _json_of(line)
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise FormatError(
            "expected a text, or an object with a text `prompt`, found "
            f"{'null' if value is None else type(value).__name__}"
        )
    if not _is_flat(value, _MAX_DEPTH):
        raise FormatError(f"nested more than {_MAX_DEPTH} levels deep, expected a plain object")
    if "prompt" not in value:
        _refuse_other_format(value)
    prompt = value.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        found = "none" if "prompt" not in value else json.dumps(prompt)[:40]
        raise FormatError(f"`prompt`: expected a text that is not empty, found {found}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise FormatError("`prompt` is not valid Unicode: it has a lone surrogate") from None
    try:
        json.dumps(value.get("id"), allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise FormatError("`id`: it cannot be written as JSON again") from None
    known = ("prompt", "id", *GENERATION_FIELDS)
    ignored.update(dict.fromkeys(_name_of(name) for name in value if name not in known))
    generation = {name: value[name] for name in GENERATION_FIELDS if value.get(name) is not None}
    return BatchLine(number, prompt, value.get("id"), generation)


def _json_of(line: bytes) -> Any:
    try:
        return json.loads(line.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: byte 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {error.msg}, at column {error.colno}") from None
    except RecursionError:
        raise FormatError("not JSON of a prompt: nested too deep") from None
    except ValueError as error:
        raise FormatError(f"not JSON: {error}") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _is_flat(value: Any, levels: int) -> bool:
    """Return whether a value is nested at most so deep: what writes it again is recursive."""
    if not isinstance(value, (dict, list)):
        return True
    entries = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_flat(entry, levels - 1) for entry in entries)


def _name_of(field: str) -> str:
    """Return a field's name as a terminal can show it."""
    shown = field if len(field) <= _MAX_NAME else field[: _MAX_NAME - 3] + "..."
    return shown if shown.isprintable() else ascii(shown)


def _refuse_other_format(value: dict[str, Any]) -> None:
    """Name the format of a line that other programs would take."""
    wanted = 'a line here is {"prompt": "a text"}, perhaps with an `id`'
    if "body" in value or "custom_id" in value:
        raise FormatError(
            f"found a line of an OpenAI batch file (`custom_id`, `body`); {wanted} in place of "
            "`custom_id`. With --chat the text is what the user says"
        )
    if "messages" in value:
        raise FormatError(
            f"found chat `messages`; {wanted}. With --chat the text is what the user says, and "
            "--system gives the system message"
        )
