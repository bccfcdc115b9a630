"""Text files of models, where a download may have left a git-lfs pointer."""

from __future__ import annotations

import os
import re

from moerun.errors import FormatError
from moerun.sizes import size_text
from moerun.user_files import read_text_bounded

_START = "version https://git-lfs.github.com/spec/"
_SIZE = re.compile(r"^size (\d{1,18})$", re.MULTILINE)


def read_model_text(path: str | os.PathLike[str], limit: int) -> str:
    """Return the text of a file of a model, of at most `limit` bytes.

    Raises:
        InvalidArgumentError, MissingFileError, FileError: as `user_files.open_regular`.
        FormatError: the file is larger, not UTF-8, or a git-lfs pointer.
    """
    text = read_text_bounded(path, limit)
    if text.startswith(_START):
        size = _SIZE.search(text[:1024])
        shown = f" ({size_text(int(size[1]))})" if size else ""
        raise FormatError(
            f"{path} is a git-lfs pointer; the file itself{shown} was not downloaded: run "
            "`git lfs pull` in its folder, or download the model again"
        )
    return text
