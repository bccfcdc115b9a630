"""Figures of segment routing best performance: by segment length, by layer, by domain."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moerun_tools.figures.style import (
    DOTTED,
    GRID,
    INK,
    MOST_PANELS,
    MOST_SERIES,
    MUTED,
    SERIES,
    SURFACE,
    WIDTH,
    label_ends,
    layer_line,
    layers_axis,
    lengths_axis,
    new_figure,
    panels,
    ramp,
    spread,
)
from moerun_tools.metrics_published import GROUP_LENGTH, GROUPS, PUBLISHED
from moerun_tools.metrics_results import TraceMetrics, clean_text
from moerun_tools.palette import LIGHT

MOST_DOMAINS = 16  # of one trace; the highest and the lowest are shown when there are more


def standing(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw where the traces stand between the groups and the models of the study."""
    known = [(result, result.verdict) for result in results if result.verdict is not None]
    if not known:
        return None
    height = 1.9 + 0.4 * len(known)
    figure, axes = new_figure(height)
    values = [value for _, verdict in known for value in (verdict.srp, verdict.srp_chance)]
    values += [model.srp for model in PUBLISHED]
    low, high = min(0.27, min(values) - 0.03), max(0.58, max(values) + 0.03)
    rows = len(known)
    axes.set(xlim=(low, high), ylim=(-1.5, rows + 0.35))
    _draw_zones(axes, low, high, rows)
    _draw_published(axes, low, high)
    for row, (result, verdict) in enumerate(known):
        colour = SERIES[row] if row < MOST_SERIES else MUTED
        y = rows - 0.75 - row
        _draw_gain(axes, verdict.srp_chance, verdict.srp, y, colour)
        if verdict.srp_ci_low is not None and verdict.srp_ci_high is not None:
            axes.plot([verdict.srp_ci_low, verdict.srp_ci_high], [y, y], color=colour)
        axes.plot(verdict.srp, y, "o", color=colour, markersize=8, markeredgecolor=SURFACE)
        is_right = verdict.srp > (low + high) / 2
        axes.annotate(
            f"{clean_text(result.name(len(results)), 60)}  {verdict.srp:.3f}",
            (verdict.srp if is_right else min(verdict.srp, verdict.srp_chance), y),
            xytext=(4 if is_right else -4, 6),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="bottom",
            fontweight="bold",
            color=INK,
        )
    axes.set_xlabel(f"SRP at {GROUP_LENGTH} tokens")
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(
        f"SRP at {GROUP_LENGTH} tokens, dotted from chance; grey: models of arXiv 2505.16056"
    )
    return figure


def _draw_gain(axes: Axes, chance: float, value: float, y: float, colour: str) -> None:
    """Draw a dotted line from what chance gives to what was measured."""
    axes.plot([chance, value], [y, y], color=colour, linewidth=1.2, linestyle=DOTTED)
    axes.plot(chance, y, "|", color=colour, markersize=7)


def _draw_published(axes: Axes, low: float, high: float) -> None:
    """Draw the models of the study as grey dots, their names above and below in turns."""
    for models, is_above in ((PUBLISHED[::2], False), (PUBLISHED[1::2], True)):
        places = spread([model.srp for model in models], 0.125 * (high - low))
        for model, place in zip(models, places, strict=True):
            axes.plot(model.srp, -0.7, "o", color=MUTED, markersize=5)
            axes.annotate(
                model.name,
                (place, -0.7),
                xytext=(0, 6 if is_above else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if is_above else "top",
                fontsize=7.5,
                color=MUTED,
            )


def _draw_zones(axes: Axes, low: float, high: float, top: float) -> None:
    """Shade the groups of the study and name them along the upper edge."""
    upper = high
    for number, group in enumerate(GROUPS, start=1):
        lower = max(group.lowest, low)
        if lower >= upper:
            continue
        axes.axvspan(lower, upper, color=LIGHT[f"zone-{number}"], linewidth=0)
        axes.text(
            (lower + upper) / 2, top + 0.08, group.label, ha="center", color=MUTED, fontsize=8
        )
        upper = lower


def srp_by_length(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw SRP of the whole model against the segment length, a line a trace."""
    drawn = [result for result in results if result.segment_lengths]
    if not drawn:
        return None
    figure, axes = new_figure()
    lengths = sorted({m for result in drawn for m in result.segment_lengths})
    lengths_axis(axes, lengths)
    frames = [result.srp("model") for result in drawn]
    values = [value for frame in frames for value in _extent(frame)]
    has_groups = lengths[0] <= GROUP_LENGTH <= lengths[-1]
    marks = [0.3, 0.55] if has_groups else []
    values += [value for frame in frames for value in frame["srp_chance"]]
    low = max(0.0, min([*values, *marks]) - 0.04)
    axes.set_ylim(low, max([*values, *marks]) + 0.06)
    if has_groups:
        _draw_groups_at_16(axes, frames)
    labels = []
    for row, (result, frame) in reversed(list(enumerate(zip(drawn, frames, strict=True)))):
        colour = SERIES[row] if row < MOST_SERIES else MUTED
        _draw_interval(axes, frame, "segment_length", colour)
        x, y = frame["segment_length"], frame["srp"]
        axes.plot(x, y, "o-", color=colour, markeredgecolor=SURFACE)
        axes.plot(
            x,
            frame["srp_chance"],
            color=colour,
            linewidth=1.2,
            linestyle=DOTTED,
            gid=f"chance-{row}",
        )
        labels.append((clean_text(result.label, 24), y[-1], colour))
        if len(drawn) == 1:
            labels = [
                ("measured", y[-1], colour),
                ("by chance", frame["srp_chance"][-1], colour),
            ]
            for a, b in zip(x, y, strict=True):
                axes.annotate(
                    f"{b:.3f}", (a, b), (0, 9), textcoords="offset points", ha="center", color=INK
                )
    label_ends(axes, labels)
    axes.set_ylabel("SRP of the whole model")
    axes.set_title("Segment routing best performance by segment length; dotted: by chance")
    return figure


def _draw_groups_at_16(axes: Axes, frames: Sequence[pl.DataFrame]) -> None:
    """Shade the groups where they are defined, at 16 tokens, and name them.

    Lines fall from left to right: names below them stand to the left, the others to the right.
    """
    low, high = axes.get_ylim()
    at_16 = [
        value
        for frame in frames
        for value in frame.filter(pl.col("segment_length") == GROUP_LENGTH)["srp_chance"]
    ]
    lowest = min(at_16, default=0.0)
    left, right = GROUP_LENGTH / 1.22, GROUP_LENGTH * 1.22
    upper = high
    for number, group in enumerate(GROUPS, start=1):
        lower = max(group.lowest, low)
        if lower >= upper:
            continue
        axes.fill_between(
            [left, right], lower, upper, color=LIGHT[f"zone-{number}"], linewidth=0, zorder=0.5
        )
        middle = (lower + upper) / 2
        is_below = middle < lowest
        axes.annotate(
            group.label,
            (left if is_below else right, middle),
            (-5 if is_below else 5, 0),
            textcoords="offset points",
            va="center",
            ha="right" if is_below else "left",
            fontsize=7.5,
            color=MUTED,
        )
        upper = lower


def srp_by_layer(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw SRP by layer, a line a segment length, a panel a trace."""
    drawn = [result for result in results if result.segment_lengths][:MOST_PANELS]
    if not drawn:
        return None
    title = "SRP by layer, one line for each segment length m; dotted: by chance"
    figure, all_axes = panels([clean_text(result.label, 40) for result in drawn], title)
    values = [value for result in drawn for value in _extent(result.srp("layer"))]
    values += [value for result in drawn for value in result.srp("layer")["srp_chance"]]
    span = max(values) - min(values) or 0.1
    for axes, result in zip(all_axes, drawn, strict=True):
        axes.set_ylim(max(0, min(values) - 0.08 * span), min(1, max(values) + 0.08 * span))
        layers_axis(axes, result.facts.moe_layers)
        lengths = result.segment_lengths
        labels = []
        for number, length in enumerate(lengths):
            frame = result.srp("layer", length)
            colour = ramp(number, len(lengths))
            if length == result.reference_length:
                _draw_interval(axes, frame, "layer", colour)
            layer_line(axes, frame, "srp", colour)
            axes.plot(
                frame["layer"],
                frame["srp_chance"],
                color=colour,
                linewidth=1,
                linestyle=DOTTED,
            )
            labels.append((f"m = {length}", frame["srp"][-1], colour))
        label_ends(axes, labels)
    for axes in all_axes[::2]:
        axes.set_ylabel("SRP of the layer")
    return figure


def srp_by_domain(results: Sequence[TraceMetrics]) -> Figure | None:
    """Draw SRP of each domain, a dot a segment length, a panel a trace."""
    with_domains = [
        result for result in results if result.segment_lengths and len(result.facts.domains) > 1
    ]
    drawn = with_domains[:MOST_PANELS]
    if not drawn:
        return None
    chosen = [_chosen_domains(result) for result in drawn]
    most = max(map(len, chosen))
    title = "SRP by domain, one dot for each segment length m; strokes: by chance"
    if any(len(result.facts.domains) > MOST_DOMAINS for result in drawn):
        title += f" (the {MOST_DOMAINS // 2} highest and lowest)"
    columns = 1 if len(drawn) == 1 else 2
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + rows * (0.75 + 0.26 * most)), layout="constrained")
    all_axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axes, result, names in zip(all_axes, drawn, chosen, strict=False):
        _draw_domains(axes, result, names)
        if len(results) > 1:
            axes.set_title(clean_text(result.label, 40), fontsize=9, fontweight="normal", pad=14)
    for axes in all_axes[len(drawn) :]:
        axes.set_visible(False)
    for axes in all_axes[max(0, len(drawn) - columns) : len(drawn)]:
        axes.set_xlabel("SRP of the whole model")
        axes.tick_params(labelbottom=True)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    return figure


def _chosen_domains(result: TraceMetrics) -> list[str]:
    """Return the domains to show, the highest SRP first."""
    assert result.reference_length is not None
    names: list[str] = result.srp_by_domain(result.reference_length)["domain"].to_list()
    if len(names) <= MOST_DOMAINS:
        return names
    return names[: MOST_DOMAINS // 2] + names[-MOST_DOMAINS // 2 :]


def _draw_domains(axes: Axes, result: TraceMetrics, names: list[str]) -> None:
    lengths = result.segment_lengths
    every = result.srp("model", by_domain=True)["srp"]
    gap = 0.04 * (max(every) - min(every))
    for row, name in enumerate(names):
        frame = result.srp("model", by_domain=True).filter(pl.col("domain") == name)
        axes.plot(
            [min(frame["srp"]), max(frame["srp"])],
            [row, row],
            color=GRID,
            linewidth=3,
            zorder=1,
        )
        for value in frame.iter_rows(named=True):
            colour = ramp(lengths.index(value["segment_length"]), len(lengths))
            if value["ci_low"] is not None:
                axes.plot(
                    [value["ci_low"], value["ci_high"]], [row, row], color=colour, linewidth=1.4
                )
            axes.plot(value["srp"], row, "o", color=colour, markeredgecolor=SURFACE)
            axes.plot(value["srp_chance"], row + 0.3, "|", color=colour, markersize=6)
        if row == 0:
            for value, place in zip(
                frame.iter_rows(named=True), spread(frame["srp"].to_list(), gap), strict=True
            ):
                axes.annotate(
                    str(value["segment_length"]),
                    (place, row),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=ramp(lengths.index(value["segment_length"]), len(lengths)),
                )
    axes.set_yticks(range(len(names)), [clean_text(name, 28) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.9)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _extent(frame: pl.DataFrame) -> list[float]:
    """Return all values to leave room for: SRP and the ends of its intervals."""
    columns = pl.concat([frame[name] for name in ("srp", "ci_low", "ci_high")]).drop_nulls()
    return [min(1.0, max(0.0, value)) for value in columns]


def _draw_interval(axes: Axes, frame: pl.DataFrame, x: str, colour: str) -> None:
    """Shade the bootstrap interval, where there is one."""
    known = frame.drop_nulls(["ci_low", "ci_high"])
    if len(known) > 0:
        axes.fill_between(
            known[x], known["ci_low"], known["ci_high"], color=colour, alpha=0.18, linewidth=0
        )
