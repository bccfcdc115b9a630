"""Record files: optional copies of a model's experts, in which every segment is one read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moerun import _moerun
from moerun.arguments import check_str, shown
from moerun.errors import InvalidArgumentError
from moerun.hub import resolve_model
from moerun.user_files import user_path


def pack_folder() -> Path:
    """Return where record files are kept unless another folder is named.

    `$MOERUN_CACHE`, else `moerun` in `$XDG_CACHE_HOME`, else in `~/.cache`.
    """
    if folder := os.environ.get("MOERUN_CACHE"):
        return user_path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(base) / "moerun"


def folder_of(pack: Any) -> str | None:
    """Return the folder that an argument `pack` stands for; None: no record file.

    Raises:
        InvalidArgumentError: it is neither a bool nor a path.
    """
    if pack is None or pack is False:
        return None
    if pack is True:
        return str(pack_folder())
    if not isinstance(pack, (str, os.PathLike)) or not os.fspath(pack):
        raise InvalidArgumentError(f"pack must be a bool or a folder, not {shown(pack)}")
    return check_str("pack", str(user_path(pack, "pack")))


def remove_pack(
    path: str | os.PathLike[str] | None = None, folder: str | os.PathLike[str] | None = None
) -> int:
    """Remove the record files of a model, finished or not; return the bytes that were freed.

    These are the files of the weights that the model has now, also where a copy of the model wrote
    them, and those of weights that lay in its folder before.

    Args:
        path: the model, as for `Model.load`.
        folder: where they are; None for `pack_folder()`.

    Raises:
        FileError: a file cannot be removed.
    """
    return sum(remove_record_files(path, folder).values())


def remove_record_files(
    path: str | os.PathLike[str] | None = None, folder: str | os.PathLike[str] | None = None
) -> dict[Path, int]:
    """Remove the same; return the bytes of each file."""
    place = folder_of(True if folder is None else folder)
    assert place is not None
    found = _moerun.remove_record_files(os.fsencode(resolve_model(path)), os.fsencode(place))
    return {Path(os.fsdecode(file)): size for file, size in found}
