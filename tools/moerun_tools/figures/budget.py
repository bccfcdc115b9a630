"""Figure of moe-plan: the time of a token against the memory for experts."""

from __future__ import annotations

from matplotlib.figure import Figure

from moerun.planning import BudgetCurve
from moerun_tools.figures.style import INK, LEGEND, MUTED, SERIES, SURFACE, new_figure
from moerun_tools.metrics_results import clean_text
from moerun_tools.units import as_binary

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def budget_figure(curve: BudgetCurve, total_bytes: int) -> Figure:
    """Draw time per output token by budget: the plan, the uniform cache, the optimal bound."""
    figure, axes = new_figure(4.0)
    unit, size = next((each for each in _UNITS if total_bytes >= each[1]), ("B", 1))
    budgets = [point.budget_bytes / size for point in curve.points]
    planned = [point.plan.predicted.tpot_ms for point in curve.points]
    lines = (
        ("uniform: equal bytes, whole experts", "uniform_tpot_ms", SERIES[1], (0, (3, 2))),
        ("optimal: knows all that comes", "optimal_tpot_ms", MUTED, (0, (4, 2))),
    )
    axes.plot(budgets, planned, color=SERIES[0], label="plan", gid="plan")
    for label, name, colour, style in lines:
        values = [getattr(point, name) for point in curve.points]
        axes.plot(
            budgets, values, color=colour, linestyle=style, linewidth=1.3, label=label, gid=name
        )
    if curve.knee:
        at = (budgets[curve.knee], planned[curve.knee])
        axes.plot(*at, "o", color=SERIES[0], markeredgecolor=SURFACE, markersize=8)
        axes.annotate(
            f"knee: {as_binary(curve.points[curve.knee].budget_bytes)}, {at[1]:.4g} ms",
            at,
            (8, 8),
            textcoords="offset points",
            color=INK,
            bbox={"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, budgets[-1] * 1.005)
    axes.set_xlabel(f"memory for experts ({unit})")
    axes.set_ylabel("milliseconds a decoded token, predicted")
    axes.legend(loc="upper right", **LEGEND)
    plan = curve.points[0].plan
    axes.set_title(f"What more memory brings: {clean_text(plan.model, 40)}, {plan.policy}")
    return figure
