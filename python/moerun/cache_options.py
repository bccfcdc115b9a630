"""Options of the machine and of the expert cache: checked, and put as the native module wants them.

Only what an argument's type says is checked here. Whether a budget is enough, a policy exists or a
list of splits is as long as the model needs, the native module knows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from moerun import _moerun
from moerun.arguments import check_int, check_number, check_str, shown
from moerun.errors import InvalidArgumentError
from moerun.hub import resolve_model
from moerun.packs import folder_of
from moerun.plan_files import check_plan_model, plan_path

Split: TypeAlias = float | Sequence[float]
Prefetch: TypeAlias = bool | Literal["auto"]


def machine_options(
    device: Any, threads: Any, context_length: Any, **others: Any
) -> dict[str, Any]:
    """Return the options of the machine, and `others` as they are.

    Raises:
        InvalidArgumentError: an argument has the wrong type or is out of its range.
    """
    return {
        "device": check_str("device", device),
        "threads": None if threads is None else check_int("threads", threads, 1),
        "context_length": (
            None if context_length is None else check_int("context_length", context_length, 1)
        ),
        **others,
    }


def cache_options(
    expert_budget: Any,
    policy: Any,
    split: Any,
    prefetch: Any,
    plan: Any,
    pin_limit: Any = None,
    host_tier: Any = None,
) -> dict[str, Any]:
    """Return the options of the expert cache that were given; None was not.

    Raises:
        InvalidArgumentError: an argument has the wrong type or is out of its range.
    """
    options = {
        "expert_budget": None
        if expert_budget is None
        else size_text("expert_budget", expert_budget, 1),
        "policy": None if policy is None else _named("policy", policy),
        "split": None if split is None else _splits(split),
        "prefetch": None if prefetch is None else _prefetch(prefetch),
        "plan": None if plan is None else plan_path(plan),
        "pin_limit": None if pin_limit is None else size_text("pin_limit", pin_limit, 0),
        "host_tier": None if host_tier is None else _named("host_tier", host_tier),
    }
    return {name: value for name, value in options.items() if value is not None}


def dry_run(
    path: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    context_length: int | None = None,
    *,
    expert_budget: str | int | None = None,
    policy: str | None = None,
    split: Split | None = None,
    prefetch: Prefetch | None = None,
    plan: str | os.PathLike[str] | None = None,
    pack: bool | str | os.PathLike[str] = False,
    pin_limit: str | int | None = None,
    host_tier: str | None = None,
) -> dict[str, Any]:
    """Return what each memory tier would hold, in bytes, without loading any weights.

    Takes what `Model.load` takes; `pack` changes nothing in memory. A Hugging Face repository that
    is not on this machine is downloaded.

    Returns:
        `model`, `device`, `device_reason`; `state` ("resident" when every expert fits, else
        "cached"), `policy`, `prefetch`;
        `resident_bytes` (all but the routed experts), `kv_cache_bytes_at_full_context`,
        `total_expert_bytes`, `budget_bytes`, `arena_bytes` = `slot_bytes` + `ring_bytes`,
        `smallest_budget_bytes`, `available_bytes` (free memory of the host); `device_free_bytes`,
        `device_total_bytes`, and of the device `activation_bytes`, `scratch_bytes`,
        `reserve_bytes`, `left_for_experts_bytes`; `num_moe_layers`, `num_experts`, `top_k`,
        `expert_bytes_each`; `host`, for a device that copies experts from the host: None, or
        `tier`, `pin_limit_bytes`, `page_locked_bytes`, `pageable_bytes`, `disk_bytes`,
        `ring_bytes`, `notes`; and `layers`: `layer`, `slots`, `split`, `slot_bytes` of each layer
        with experts. `has_tokenizer`: false where text cannot be turned into tokens.

    Raises:
        As `Model.load`.
    """
    folder_of(pack)
    directory = resolve_model(path)
    stored = None
    if plan == "auto":
        from moerun.planning.stored_plans import start_of_auto

        plan, stored = (
            None,
            start_of_auto(
                directory, device, threads, context_length, expert_budget, policy, split, pack
            ),
        )
    options = {
        **machine_options(device, threads, context_length),
        **cache_options(expert_budget, policy, split, prefetch, plan, pin_limit, host_tier),
    }
    check_plan_model(options.get("plan"), directory)
    found = _moerun.dry_run(os.fsencode(directory), **options)
    found["has_tokenizer"] = (directory / "tokenizer.json").is_file()
    if stored is not None:  # its slots, in memory as large as without it
        planned = dry_run(directory, device, threads, context_length, plan=stored)
        if planned["arena_bytes"] <= found["arena_bytes"]:
            found |= {name: planned[name] for name in ("slot_bytes", "layers")}
    return found


def _named(name: str, value: Any) -> str:
    """Return a text; an empty one, which the native module takes for none, is refused."""
    if check_str(name, value) == "":
        raise InvalidArgumentError(f"{name} is an empty text; leave it out for the default")
    return str(value)


def size_text(name: str, value: Any, least: int) -> str:
    """Return a size as the runtime reads it: a text, or a number of bytes."""
    if isinstance(value, str):
        return _named(name, value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgumentError(
            f'{name} must be a str such as "25%" or "6GiB", or an int of bytes, not {shown(value)}'
        )
    return str(check_int(name, value, least))


def _splits(value: Any) -> list[float]:
    """Return one split for all layers, or one per layer."""
    if isinstance(value, (str, bytes, dict, set)) or not isinstance(value, Iterable):
        return [check_number("split", value, 0, 1)]
    if isinstance(value, np.ndarray) and value.ndim != 1:
        raise InvalidArgumentError(
            "split must be a number, or a sequence of one number per layer with experts, not an "
            f"array of shape {value.shape}"
        )
    splits = [check_number(f"split[{idx}]", entry, 0, 1) for idx, entry in enumerate(value)]
    if not splits:
        raise InvalidArgumentError(
            "split is empty; it must be a number, or a sequence of one number per layer with "
            "experts"
        )
    return splits


def _prefetch(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "on" if value else "off"
    if isinstance(value, str) and value == "auto":
        return "auto"
    raise InvalidArgumentError(f'prefetch must be True, False or "auto", not {shown(value)}')
