"""Names of files as users give them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moerun.arguments import shown
from moerun.errors import InvalidArgumentError


def user_path(value: Any, name: str = "path") -> Path:
    """Return `value` as a path, with the user's folder in place of a leading ~.

    Args:
        value: a str or an os.PathLike of one.
        name: of the argument, for messages.

    Raises:
        InvalidArgumentError: it is no name of a file, or there is no such user.
    """
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{name} must be a path (a str or a Path), not {shown(value)}")
    if "\0" in text:
        raise InvalidArgumentError(f"{name} holds a null character, which no file's name can have")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidArgumentError(
            f"{name} {text}: the user of {Path(text).parts[0]} has no home folder here; "
            "write the whole path"
        ) from None
