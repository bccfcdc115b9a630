"""Figure of what experts specialise in: domains and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moerun_tools.figures.style import (
    DOTTED,
    MOST_PANELS,
    WIDTH,
    in_percent,
    label_ends,
    layer_line,
    layers_axis,
)
from moerun_tools.metrics_results import VOCABULARIES, TraceMetrics, clean_text
from moerun_tools.palette import LIGHT

_COLOURS = dict(zip(VOCABULARIES, (LIGHT["blue"], LIGHT["orange"], LIGHT["green"]), strict=True))
_TITLES = {
    "domain": "Specialisation in domains",
    "vocabulary": "Specialisation in tokens",
}


def specialization(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw both kinds of specialisation by layer; a row a trace, kinds without scores left out."""
    domain = [result for result in results if len(result.specialization("domain_variation")) > 0]
    vocabulary = [result for result in results if _vocabularies(result)]
    drawn = [result for result in results if result in domain or result in vocabulary]
    drawn = drawn[:MOST_PANELS]
    if not drawn:
        return None
    kinds = [kind for kind, there in (("domain", domain), ("vocabulary", vocabulary)) if there]
    rows = len(drawn)
    height = 3.6 if rows == 1 else 0.5 + 2.3 * rows
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, len(kinds), sharey="col", squeeze=False)
    for line, result in zip(grid, drawn, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            layers_axis(axes, result.facts.moe_layers, most_ticks=8)
            if kind == "domain":
                _draw_domain(axes, result)
            else:
                _draw_vocabulary(axes, result)
        if rows > 1:
            line[0].annotate(
                clean_text(result.label, 40),
                (0, 1),
                (0, 5),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=9,
            )
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(_TITLES[kind], pad=20 if rows > 1 else 10)
    return figure


def _vocabularies(result: TraceMetrics) -> list[str]:
    return [score for score in VOCABULARIES if len(result.specialization(score)) > 0]


def _draw_domain(axes: Axes, result: TraceMetrics) -> None:
    score = pl.col("domain_variation")
    frame = result.specialization("domain_variation")
    by_layer = frame.group_by("layer").agg(
        *(score.quantile(q, "linear").alias(f"q{q}") for q in (0.1, 0.25, 0.5, 0.75, 0.9))
    )
    by_layer = by_layer.sort("layer")
    x = by_layer["layer"]
    if len(by_layer) == 0:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        return
    colour = LIGHT["blue"]
    axes.fill_between(x, by_layer["q0.1"], by_layer["q0.9"], color=colour, alpha=0.14, linewidth=0)
    axes.fill_between(
        x, by_layer["q0.25"], by_layer["q0.75"], color=colour, alpha=0.24, linewidth=0
    )
    layer_line(axes, by_layer, "q0.5", colour)
    _draw_chance(axes, result, "domain_variation", colour)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("variation over domains (std / mean)")


def _draw_vocabulary(axes: Axes, result: TraceMetrics) -> None:
    labels = []
    for score in _vocabularies(result):
        frame = result.specialization(score).group_by("layer").agg(pl.col(score).median())
        frame = frame.sort("layer")
        layer_line(axes, frame, score, _COLOURS[score])
        _draw_chance(axes, result, score, _COLOURS[score])
        labels.append((VOCABULARIES[score], frame[score][-1], _COLOURS[score]))
    axes.set_ylim(0, 1)
    in_percent(axes)
    axes.set_ylabel("share of its tokens' uses")
    if labels:
        label_ends(axes, labels)


def _draw_chance(axes: Axes, result: TraceMetrics, score: str, colour: str) -> None:
    """Draw the median that independent tokens would have, by layer."""
    column = f"{score}_chance"
    frame = result.specialization(column).group_by("layer").agg(pl.col(column).median())
    frame = frame.sort("layer")
    axes.plot(frame["layer"], frame[column], color=colour, linewidth=1, linestyle=DOTTED)
