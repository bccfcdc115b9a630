"""Figures of load balance inside windows, and of how well routing can be predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moerun.metrics import independent_variation
from moerun_tools.figures.style import (
    DOTTED,
    GRID,
    MOST_PANELS,
    MOST_SERIES,
    MUTED,
    SERIES,
    SURFACE,
    in_percent,
    label_ends,
    layer_line,
    layers_axis,
    lengths_axis,
    new_figure,
    panels,
)
from moerun_tools.metrics_results import PREDICTORS, TraceMetrics, clean_text
from moerun_tools.palette import LIGHT

_PREDICTOR_COLOURS = dict(
    zip(PREDICTORS, (LIGHT["blue"], LIGHT["orange"], LIGHT["green"]), strict=True)
)


def load_balance(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw how unevenly experts are used inside windows, by segment length."""
    drawn = [result for result in results if len(result.load_balance("model")) > 0]
    if not drawn:
        return None
    figure, axes = new_figure()
    lengths = sorted(
        {m for result in drawn for m in result.load_balance("model")["segment_length"]}
    )
    lengths_axis(axes, lengths)
    labels = _draw_layers(axes, drawn[0]) if len(drawn) == 1 else []
    for row, result in reversed(list(enumerate(drawn))):
        colour = SERIES[row] if row < MOST_SERIES else MUTED
        frame = result.load_balance("model")
        axes.plot(
            frame["segment_length"],
            frame["variation"],
            "o-",
            color=colour,
            markeredgecolor=SURFACE,
        )
        name = "mean of layers" if len(drawn) == 1 else clean_text(result.label, 24)
        labels.append((name, frame["variation"][-1], colour))
    axes.set_ylim(bottom=0)
    x = np.geomspace(lengths[0], lengths[-1], 50)
    for row, result in enumerate(drawn):
        colour = MUTED if len(drawn) == 1 or row >= MOST_SERIES else SERIES[row]
        y = np.array([independent_variation(result.facts.even_share, m) for m in x])
        axes.plot(x, y, color=colour, linewidth=1, linestyle=DOTTED)
        if len(drawn) == 1:
            labels.append(("by chance", float(y[-1]), MUTED))
    label_ends(axes, labels)
    axes.set_ylabel("std / mean of the experts' use")
    axes.set_title("Load balance: how unevenly a window uses the experts; dotted: by chance")
    return figure


def _draw_layers(axes: Axes, result: TraceMetrics) -> list[tuple[str, float, str]]:
    """Draw the layers of a trace in grey; return labels for the least and the most even one."""
    rows = result.load_balance("layer")
    ends: list[tuple[float, int]] = []
    for layer in result.facts.moe_layers:
        of_layer = rows.filter(rows["layer"] == layer)
        axes.plot(of_layer["segment_length"], of_layer["variation"], color=GRID, linewidth=1.2)
        ends.append((of_layer["variation"][-1], layer))
    if len(ends) < 3:
        return []
    return [(f"layer {layer}", value, MUTED) for value, layer in (min(ends), max(ends))]


def predictability(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw the recall of simple predictors by layer, a panel a trace."""
    drawn = list(results[:MOST_PANELS])
    if not drawn:
        return None
    title = "Share of a layer's experts that a simple guess names beforehand"
    figure, all_axes = panels([clean_text(result.label, 40) for result in drawn], title)
    highest = 0.0
    for axes, result in zip(all_axes, drawn, strict=True):
        layers_axis(axes, result.facts.moe_layers)
        for predictor, colour in _PREDICTOR_COLOURS.items():
            frame = result.predictability(predictor)
            highest = max([highest, *frame["recall"]])
            layer_line(axes, frame, "recall", colour)
        axes.axhline(result.facts.even_share, color=MUTED, linewidth=1, linestyle=DOTTED)
        in_percent(axes)
    for axes, result in zip(all_axes, drawn, strict=True):
        axes.set_ylim(0, min(1.0, highest * 1.1 + 0.02))
        labels = [
            (PREDICTORS[predictor], result.predictability(predictor)["recall"][-1], colour)
            for predictor, colour in _PREDICTOR_COLOURS.items()
            if len(result.predictability(predictor)) > 0
        ]
        label_ends(axes, [*labels, ("chance", result.facts.even_share, MUTED)])
    for axes in all_axes[::2]:
        axes.set_ylabel("recall")
    return figure
