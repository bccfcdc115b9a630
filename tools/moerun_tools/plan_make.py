"""moe-plan make: a plan file for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.plan_options import (
    GivenCosts,
    assumed_guesses,
    assumed_line,
    budget_bytes,
    cost_options,
    few_tokens,
    model_options,
    plan_options,
)
from moerun_tools.trace_options import CONTEXT_SETTINGS, Progress, option

if TYPE_CHECKING:
    from moerun import Trace
    from moerun.planning import CostModel, Geometry, Plan, Trial

_EPILOG = """\b
Examples:
  moe-plan make --trace t.safetensors --budget 40% --link-gb-per-s 1.5 --token-ms 2 -o plan.json
  moe-plan make -m Qwen/Qwen3-30B-A3B --trace q.safetensors --budget 8GiB --costs c.json -o p.json
  moe-run -m Qwen/Qwen3-30B-A3B --plan p.json --dry-run

\b
The cost model proposes plans, the simulator tries them and simple configurations on the trace, and
the fastest is written. A file that is there is replaced.
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
@plan_options("auto")
@option("Cache", "--pack", is_flag=True, help="For experts from a record file; none is written.")
@option(
    "Cache",
    "--quick",
    is_flag=True,
    help="By the cost model alone. Always so with --device cuda, which is not simulated.",
)
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
    pack: bool,
    quick: bool,
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
    from moerun.planning import Geometry
    from moerun.planning.search import CHOICES
    from moerun.sizes import size_text
    from moerun.user_files import user_path
    from moerun.whole_file import replace_file
    from moerun_tools.output_file import check_target
    from moerun_tools.report import json_line

    target = user_path(output)
    geometry = Geometry.of_model(model, device, pack)
    size = budget_bytes(budget, geometry, model)
    if size >= geometry.total_bytes:
        raise InvalidArgumentError(
            f"every expert fits in {budget} (they take "
            f"{size_text(geometry.total_bytes, 'up')}): no plan is needed, run with "
            f"--expert-budget {budget}"
        )
    cost_model = given.find(model, device, pack, len(geometry.moe_layers))
    policies = CHOICES if policy == "auto" else (policy,)
    options: dict[str, Any] = {"prefetch": prefetch == "on", "prompt_tokens": prompt_tokens}
    is_tried = not quick and geometry.move_bytes is not None
    with Trace.open(trace) as opened:
        check_target(target, [*opened.files, *([given.costs] if given.costs else [])])
        assumed = given.assumed + few_tokens(opened.num_tokens)
        if is_tried:
            options |= {"policies": policies, "split": split, "pack": pack}
            plan, trials = _search(opened, model, cost_model, size, options)
            if prefetch == "on" and "prefetch_ids" not in opened.tensors:
                assumed = [
                    *assumed,
                    "no prefetch (the trace does not say what it would name: "
                    "record it with moe-trace record --with-prefetch)",
                ]
        else:
            plan, trials = _modelled(opened, policies, cost_model, geometry, size, split, options)
            assumed = assumed + assumed_guesses(opened, prefetch == "on")
    replace_file(target, (plan.to_json() + "\n").encode())
    if as_json:
        facts = _facts(plan, trials, geometry.total_bytes, is_tried, assumed, output)
        write_out(json_line({**facts, **given.source(cost_model)}))
        return
    text = _as_text(plan, trials, geometry.total_bytes, is_tried)
    costs_line = given.source_line(cost_model)
    write_out(text + assumed_line(assumed) + costs_line + f"plan: {output}\n")


def _search(
    trace: Trace, model: str | None, costs: CostModel, budget: int, options: dict[str, Any]
) -> tuple[Plan, list[Trial]]:
    """Return the plan that was fastest in the simulator, and all that were tried."""
    from moerun.planning import find_plan

    with Progress("simulating", "plan", False) as bar:
        return find_plan(
            trace, model, costs=costs, budget_bytes=budget, progress=bar.show, **options
        )


def _modelled(
    trace: Trace,
    policies: Sequence[str],
    costs: CostModel,
    geometry: Geometry,
    budget: int,
    split: float | None,
    options: dict[str, Any],
) -> tuple[Plan, list[Trial]]:
    """Return the plan that the cost model likes best, and the uniform one beside it."""
    from moerun.planning import Trial, layer_curves, make_plan, uniform_plan

    found = []
    ahead = bool(options["prefetch"])
    for policy in policies:
        problem = (layer_curves(trace, policy), costs, geometry, budget)
        found.append(Trial.of("planned", ahead, make_plan(*problem, split=split, **options)))
        share = 1.0 if split is None else split
        name = f"uniform, split {share:g}"
        found.append(Trial.of(name, ahead, uniform_plan(*problem, share, **options)))
    found.sort(key=lambda trial: trial.modelled_tpot_ms)
    return found[0].plan, found


def _facts(
    plan: Plan,
    trials: list[Trial],
    total: int,
    is_tried: bool,
    assumed: list[str],
    output: str,
) -> dict[str, Any]:
    """Return what --json prints."""
    return {
        "model": plan.model,
        "policy": plan.policy,
        "prefetch": plan.prefetch,
        "budget_bytes": plan.budget_bytes,
        "arena_bytes": plan.arena_bytes,
        "total_expert_bytes": total,
        "random_hit_rate": plan.budget_bytes / total,
        "simulated": is_tried,
        "predicted": plan.predicted.as_dict(),
        "tried": [
            {
                "name": trial.name,
                "policy": trial.plan.policy,
                "prefetch": trial.prefetch,
                "modelled_tpot_ms": trial.modelled_tpot_ms,
                **trial.plan.predicted.as_dict(),
            }
            for trial in trials
        ],
        "layers": [vars(layer) for layer in plan.layers],
        "assumed": assumed,
        "plan": output,
    }


def _as_text(plan: Plan, trials: list[Trial], total: int, is_tried: bool) -> str:
    """Return what is predicted beside what simple configurations do."""
    from moerun_tools.plan_table import budget_text, columns, milliseconds, percent
    from moerun_tools.units import as_binary

    slots = [layer.slots for layer in plan.layers]
    splits = [layer.split for layer in plan.layers]
    rows: list[tuple[str, ...]] = [
        ("", "policy", "prefetch", "hit rate (%)", "TPOT (ms)", "waiting (ms)", "moved a token")
    ]
    for trial in _worth_showing(plan, trials):
        predicted = trial.plan.predicted
        rows.append(
            (
                trial.name,
                trial.plan.policy,
                "on" if trial.prefetch else "off",
                percent(predicted.hit_rate),
                milliseconds(predicted.tpot_ms),
                milliseconds(predicted.stalled_ms),
                as_binary(predicted.bytes_per_token),
            )
        )
    how = f"simulated, the best of {len(trials)}" if is_tried else "by the cost model"
    return (
        f"{plan.model}, {plan.policy}, {budget_text(plan.budget_bytes, total)}: "
        f"{_range(slots)} slots a layer, split {_range(splits)}\n"
        f"predicted ({how}):\n"
        + columns(rows)
        + f"by chance (a random set of the experts): {percent(plan.budget_bytes / total)} % hits\n"
        f"TTFT with a prompt of {plan.predicted.prompt_tokens} tokens: "
        f"{milliseconds(plan.predicted.ttft_ms)} ms\n"
    )


def _worth_showing(plan: Plan, trials: list[Trial]) -> list[Trial]:
    """Return the plan, and the best of each other kind."""
    shown = [trial for trial in trials if trial.plan is plan][:1]
    names = {trial.name for trial in shown}
    for trial in trials:
        if trial.name not in names:
            names.add(trial.name)
            shown.append(trial)
    return shown


def _range(values: list[Any]) -> str:
    """Return the smallest and the largest of some numbers."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
