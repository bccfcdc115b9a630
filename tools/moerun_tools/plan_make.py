"""moe-plan make: a plan file for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.plan_options import (
    GivenCosts,
    assumed_guesses,
    assumed_line,
    budget_bytes,
    cost_options,
    model_options,
    plan_options,
)
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

if TYPE_CHECKING:
    from moerun.planning import Plan

_EPILOG = """\b
Examples:
  moe-plan make --trace t.safetensors --budget 40% --link-gb-per-s 1.5 --token-ms 2 -o plan.json
  moe-plan make -m Qwen/Qwen3-30B-A3B --trace q.safetensors --budget 8GiB --costs c.json -o p.json
  moe-run -m Qwen/Qwen3-30B-A3B --plan p.json --dry-run

\b
A file that is there is replaced.
"""


@click.command(
    "make",
    cls=ToolCommand,
    short_help="Write the best plan for a budget.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@model_options
@option(
    "Cache",
    "--budget",
    metavar="SIZE",
    required=True,
    help="Memory for experts: 40% of them, 8GiB, 500MB or bytes.",
)
@plan_options
@cost_options
@option("Output", "-o", "--output", metavar="FILE", required=True, help="The plan, for moe-run.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def make_command(
    model: str | None,
    trace: str,
    budget: str,
    policy: str,
    split: float | None,
    prefetch: str,
    device: str,
    prompt_tokens: int,
    output: str,
    as_json: bool,
    **costs: Any,
) -> None:
    """Plan the slots and the split of each layer, and write them for moe-run --plan."""
    given = GivenCosts(**costs)
    if not output:
        raise click.UsageError("--output needs a name that is not empty.")

    # Imported here, so that --help and wrong usage answer at once.
    from moerun import Trace
    from moerun.errors import InvalidArgumentError
    from moerun.planning import Geometry, layer_curves, make_plan, uniform_plan
    from moerun_tools.output_file import check_target, replace_file
    from moerun_tools.report import json_line

    target = Path(output).expanduser()
    geometry = Geometry.of_model(model, device)
    size = budget_bytes(budget, geometry, model, device)
    if size >= geometry.total_bytes:
        raise InvalidArgumentError(
            f"every expert fits in {budget} (they are {geometry.total_bytes} bytes): no plan is "
            f"needed, run with --expert-budget {budget}"
        )
    cost_model = given.find(model, device, (False, True), len(geometry.moe_layers))
    with Trace.open(trace) as opened:
        check_target(target, [*opened.files, *([given.costs] if given.costs else [])])
        curves = layer_curves(opened, policy)
        assumed = given.assumed + assumed_guesses(opened, prefetch == "on")
    options: dict[str, Any] = {"prefetch": prefetch == "on", "prompt_tokens": prompt_tokens}
    plan = make_plan(curves, cost_model, geometry, size, split=split, **options)
    uniform = uniform_plan(
        curves, cost_model, geometry, size, 1.0 if split is None else split, **options
    )
    replace_file(target, (plan.to_json() + "\n").encode())
    if as_json:
        facts = _facts(plan, uniform, geometry.total_bytes, assumed, output)
        write_out(json_line({**facts, **given.source(cost_model)}))
        return
    write_out(
        _as_text(plan, uniform, geometry.total_bytes)
        + assumed_line(assumed)
        + given.source_line(cost_model)
        + f"plan: {output}\n"
    )


def _facts(
    plan: Plan, uniform: Plan, total: int, assumed: list[str], output: str
) -> dict[str, Any]:
    """Return what --json prints."""
    return {
        "model": plan.model,
        "policy": plan.policy,
        "prefetch": plan.prefetch,
        "budget_bytes": plan.budget_bytes,
        "arena_bytes": plan.arena_bytes,
        "total_expert_bytes": total,
        "predicted": plan.predicted.as_dict(),
        "uniform": uniform.predicted.as_dict(),
        "layers": [vars(layer) for layer in plan.layers],
        "assumed": assumed,
        "plan": output,
    }


def _as_text(plan: Plan, uniform: Plan, total: int) -> str:
    """Return what is predicted beside what the cache does without a plan."""
    from moerun_tools.plan_table import budget_text, columns, milliseconds, percent
    from moerun_tools.units import as_binary

    both = (plan.predicted, uniform.predicted)
    slots = [layer.slots for layer in plan.layers]
    splits = [layer.split for layer in plan.layers]
    rows = [
        ("", "plan", "uniform"),
        ("hit rate (%)", *(percent(each.hit_rate) for each in both)),
        ("TPOT (ms)", *(milliseconds(each.tpot_ms) for each in both)),
        ("  waiting (ms)", *(milliseconds(each.stalled_ms) for each in both)),
        ("TTFT (ms)", *(milliseconds(each.ttft_ms) for each in both)),
        ("moved a token", *(as_binary(each.bytes_per_token) for each in both)),
    ]
    return (
        f"{plan.model}, {plan.policy}, {budget_text(plan.budget_bytes, total)}: "
        f"{_range(slots)} slots a layer, split {_range(splits)}\n"
        f"predicted, with a prompt of {plan.predicted.prompt_tokens} tokens:\n" + columns(rows)
    )


def _range(values: list[Any]) -> str:
    """Return the smallest and the largest of some numbers."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
