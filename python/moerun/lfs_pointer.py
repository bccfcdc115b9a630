"""Pointers that git-lfs leaves where a file was not downloaded."""

from __future__ import annotations

import re

from moerun.errors import FormatError
from moerun.sizes import size_text

_START = "version https://git-lfs.github.com/spec/"
_SIZE = re.compile(r"^size (\d{1,18})$", re.MULTILINE)


def check_not_lfs_pointer(text: str, where: str) -> None:
    """Raise FormatError naming `where` if `text` is a pointer and not the file itself."""
    if not text.startswith(_START):
        return
    size = _SIZE.search(text[:1024])
    shown = f" ({size_text(int(size[1]))})" if size else ""
    raise FormatError(
        f"{where} is a git-lfs pointer; the file itself{shown} was not downloaded: run "
        "`git lfs pull` in its folder, or download the model again"
    )
