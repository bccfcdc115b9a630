"""Which costs a command of moe-plan works with, when nobody gave numbers."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerun.planning import CostModel


def age_text(measured_at: str) -> str:
    """Return how long ago a moment was, in words."""
    try:
        then = datetime.datetime.fromisoformat(measured_at)
    except ValueError:
        return "of unknown age"
    now = datetime.datetime.now(then.tzinfo)
    seconds = max(0.0, (now - then).total_seconds())
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds / size)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def costs_from_file(name: str, model: str | None, other_machine: bool) -> CostModel:
    """Return the costs in a file, which must be of this model, and of this machine unless told so.

    Raises:
        InvalidArgumentError: they were measured with another model, or on another machine.
        FileError, FormatError: the file cannot be read, or is no cost model.
    """
    from moerun.errors import InvalidArgumentError
    from moerun.identity import ModelIdentity, machine_name
    from moerun.planning.costs import read_costs

    costs = read_costs(name)
    if costs.sizes_id and costs.sizes_id != ModelIdentity(model).sizes_id:
        raise InvalidArgumentError(
            f"{name} was measured with another model ({costs.model or costs.sizes_id}): measure "
            f"this one with {calibrate_line(model, False)}"
        )
    if costs.machine and costs.machine != machine_name() and not other_machine:
        raise InvalidArgumentError(
            f"{name} was measured on another machine ({costs.machine}; this one is "
            f"{machine_name()}). To plan for that one, add --other-machine; to plan for this one, "
            f"measure it with {calibrate_line(model, False)}"
        )
    return costs


def costs_from_store(model: str | None, device: str, pack: bool) -> CostModel:
    """Return what was measured on this machine, with experts from a record file or without.

    Raises:
        InvalidArgumentError: nothing was, or not by this version.
    """
    from moerun.errors import InvalidArgumentError
    from moerun.planning import stored_costs

    costs = stored_costs(model, device, pack=pack)
    if costs is not None:
        return costs
    raise InvalidArgumentError(
        "there are no timings for this model on this machine. Run: "
        f"{calibrate_line(model, pack)} (about 10 s); or give --costs FILE, or --link-gb-per-s "
        "and --token-ms"
    )


def calibrate_line(model: str | None, pack: bool) -> str:
    """Return the command that measures."""
    named = "" if model is None else f" -m {model}"
    return f"moe-plan calibrate{named}{' --pack' if pack else ''}"


def source_text(costs: CostModel) -> str:
    """Return what stored costs are of, in a few words."""
    threads = f"{costs.threads} thread{'' if costs.threads == 1 else 's'}"
    age = age_text(costs.measured_at)
    return (
        f"measured on this machine {age} ({costs.device}, {threads}, {costs.store}, "
        f"after {costs.context_tokens} tokens)"
    )
