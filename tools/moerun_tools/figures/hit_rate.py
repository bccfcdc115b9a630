"""Figure of hit rates against the size of the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moerun_tools.figures.style import (
    DOTTED,
    INK,
    LEGEND,
    MOST_SERIES,
    MUTED,
    POLICY_COLOURS,
    SERIES,
    SURFACE,
    in_percent,
    new_figure,
)
from moerun_tools.metrics_results import TraceMetrics, clean_text
from moerun_tools.palette import LIGHT
from moerun_tools.units import as_binary, counted

_LEGEND = {
    "belady": "Belady: knows all that comes",
    "sch": "SCH: knows the next 16 tokens",
    "lfu": "LFU: the most used so far",
    "lru": "LRU: the last used",
    "static_hit_rate": "the most used, never replaced",
    "random_hit_rate": "chance: a random set, never replaced",
}
_LOG_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
_MOST_LINEAR = 20  # cache ratio up to which the axis is linear


def hit_rates(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw the hit rate of a cache for each layer: four policies of one trace, two of several."""
    if not results:
        return None
    figure, axes = new_figure(4.3)
    axes.set_ylim(0, 1.02)
    in_percent(axes)
    axes.set_ylabel("look-ups that find their expert in the cache")
    axes.set_xlabel(
        "cache ratio \N{GREEK SMALL LETTER RHO}: capacity of a layer's cache / "
        "experts that a token uses there"
    )
    most = max(result.facts.num_experts / result.facts.top_k for result in results)
    least = min(1 / result.facts.top_k for result in results)
    _ratio_axis(axes, max(0.25, 0.9 * least), most)
    if len(results) == 1:
        _draw_policies(axes, results[0])
    else:
        _draw_traces(axes, results)
    return figure


def _ratio_axis(axes: Axes, least: float, most: float) -> None:
    if most <= _MOST_LINEAR:
        axes.set_xlim(0, most * 1.005)
        return
    axes.set_xscale("log", base=2)
    ticks = [2.0**power for power in range(-2, math.ceil(math.log2(most)) + 1) if 2**power <= most]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(least, most * 1.02)


def _draw_policies(axes: Axes, result: TraceMetrics) -> None:
    """Draw all policies of one trace, what chance finds, and the knee if a cache is advised."""
    verdict, facts = result.verdict, result.facts
    for policy in ("belady", "lfu", "lru", "sch"):
        frame = result.hit_rates(policy)
        colour = POLICY_COLOURS[policy]
        x = frame["cache_ratio"].to_numpy()
        known = frame.drop_nulls(["ci_low", "ci_high"])
        if len(known) > 0:
            axes.fill_between(
                known["cache_ratio"],
                known["ci_low"],
                known["ci_high"],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
        style = (0, (4, 2)) if policy == "belady" else "-"
        axes.plot(x, frame["hit_rate"], color=colour, linestyle=style, gid=policy)
    for column in ("static_hit_rate", "random_hit_rate"):
        frame = result.hit_rates("lru")
        axes.plot(
            [0.0, *frame["cache_ratio"]],
            [0.0, *frame[column]],
            color=LIGHT["green"] if column == "static_hit_rate" else MUTED,
            linewidth=1.4,
            linestyle=DOTTED,
            gid=column,
        )
    _name_policies(axes)
    if verdict is not None and verdict.advice == "cache":
        at = verdict.capacity / facts.top_k
        axes.plot([at, at], [0, verdict.sch_hit_rate], color=INK, linewidth=1, linestyle=":")
        axes.plot(at, verdict.sch_hit_rate, "o", color=LIGHT["blue"], markeredgecolor=SURFACE, ms=8)
        is_right = axes.transAxes.inverted().transform(axes.transData.transform((at, 0)))[0] > 0.6
        axes.annotate(
            f"knee of SCH: {counted(verdict.capacity, 'expert')} a layer,\n"
            f"\N{GREEK SMALL LETTER RHO} = {at:.3g}, {verdict.sch_hit_rate:.0%} found",
            (at, 0.36),
            (-6 if is_right else 6, 0),
            textcoords="offset points",
            ha="right" if is_right else "left",
            color=INK,
            bbox={"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    _capacity_axis(axes, result)
    axes.set_title("Hit rate of one cache for each layer, by its size and policy")


def _name_policies(axes: Axes) -> None:
    """Name the lines where no line can be: all curves rise to the upper right."""
    lines = {line.get_gid(): line for line in axes.get_lines()}
    axes.legend(
        [lines[policy] for policy in _LEGEND],
        list(_LEGEND.values()),
        loc="lower right",
        **LEGEND,
    )


def _capacity_axis(axes: Axes, result: TraceMetrics) -> None:
    """Say along the upper edge what share of the experts that is, or what memory it takes."""
    facts = result.facts
    most = facts.num_experts / facts.top_k
    top = axes.secondary_xaxis("top")
    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0)
    if axes.get_xscale() == "log":
        shares = tuple(share for share in _LOG_SHARES if share * most >= axes.get_xlim()[0])
    total = facts.total_bytes
    labels = [f"{100 * share:.3g}%" for share in shares]
    name = "share of the layer's experts in the cache"
    if total:
        labels = [
            f"{label}\n{as_binary(share * total)}"
            for label, share in zip(labels, shares, strict=True)
        ]
        name = "share of the experts in the cache, and the bytes of all layers' caches"
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xticks([share * most for share in shares], labels, fontsize=8)
    top.set_xlabel(name, fontsize=8, color=MUTED)


def _draw_traces(axes: Axes, results: Sequence[TraceMetrics]) -> None:
    """Draw SCH and LRU of several traces."""
    lines = []
    for most in sorted({result.facts.num_experts / result.facts.top_k for result in results}):
        shares = np.linspace(0, 1, 65)  # a line is not straight on a logarithmic axis
        axes.plot(most * shares, shares, color=MUTED, linewidth=1, linestyle=DOTTED)
    for row, result in reversed(list(enumerate(results))):
        colour = SERIES[row] if row < MOST_SERIES else MUTED
        for policy, style in (("lru", (0, (3, 2))), ("sch", "-")):
            frame = result.hit_rates(policy)
            (line,) = axes.plot(
                frame["cache_ratio"],
                frame["hit_rate"],
                color=colour,
                linestyle=style,
                linewidth=2 if policy == "sch" else 1.3,
            )
        lines.append((line, clean_text(result.label, 30)))
        verdict = result.verdict
        if verdict is not None and verdict.advice == "cache":
            axes.plot(
                verdict.capacity / result.facts.top_k,
                verdict.sch_hit_rate,
                "o",
                color=colour,
                markeredgecolor=SURFACE,
                markersize=8,
            )
    axes.legend(
        *zip(*lines[::-1], strict=True),
        loc="lower right",
        **LEGEND,
    )
    axes.set_title("Hit rate by size: SCH (solid, knee marked), LRU (dashed), chance (dotted)")
