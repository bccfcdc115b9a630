"""Where the prompt comes from."""

from __future__ import annotations

import os
import sys

import click

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.user_files import decoded, read_bounded
from moerun_tools.units import as_binary

# More text than any context holds; a tokenizer would take many times as much memory.
_MOST_BYTES = 256 << 20

# The prompt at a terminal where none is given. The shipped model knows how this goes on.
BUILT_IN_PROMPT = """\
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
"""


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Return the prompt: the argument, the file ("-" is standard input), or standard input.

    At a terminal nothing is waited for: the built-in prompt is taken.

    A byte order mark at its beginning is left out.

    Raises:
        MissingFileError, FileError: the file cannot be read, or is no regular file.
        FormatError: the prompt is not UTF-8, or larger than any context.
        InvalidArgumentError: the prompt is empty.
    """
    if prompt is not None:
        text, where = checked_text(prompt, "PROMPT"), "PROMPT"
    elif file is not None and file != "-":
        text, where = decoded(_read_file(file), file), file
    elif sys.stdin is None:
        raise FileError("there is no prompt: standard input is closed")
    elif file is None and sys.stdin.isatty():
        text, where = BUILT_IN_PROMPT, "the built-in prompt"
    else:
        where = "standard input"
        data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise FormatError(
                f"standard input has more than {as_binary(_MOST_BYTES)}, which fits in no context"
            )
        text = decoded(data, where)
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


def _read_file(name: str) -> bytes:
    try:
        return read_bounded(name, _MOST_BYTES)
    except MissingFileError:
        raise MissingFileError(f"the prompt file {name} does not exist") from None
    except FileError as error:
        hint = "; pipe it in, with -f - or without -f" if "a pipe" in str(error) else ""
        raise FileError(f"the prompt file {error}{hint}") from None
