"""Figure of moe-plan: what a token and a prompt take against the memory for experts."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moerun.planning import BudgetCurve, BudgetPoint
from moerun_tools.figures.style import DOTTED, INK, LEGEND, MUTED, SERIES, SURFACE, WIDTH
from moerun_tools.metrics_results import clean_text
from moerun_tools.units import as_binary

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_OPTIMAL = (0, (4, 2))


def budget_figure(curve: BudgetCurve, total_bytes: int) -> Figure:
    """Draw time per output token, hit rate and time to first token by budget.

    The plan stands beside the uniform cache and the bound of a cache that knows the future; the
    knee and what this machine has room for are marked.
    """
    unit, size = next((each for each in _UNITS if total_bytes >= each[1]), ("B", 1))
    budgets = [point.budget_bytes / size for point in curve.points]
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    tokens, hits, prompts = figure.subplots(3, 1, sharex=True, height_ratios=(2.2, 1, 1))

    def draw(
        axes: Axes, value: Callable[[BudgetPoint], float], label: str, gid: str, **style: object
    ) -> None:
        values = [value(point) for point in curve.points]
        axes.plot(budgets, values, label=label, gid=gid, **style)  # type: ignore[arg-type]

    thin = {"linewidth": 1.3}
    plan_style = {"color": SERIES[0]}
    uniform_style = {"color": SERIES[1], "linestyle": (0, (3, 2)), **thin}
    optimal_style = {"color": MUTED, "linestyle": _OPTIMAL, **thin}
    draw(tokens, lambda p: p.plan.predicted.tpot_ms, "plan", "plan", **plan_style)
    draw(
        tokens,
        lambda p: p.uniform_tpot_ms,
        "uniform: equal bytes, whole experts",
        "uniform_tpot_ms",
        **uniform_style,
    )
    draw(
        tokens,
        lambda p: p.optimal_tpot_ms,
        "optimal: knows all that comes",
        "optimal_tpot_ms",
        **optimal_style,
    )
    draw(hits, lambda p: p.plan.predicted.hit_rate, "plan", "hit_rate", **plan_style)
    draw(hits, lambda p: p.optimal_hit_rate, "optimal", "optimal_hit_rate", **optimal_style)
    draw(
        hits,
        lambda p: min(1.0, p.budget_bytes / total_bytes),
        "chance",
        "random_hit_rate",
        color=MUTED,
        linestyle=DOTTED,
        linewidth=1,
    )
    draw(prompts, lambda p: 1e-3 * p.plan.predicted.ttft_ms, "plan", "ttft", **plan_style)

    if curve.knee:
        _mark(tokens, curve, curve.knee, size, "knee")
    if curve.here is not None and curve.here != curve.knee:
        _mark(tokens, curve, curve.here, size, "this machine", hollow=True)
    tokens.set_ylabel("ms a decoded token")
    hits.set_ylabel("hit rate (dotted: chance)")
    hits.yaxis.set_major_formatter(PercentFormatter(1))
    hits.set_ylim(0, 1.02)
    prompts.set_ylabel("TTFT (s)")
    prompts.set_xlabel(f"memory for experts ({unit})")
    prompts.set_xlim(0, budgets[-1] * 1.005)
    tokens.set_ylim(bottom=0)
    prompts.set_ylim(bottom=0)
    tokens.legend(loc="upper right", **LEGEND)
    plan = curve.points[0].plan
    length = plan.predicted.prompt_tokens
    tokens.set_title(f"What more memory brings: {clean_text(plan.model, 40)}, {plan.policy}")
    prompts.set_title(f"prompt of {length} tokens", fontsize=8.5, fontweight="normal", color=MUTED)
    return figure


def _mark(
    axes: Axes, curve: BudgetCurve, index: int, size: int, name: str, hollow: bool = False
) -> None:
    point = curve.points[index]
    at = (point.budget_bytes / size, point.plan.predicted.tpot_ms)
    axes.plot(
        *at,
        "o",
        color=SURFACE if hollow else SERIES[0],
        markeredgecolor=SERIES[0] if hollow else SURFACE,
        clip_on=False,
        markersize=8,
    )
    is_right = index > 0.7 * len(curve.points)
    axes.annotate(
        f"{name}: {as_binary(point.budget_bytes)}, {at[1]:.4g} ms",
        at,
        (-8 if is_right else 8, 20 if hollow else 8),
        textcoords="offset points",
        ha="right" if is_right else "left",
        color=INK,
        bbox={"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
