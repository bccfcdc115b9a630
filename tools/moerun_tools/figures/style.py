"""How all figures look: colours, type, and the few helpers that they share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # a broken setting of the user must not stop the import

import matplotlib
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from moerun_tools.palette import LIGHT

INK, MUTED, GRID, SURFACE = (LIGHT[name] for name in ("ink", "muted", "grid", "surface"))
POLICY_COLOURS = {
    "sch": LIGHT["blue"],
    "lru": LIGHT["orange"],
    "lfu": LIGHT["purple"],
    "belady": MUTED,
}
SERIES = [LIGHT[name] for name in ("blue", "orange", "green", "purple", "ochre", "sky")]
MOST_SERIES = len(SERIES)  # traces with a colour of their own in one picture
MOST_PANELS = 6  # small multiples in one picture

DOTTED = (0, (1, 2))  # of what chance gives
_LABEL_HEIGHT = 0.15  # inches
WIDTH = 7.2  # inches: at the width of the report the text is as large as the text around it

# Of a legend inside the axes, where no line should be.
LEGEND: dict[str, Any] = {
    "labelcolor": "linecolor",
    "fontsize": 8.5,
    "facecolor": SURFACE,
    "framealpha": 0.85,
    "edgecolor": "none",
}

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names come from files; a $ in one is a dollar
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": SURFACE,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched and copied
    "svg.hashsalt": "moerun",  # the same picture is the same file
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw in the style of this module, whatever the user's own settings are."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(), warnings.catch_warnings():
            # A font without some character of a domain's name is no news for the user.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            yield
    finally:
        logger.setLevel(level)


def new_figure(height: float = 3.7, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def panels(titles: Sequence[str], title: str, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """Return a figure with small multiples in one or two columns, with the same y axis.

    A single panel bears `title` itself; several stand under it, each with its own name.
    """
    if len(titles) == 1:
        figure, axes = new_figure(max(height, 3.5))
        axes.set_title(title)
        return figure, [axes]
    columns = 2
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + height * rows), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    all_axes: list[Axes] = list(grid.flat)
    for axes, name in zip(all_axes, titles, strict=False):
        axes.set_title(name, fontsize=9, fontweight="normal", pad=6)
    for axes in all_axes[len(titles) :]:
        axes.set_visible(False)
    return figure, all_axes[: len(titles)]


def ramp(index: int, count: int) -> str:
    """Return a colour for entry `index` of `count` that have an order, pale to strong."""
    step = 5 if count < 2 else round(index * 5 / (count - 1))
    return LIGHT[f"ramp-{step + 1}"]


def in_percent(axes: Axes) -> None:
    """Label the y axis, which holds shares from 0 to 1, in percent."""
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def lengths_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Make x a logarithmic axis with a tick at each segment length."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("segment length m (tokens)")
    axes.set_xlim(min(lengths) / 1.3, max(lengths) * 1.3)


def layers_axis(axes: Axes, layers: Sequence[int], most_ticks: int = 16) -> None:
    """Label the x axis with layer numbers, not more than fit."""
    step = -(-len(layers) // most_ticks)
    axes.xaxis.set_major_locator(FixedLocator(list(layers[::step])))
    axes.set_xlabel("layer")
    axes.grid(visible=False, axis="x")
    margin = 0.5 if len(layers) == 1 else 0.02 * (layers[-1] - layers[0])
    axes.set_xlim(layers[0] - margin, layers[-1] + margin)


def layer_line(axes: Axes, frame: pl.DataFrame, column: str, colour: str) -> None:
    """Draw a column by layer, with a dot for each layer while they are few."""
    axes.plot(
        frame["layer"],
        frame[column],
        "o-" if len(frame) <= 20 else "-",
        color=colour,
        markersize=4.5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.6,
    )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return positions at least `gap` apart, in the order of `values` and as near as can be.

    Minimises the squared distances: without the gaps it is isotonic regression, by pooling.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    pools: list[tuple[float, int]] = []  # mean, members
    for rank, index in enumerate(order):
        mean, members = values[index] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean = (before * others + mean * members) / (others + members)
            members += others
        pools.append((mean, members))
    places = [mean for mean, members in pools for _ in range(members)]
    result = [0.0] * len(values)
    for rank, (index, place) in enumerate(zip(order, places, strict=True)):
        result[index] = place + rank * gap
    return result


def label_ends(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Write (text, y, colour) to the right of the axes, none over another.

    The limits of the y axis must be what they will be: distances depend on them.
    """
    low, high = axes.get_ylim()
    gap = (high - low) * _LABEL_HEIGHT / max(_height_of(axes), 0.5)
    places = spread([y for _, y, _ in labels], gap)
    for (text, _, colour), place in zip(labels, places, strict=True):
        axes.annotate(
            text,
            xy=(1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
        )


def _height_of(axes: Axes) -> float:
    """Return about how many inches high axes will be: titles and ticks take an inch."""
    grid = axes.get_gridspec()
    rows = 1 if grid is None else grid.nrows
    figure = axes.figure
    assert isinstance(figure, Figure)
    return float(figure.get_size_inches()[1]) / rows - 1.0
