"""Where the prompt comes from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError

# Used when there is no prompt and nobody pipes one in. The shipped model knows how this goes on.
BUILT_IN_PROMPT = """\
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
"""


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Return the prompt: the argument, the file ("-" is standard input), or standard input.

    At a terminal nothing is waited for: the built-in prompt is taken.

    Raises:
        FileError: the file cannot be read.
        FormatError: the prompt is not UTF-8.
        InvalidArgumentError: the prompt is empty.
    """
    if prompt is not None:
        text, where = checked_text(prompt, "PROMPT"), "PROMPT"
    elif file is not None and file != "-":
        text, where = decode_text(_read_file(Path(file)), file), file
    elif sys.stdin is None:
        raise FileError("there is no prompt: standard input is closed")
    elif file is None and sys.stdin.isatty():
        text, where = BUILT_IN_PROMPT, "the built-in prompt"
    else:
        where = "standard input"
        text = decode_text(sys.stdin.buffer.read(), where)
    if not text:
        raise InvalidArgumentError(f"the prompt is empty: {where} holds no text")
    return text


def read_line() -> str | None:
    """Return the next line of standard input without its end, None when there is no more."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401 (gives input() line editing)

        try:
            return checked_text(input("> "), "the line")
        except EOFError:
            return None
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    line = sys.stdin.buffer.readline()
    return decode_text(line, "standard input").rstrip("\r\n") if line else None


def checked_text(text: str, where: str) -> str:
    """Return what the command line or a terminal gave as UTF-8, whatever the locale says."""
    return decode_text(os.fsencode(text), where)


def decode_text(data: bytes, where: str) -> str:
    """Return `data` as text; `where` names its source in the message."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"the prompt file {path} does not exist") from None
    except OSError as error:
        raise FileError(f"the prompt file {path} cannot be read: {error.strerror}") from None
