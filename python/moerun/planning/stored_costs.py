"""Where the costs of this machine are kept, so that nobody has to name a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moerun import __version__, _moerun
from moerun.errors import FileError, FormatError, InvalidArgumentError
from moerun.identity import ModelIdentity, machine_name
from moerun.packs import folder_of
from moerun.planning.costs import CostModel, read_costs
from moerun.user_files import user_path
from moerun.whole_file import replace_file


def costs_folder() -> Path:
    """Return where costs are stored: `moerun/costs` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(base) / "moerun" / "costs"


def store_costs(costs: CostModel) -> Path:
    """Keep costs for `stored_costs`; those of the same machine, sizes, device and store go.

    Returns:
        The file.

    Raises:
        InvalidArgumentError: they do not say of what they are; `calibrate` returns such that do.
        FileError: the file cannot be written.
    """
    for name in ("machine", "sizes_id", "device", "store"):
        if not getattr(costs, name):
            raise InvalidArgumentError(
                f"costs without {name} cannot be stored, for nobody could find them again; "
                "moerun.planning.calibrate measures ones that say it"
            )
    path = costs_folder() / _file_name(costs.machine, costs.sizes_id, costs.device, costs.store)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot store the costs in {path}: {error.strerror}") from error
    replace_file(path, (costs.to_json() + "\n").encode())
    return path


def stored_costs(
    path: str | os.PathLike[str] | None = None, device: str = "auto", *, pack: Any = False
) -> CostModel | None:
    """Return what was measured on this machine for a model by this version of moerun.

    Args:
        path: the model, as for `Model.load`.
        device: where it would run, as for `Model.load`.
        pack: whether experts would come from a record file, as for `Model.load`.

    Returns:
        None: nothing, or by a version whose first two numbers are others.

    Raises:
        FormatError, FileError: what is stored cannot be read.
        As `moerun.identity.ModelIdentity`, besides.
    """
    return find_costs(ModelIdentity(path).sizes_id, _moerun.choose_device(device), pack=pack)


def find_costs(identity: str, device: str, *, pack: Any = False) -> CostModel | None:
    """Return the same of models whose `sizes_id` is `identity`, and a device "cpu" or "cuda"."""
    machine = machine_name()
    store = "checkpoint" if folder_of(pack) is None else "record file"
    file = costs_folder() / _file_name(machine, identity, device, store)
    if not file.exists():
        return None
    costs = _read(file)
    expected = (machine, identity, device, store, _series(__version__))
    found = (
        costs.machine,
        costs.sizes_id,
        costs.device,
        costs.store,
        _series(costs.moerun_version),
    )
    return costs if found == expected else None


def all_stored_costs() -> Iterator[tuple[Path, CostModel | None]]:
    """Yield every file that is stored, and what is in it; None if it cannot be read."""
    for file in sorted(costs_folder().glob("*.json")):
        try:
            yield file, _read(file)
        except (FileError, FormatError):
            yield file, None


def forget_costs(path: str | os.PathLike[str] | None = None) -> int:
    """Remove what is stored of a model, of all devices and machines; return how many files it was.

    Raises:
        FileError: a file cannot be removed.
    """
    files = list(costs_folder().glob(f"{ModelIdentity(path).sizes_id}-*.json"))
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"cannot remove {file}: {error.strerror}") from error
    return len(files)


def _file_name(machine: str, identity: str, device: str, store: str) -> str:
    key = hashlib.sha256("\n".join((machine, device, store)).encode()).hexdigest()[:16]
    return f"{identity}-{key}.json"


def _series(version: str) -> list[str]:
    """Return the numbers of a version that say which others measure alike."""
    return version.split(".")[:2]


def _read(file: Path) -> CostModel:
    advice = "measure again with moe-plan calibrate, which replaces it"
    try:
        return read_costs(file)
    except FormatError as error:
        raise FormatError(f"{error}; {advice}") from None
