"""Plans that the next run starts from: written from a loaded model, found by model and budget."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerun.cache_options import dry_run
from moerun.errors import FileError, InvalidArgumentError, MoerunError, OutOfMemoryError
from moerun.identity import model_id, name_of
from moerun.packs import folder_of
from moerun.planning.stored_costs import costs_folder
from moerun.user_files import user_path
from moerun.whole_file import replace_file

if TYPE_CHECKING:
    from moerun.model import Model

# A plan for a somewhat smaller budget will do: free memory is never the same twice.
_LEAST_SHARE = 0.9
POLICIES = ("lcp", "lfu", "lru")


def plans_folder() -> Path:
    """Return where plans are stored: `moerun/plans` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    return costs_folder().parent / "plans"


def save_plan(
    model: Model, path: str | os.PathLike[str] | None = None, *, pack: Any = False
) -> Path:
    """Write a loaded model's slots and splits, and the experts that are in them, as a plan.

    Args:
        model: loaded.
        path: of the file, which is replaced; None for where `stored_plan` looks.
        pack: as the model was loaded with; only asked for without `path`.

    Returns:
        The file.

    Raises:
        InvalidArgumentError: the policy is static, whose plan is the one it was loaded with.
        FileError: it cannot be written.
    """
    cache = model.stats()["cache"]
    identity = model_id(model.path)
    if path is None:
        name = _file_name(identity, model.device, pack, cache["policy"], cache["budget_bytes"])
        target = plans_folder() / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot store the plan in {target}: {error.strerror}") from error
    else:
        target = user_path(path)
    plan = _as_plan(model, cache, identity)
    if path is None:
        plan.pop("prefetch", None)  # the next run says itself whether it may read ahead
    replace_file(target, (json.dumps(plan, indent=2) + "\n").encode())
    return target


def stored_plan(
    path: Path,
    *,
    device: str,
    budget_bytes: int,
    policy: str | None = None,
    pack: Any = False,
) -> Path | None:
    """Return the plan that `save_plan` stored for a model and a budget, or nearly as much.

    Args:
        path: the model's folder.
        device: "cpu" or "cuda".
        budget_bytes: for experts.
        policy: that the plan must have; None for "lcp".
        pack: as for `Model.load`.
    """
    prefix = _file_name(model_id(path), device, pack, policy or POLICIES[0], None)
    found: list[tuple[int, Path]] = []
    for file in plans_folder().glob(f"{prefix}-*.json"):
        digits = file.stem.removeprefix(f"{prefix}-")
        if digits.isdigit() and _LEAST_SHARE * budget_bytes <= int(digits) <= budget_bytes:
            found.append((int(digits), file))
    return max(found)[1] if found else None


def start_of_auto(
    path: Path,
    device: str,
    threads: int | None,
    context_length: int | None,
    expert_budget: str | int | None,
    policy: str | None,
    split: Any,
    pack: Any,
) -> Path | None:
    """Return the plan with which `plan="auto"` starts; None for a cache without a plan.

    Arguments are those of `Model.load`; `path` is the model's folder.

    Raises:
        InvalidArgumentError: an argument excludes planning.
        As `moerun.dry_run`, besides.
    """
    if split is not None:
        raise InvalidArgumentError('split: plan "auto" chooses it; leave one of the two out')
    if policy is not None and policy not in POLICIES:
        raise InvalidArgumentError(
            f'policy: with plan "auto" expected {", ".join(POLICIES)}, found {policy!r}'
        )
    sizes = dry_run(
        path, device, threads, context_length, expert_budget=expert_budget, policy=policy
    )
    if sizes["state"] == "resident":
        return None
    found = stored_plan(
        path,
        device=sizes["device"],
        budget_bytes=sizes["budget_bytes"],
        policy=policy,
        pack=pack,
    )
    try:
        if found is not None:
            dry_run(path, device, threads, context_length, plan=found)
    except MoerunError:  # of another version, or damaged: it will be written again
        return None
    return found


def has_taken(model: Model, stored: Path) -> bool:
    """Give a model that was loaded without a plan the stored one; tell whether it fits.

    Loaded with the plan itself, the cache would never again have more memory than the plan uses,
    which may be less than the budget.

    Raises:
        FileError: experts cannot be read.
    """
    try:
        model.reconfigure(stored)
    except OutOfMemoryError:  # made for other layers' rounding; it will be written again
        return False
    return True


def _as_plan(model: Model, cache: dict[str, Any], identity: str) -> dict[str, Any]:
    if cache["policy"] == "static":
        raise InvalidArgumentError(
            "a plan with policy static is the one that the model was loaded with; copy that file"
        )
    plan: dict[str, Any] = {"version": 1, "model": name_of(model.path), "model_id": identity}
    if cache["state"] == "resident":
        return {**plan, "budget_bytes": max(1, cache["budget_bytes"]), "resident": True}
    residents = model.residents()
    layers = []
    for layer in cache["layers"]:
        entry = {name: layer[name] for name in ("layer", "slots", "split")}
        warm = residents[layer["layer"]][: layer["slots"]]
        layers.append({**entry, "warm": warm} if warm else entry)
    return {
        **plan,
        "policy": cache["policy"],
        "budget_bytes": cache["budget_bytes"],
        "prefetch": cache["prefetch"],
        "layers": layers,
    }


def _file_name(identity: str, device: str, pack: Any, policy: str, budget: int | None) -> str:
    store = "checkpoint" if folder_of(pack) is None else "record"
    prefix = f"{identity}-{device}-{store}-{policy}"
    return prefix if budget is None else f"{prefix}-{budget}.json"
