"""Heat maps with a column for each layer and a row for each of its experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from moerun_tools.figures.style import DOTTED, MOST_PANELS, WIDTH
from moerun_tools.metrics_results import TraceMetrics, clean_text
from moerun_tools.palette import LIGHT

# Less than the even share is blue, more is orange; equal lightness on both sides of the middle.
_NEVER_USED = "#9aa3ab"
_DIVERGING = LinearSegmentedColormap.from_list(
    "usage", ["#083d66", "#2f86bd", "#a9cfe6", "#f4f2ee", "#f3bd92", "#d86a1a", "#7c3300"]
).with_extremes(bad=_NEVER_USED)
_RISING = LinearSegmentedColormap.from_list(
    "rising", ["#f1f5f8", "#bcdcee", "#74b4dc", "#2f86bd", "#0f5791", "#062f57"]
).with_extremes(bad=_NEVER_USED)
_SPREAD = 3.0  # powers of two below the even share that the colours show


def activation_map(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw how often each expert is used, against the even share."""
    drawn = list(results[:MOST_PANELS])
    if not drawn:
        return None
    grids = [_usage(result) for result in drawn]
    limit = max([1.0, *(float(np.nanmax(abs(grid))) for grid in grids)])
    figure, images = _maps(
        drawn,
        grids,
        _DIVERGING,
        Normalize(-limit, limit),
        "How much each expert is used, most used first (grey: never)",
    )
    bar = figure.colorbar(images[0], ax=figure.axes, shrink=0.75, pad=0.02)
    powers = np.arange(-int(limit), int(limit) + 1)
    names = [f"{2**power} x" if power >= 0 else f"1/{2**-power} x" for power in powers.tolist()]
    if limit == _SPREAD:
        names[0] += "\nor less"
    bar.set_ticks(powers.tolist(), labels=names)
    _quiet(bar, "activation rate / even share k/E")
    return figure


def srp_map(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw the SRP of each expert, in the order of the activation map."""
    drawn = [result for result in results if result.segment_lengths][:MOST_PANELS]
    if not drawn:
        return None
    grids = [_srp_in_order_of_use(result) for result in drawn]
    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    low = math.floor(10 * values.min()) / 10
    length = drawn[0].reference_length
    figure, images = _maps(
        drawn,
        grids,
        _RISING,
        Normalize(low, max(values.max(), low + 0.1)),
        f"SRP at m = {length} of each expert, most used first (grey: never used)",
    )
    bar = figure.colorbar(images[0], ax=figure.axes, shrink=0.75, pad=0.02)
    _quiet(bar, f"SRP of the expert, m = {length}; dotted: by chance (median)")
    for result in drawn:
        chance = result.srp("expert", result.reference_length)["srp_chance"].median()
        if isinstance(chance, float) and chance >= low:
            bar.ax.axhline(chance, color=LIGHT["muted"], linewidth=1.2, linestyle=DOTTED)
    return figure


def _usage(result: TraceMetrics) -> NDArray[np.float64]:
    """Return use against the even share as a power of two (E, L), NaN where it is never used.

    Each layer goes from most to least used.
    """
    rates = _grid(result.activation_rates(), "activation_rate", result)
    usage = -np.sort(-rates, axis=0) / result.facts.even_share
    powers = np.log2(np.maximum(usage, 2.0**-_SPREAD))
    return np.where(usage > 0, powers, np.nan)


def _srp_in_order_of_use(result: TraceMetrics) -> NDArray[np.float64]:
    """Return SRP (E, L), the experts of each layer from most to least used."""
    rates = _grid(result.activation_rates(), "activation_rate", result)
    srp = _grid(result.srp("expert", result.reference_length), "srp", result)
    srp[rates <= 0] = np.nan
    return np.take_along_axis(srp, np.argsort(-rates, axis=0, kind="stable"), axis=0)


def _grid(frame: pl.DataFrame, column: str, result: TraceMetrics) -> NDArray[np.float64]:
    """Return a column as an array (E, L)."""
    values = frame.sort("layer", "expert")[column].cast(pl.Float64).to_numpy()
    return np.array(values.reshape(len(result.facts.moe_layers), -1).T, dtype=np.float64)


def _maps(
    results: Sequence[TraceMetrics],
    grids: Sequence[NDArray[np.float64]],
    colours: Colormap,
    norm: Normalize,
    title: str,
) -> tuple[Figure, list[AxesImage]]:
    columns = 1 if len(results) == 1 else 2
    rows = -(-len(results) // columns)
    height = 4.2 if rows == 1 else 0.6 + 2.9 * rows
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    images = []
    for axes, result, grid in zip(all_axes, results, grids, strict=False):
        images.append(
            axes.imshow(grid, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        )
        _name_axes(axes, result)
        if columns > 1:
            axes.set_title(clean_text(result.label, 40), fontsize=9, fontweight="normal", pad=6)
    for axes in all_axes[len(results) :]:
        axes.remove()
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    return figure, images


def _name_axes(axes: Axes, result: TraceMetrics) -> None:
    layers, num_experts = result.facts.moe_layers, result.facts.num_experts
    step = -(-len(layers) // 16)
    axes.xaxis.set_major_locator(FixedLocator(list(range(0, len(layers), step))))
    axes.set_xticklabels([str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    ticks = sorted({0, num_experts // 4, num_experts // 2, 3 * num_experts // 4, num_experts - 1})
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.set_yticklabels([str(tick + 1) for tick in ticks])
    axes.set_ylabel("experts by use (1 = most used)")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _quiet(bar: object, label: str) -> None:
    from matplotlib.colorbar import Colorbar

    assert isinstance(bar, Colorbar)
    bar.set_label(label, color=LIGHT["muted"], fontsize=8.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
