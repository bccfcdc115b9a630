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
        ignored: names of fields that mean nothing here.
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
            FileError: it cannot be read.
            InvalidArgumentError: it has no line.
        """
        try:
            data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        except FileNotFoundError:
            raise MissingFileError(f"the batch file {path} does not exist") from None
        except OSError as error:
            raise FileError(f"the batch file {path} cannot be read: {error.strerror}") from None
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
        return cls(lines, list(ignored), hashlib.sha256(data).hexdigest())


def _parse(number: int, line: bytes, ignored: dict[str, None]) -> BatchLine:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: byte 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"not JSON: {error.msg}, at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise FormatError(
            "expected a text, or an object with a text `prompt`, found "
            f"{'null' if value is None else type(value).__name__}"
        )
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
    except (ValueError, RecursionError):
        raise FormatError("`id`: it cannot be written as JSON again") from None
    known = ("prompt", "id", *GENERATION_FIELDS)
    ignored.update(dict.fromkeys(name for name in value if name not in known))
    generation = {name: value[name] for name in GENERATION_FIELDS if value.get(name) is not None}
    return BatchLine(number, prompt, value.get("id"), generation)


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
