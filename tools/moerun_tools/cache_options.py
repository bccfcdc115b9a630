"""Options of the expert cache, the same for every tool that loads a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

from moerun_tools.command import FiniteFloat, GroupedOption

_Function = TypeVar("_Function", bound=Callable[..., Any])

_GROUP = "Expert cache"
PREFETCH: dict[str, bool | Literal["auto"]] = {"on": True, "off": False, "auto": "auto"}


def split_list(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Return one number from 0 to 1, or several that had commas between them, as a list."""
    if value is None:
        return None
    entry = FiniteFloat(min=0, max=1)
    return [entry.convert(text.strip(), param, ctx) for text in value.split(",")]


_OPTIONS = (
    click.option(
        "--expert-budget",
        cls=GroupedOption,
        group=_GROUP,
        metavar="SIZE",
        help="Memory limit for experts: 25% of them, 6GiB, 500MiB or bytes; the rest stays on "
        "disk.  [default: all that fits in free memory]",
    ),
    click.option(
        "--policy",
        cls=GroupedOption,
        group=_GROUP,
        type=click.Choice(["off", "lru", "lfu", "lcp", "static", "predictive"]),
        help="How to choose the cached expert to drop; off caches none, predictive looks ahead.  "
        "[default: lcp; predictive with --predictor]",
    ),
    click.option(
        "--split",
        cls=GroupedOption,
        group=_GROUP,
        metavar="X[,X...]",
        callback=split_list,
        help="Share of a cached expert that stays in memory: one number from 0 to 1, or one for "
        "each layer with experts.  [default: 1]",
    ),
    click.option(
        "--prefetch",
        cls=GroupedOption,
        group=_GROUP,
        type=click.Choice(list(PREFETCH)),
        help="Read the experts that the next layer will probably use; auto: while that is faster.  "
        "[default: auto]",
    ),
    click.option(
        "--plan",
        cls=GroupedOption,
        group=_GROUP,
        metavar="FILE|auto",
        help="JSON file with slots and split of each layer, instead of budget, policy and split; "
        "or auto: start from what the last such run left, and plan again while running.",
    ),
    click.option(
        "--pack",
        cls=GroupedOption,
        group=_GROUP,
        is_flag=True,
        help="Read experts from a record file in the user's cache folder, written first if need "
        "be: as large as all experts, and every segment is one read.",
    ),
    click.option(
        "--pin-limit",
        cls=GroupedOption,
        group=_GROUP,
        metavar="SIZE",
        help="With --device cuda, most memory of the host that is page-locked for experts: 40% of "
        "them, 8GiB, bytes or 0.  [default: all that fits in free memory]",
    ),
    click.option(
        "--host-tier",
        cls=GroupedOption,
        group=_GROUP,
        type=click.Choice(["auto", "memory", "disk"]),
        help="With --device cuda, where experts are that are not page-locked; auto is memory as "
        "far as it goes.  [default: auto]",
    ),
)


def cache_options(function: _Function) -> _Function:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def cache_arguments(
    expert_budget: str | None,
    policy: str | None,
    split: list[float] | None,
    prefetch: str | None,
    plan: str | None,
    pack: bool,
    pin_limit: str | None,
    host_tier: str | None,
) -> dict[str, Any]:
    """Return the options as arguments of `Model.load` and `moerun.dry_run`.

    Raises:
        click.UsageError: two options exclude each other.
    """
    if plan is not None:
        others: dict[str, object] = {"--split": split}
        if plan != "auto":
            others = {"--expert-budget": expert_budget, **others}
            if policy != "predictive":  # which goes back to what the plan says
                others["--policy"] = policy
        for name, value in others.items():
            if value is not None:
                raise click.UsageError(f"--plan and {name} exclude each other.")
    return {
        "expert_budget": expert_budget,
        "policy": policy,
        "split": split,
        "prefetch": None if prefetch is None else PREFETCH[prefetch],
        "plan": plan,
        "pack": pack,
        "pin_limit": pin_limit,
        "host_tier": host_tier,
    }
