"""The picture of bench_plans.py: what was predicted of the plans, and what came."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moerun_tools.figures.style import INK, SERIES, SURFACE, WIDTH, in_percent


def plans_figure(result: dict[str, Any]) -> Figure:
    """Draw time per output token and hit rate over the budget, a line for each cache."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    total = result["total_expert_bytes"]
    for axes, value in ((left, "tpot_ms"), (right, "hit_rate")):
        for index, cache in enumerate(dict.fromkeys(row["cache"] for row in result["rows"])):
            rows = sorted(
                (row for row in result["rows"] if row["cache"] == cache),
                key=lambda row: row["budget_bytes"],
            )
            shares = [100 * row["budget_bytes"] / total for row in rows]
            draw_cache(axes, shares, rows, value, SERIES[index % len(SERIES)])
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 100)
        axes.set_xlabel("memory for experts (% of all)")
    right.set_ylim(0, 1)
    in_percent(right)
    left.set_ylabel("milliseconds a decoded token")
    right.set_ylabel("experts with something in a slot")
    left.set_title("Time per token")
    right.set_title("Hit rate")
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK
    )
    return figure


def draw_cache(
    axes: Axes, shares: list[float], rows: list[dict[str, Any]], value: str, colour: str
) -> None:
    """Draw what was measured; of a plan also what was predicted."""
    measured = [row[value] for row in rows]
    is_plan = rows[0]["predicted"] is not None
    style: dict[str, Any] = {"color": colour, "markeredgecolor": SURFACE}
    axes.plot(
        shares,
        measured,
        "o-",
        linewidth=2.0 if is_plan else 1.2,
        markersize=6 if is_plan else 4,
        label=rows[0]["cache"] + (", measured" if is_plan else ""),
        zorder=3 if is_plan else 2,
        clip_on=False,
        **style,
    )
    if is_plan:
        predicted = [row["predicted"][value] for row in rows]
        axes.plot(
            shares,
            predicted,
            "D",
            linestyle=(0, (3, 2)),
            color=colour,
            markerfacecolor=SURFACE,
            markeredgecolor=colour,
            markersize=5,
            linewidth=1.2,
            label=f"{rows[0]['cache']}, predicted",
            zorder=4,
        )
