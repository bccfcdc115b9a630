"""moe-plan curve: what more memory would bring."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.plan_options import (
    GivenCosts,
    assumed_guesses,
    assumed_line,
    cost_options,
    few_tokens,
    model_options,
    plan_options,
)
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

if TYPE_CHECKING:
    from moerun.planning import BudgetCurve, BudgetPoint

_EPILOG = """\b
Examples:
  moe-plan curve --trace t.safetensors --link-gb-per-s 1.5 --token-ms 2
  moe-plan curve --trace t.safetensors --costs costs.json --policy lru -o curve.png
  moe-plan curve --trace t.safetensors --costs costs.json --points 50 --json | jq .knee
"""


@click.command(
    "curve",
    cls=ToolCommand,
    short_help="Show what each budget would bring.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@model_options
@plan_options("lcp")
@option(
    "Cache",
    "--points",
    type=click.IntRange(min=2, max=1000),
    default=16,
    metavar="N",
    help="Budgets, from the smallest that works to every expert.",
)
@option("Cache", "--pack", is_flag=True, help="For experts from a record file; none is written.")
@cost_options
@option("Output", "-o", "--output", metavar="FILE", help="Draw the curve to a .png or .svg.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def curve_command(
    model: str | None,
    trace: str,
    policy: str,
    split: float | None,
    prefetch: str,
    device: str,
    prompt_tokens: int,
    points: int,
    pack: bool,
    output: str | None,
    as_json: bool,
    **costs: Any,
) -> None:
    """Plan for budgets from the smallest to every expert, and find where more stops to pay."""
    given = GivenCosts(**costs)
    kind = "" if output is None else os.path.splitext(output)[1].lower().removeprefix(".")
    if output is not None and kind not in ("png", "svg"):
        raise click.UsageError(f"--output draws .png and .svg, not {output!r}.")

    # Imported here, so that --help and wrong usage answer at once.
    from moerun import Trace
    from moerun.planning import Geometry, budget_curve, layer_curves
    from moerun.user_files import user_path
    from moerun.whole_file import replace_file
    from moerun_tools.output_file import check_target
    from moerun_tools.report import json_line

    target = None if output is None else user_path(output)
    geometry = Geometry.of_model(model, device, pack)
    cost_model = given.find(model, device, pack, len(geometry.moe_layers))
    with Trace.open(trace) as opened:
        if target is not None:
            check_target(target, [*opened.files, *([given.costs] if given.costs else [])])
        curves = layer_curves(opened, policy)
        assumed = given.assumed + assumed_guesses(opened, prefetch == "on")
        assumed += few_tokens(opened.num_tokens)
    curve = budget_curve(
        curves,
        cost_model,
        geometry,
        points=points,
        prefetch=prefetch == "on",
        split=split,
        prompt_tokens=prompt_tokens,
        here_bytes=None if given.other_machine else _room(model, device),
    )
    if target is not None:
        from moerun_tools.figures import draw
        from moerun_tools.figures.budget import budget_figure

        replace_file(target, draw(lambda: budget_figure(curve, geometry.total_bytes), kind))
    if as_json:
        write_out(
            json_line({**_facts(curve, assumed, geometry.total_bytes), **given.source(cost_model)})
        )
        return
    text = _table(curve, geometry.total_bytes) + advice(curve, geometry.total_bytes) + "\n"
    text += assumed_line(assumed) + given.source_line(cost_model)
    write_out(text + ("" if output is None else f"picture: {output}\n"))


def _room(model: str | None, device: str) -> int | None:
    """Return what there is room for on this machine; None where the model does not run."""
    from moerun import dry_run
    from moerun.errors import OutOfMemoryError

    try:
        return int(dry_run(model, device)["budget_bytes"])
    except OutOfMemoryError:
        return None


def advice(curve: BudgetCurve, total: int) -> str:
    """Return one or two sentences: what to set, and what more memory would bring."""
    from moerun_tools.plan_table import budget_text, milliseconds

    def time_of(point: BudgetPoint) -> str:
        return f"{milliseconds(point.plan.predicted.tpot_ms)} ms a token"

    first, knee, last = curve.points[0], curve.points[curve.knee], curve.points[-1]
    here = last if curve.here is None else curve.points[curve.here]
    if first.plan.predicted.tpot_ms <= last.plan.predicted.tpot_ms * (1 + 1e-6):
        return f"More memory saves no time: set --expert-budget {first.budget_bytes}."
    if here is last and curve.here is not None:
        text = f"Every expert fits here, there is nothing to set: {time_of(last)}."
        if curve.knee == 0:
            return f"{text} There is no knee, all memory pays alike."
        return (
            f"{text} Where memory is scarce, most is gained up to --expert-budget "
            f"{knee.budget_bytes}, {budget_text(knee.budget_bytes, total)}: {time_of(knee)}."
        )
    if curve.knee == 0 or here.budget_bytes < knee.budget_bytes:
        text = (
            f"Set as much as there is, --expert-budget {here.budget_bytes}"
            f"{'' if curve.here is None else ' on this machine'}: {time_of(here)}"
        )
        if here is last:
            return f"{text}. There is no knee, all memory pays alike."
        if curve.knee == 0:
            return f"{text}; {time_of(last)} with all of them. All memory pays alike."
        return (
            f"{text}. More memory pays: {time_of(knee)} with "
            f"{budget_text(knee.budget_bytes, total)}; beyond that it saves less."
        )
    return (
        f"Set --expert-budget {knee.budget_bytes}, {budget_text(knee.budget_bytes, total)}: "
        f"{time_of(knee)}, {milliseconds(last.plan.predicted.tpot_ms)} ms with all of them; "
        "beyond it, memory saves less time than up to there."
    )


def _facts(curve: BudgetCurve, assumed: list[str], total: int) -> dict[str, Any]:
    """Return what --json prints."""
    plan = curve.points[0].plan
    return {
        "model": plan.model,
        "policy": plan.policy,
        "prefetch": plan.prefetch,
        "total_expert_bytes": total,
        "knee": curve.knee,
        "here": curve.here,
        "points": [_point(each, total) for each in curve.points],
        "advice": advice(curve, total),
        "assumed": assumed,
    }


def _point(point: BudgetPoint, total: int) -> dict[str, Any]:
    return {
        "budget_bytes": point.budget_bytes,
        "random_hit_rate": point.budget_bytes / total,
        **point.plan.predicted.as_dict(),
        "uniform_tpot_ms": point.uniform_tpot_ms,
        "optimal_hit_rate": point.optimal_hit_rate,
        "optimal_tpot_ms": point.optimal_tpot_ms,
    }


def _mark_of(curve: BudgetCurve, index: int) -> str:
    marks = ["knee"] if index == curve.knee and index else []
    marks += ["this machine"] if index == curve.here else []
    return f"<- {', '.join(marks)}" if marks else ""


def _table(curve: BudgetCurve, total: int) -> str:
    from moerun_tools.plan_table import columns, milliseconds, percent
    from moerun_tools.units import as_binary, as_percent

    plan = curve.points[0].plan
    names = ("budget", "% of all", "hit rate", "TPOT", "uniform", "TTFT", "optimal hits", "TPOT")
    rows: list[tuple[str, ...]] = [
        (*names, ""),
        ("", "= chance", "%", "ms", "ms", "ms", "%", "ms", ""),
    ]
    for index, point in enumerate(curve.points):
        predicted = point.plan.predicted
        rows.append(
            (
                as_binary(point.budget_bytes),
                as_percent(point.budget_bytes, total),
                percent(predicted.hit_rate),
                milliseconds(predicted.tpot_ms),
                milliseconds(point.uniform_tpot_ms),
                milliseconds(predicted.ttft_ms),
                percent(point.optimal_hit_rate),
                milliseconds(point.optimal_tpot_ms),
                _mark_of(curve, index),
            )
        )
    heading = f"{plan.model}, {plan.policy}, prefetch {plan.prefetch}, predicted:\n"
    return heading + columns(rows)
