"""Figure of moe-predictor: whether predicted probabilities come true."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moerun.predictor import Evaluation
from moerun_tools.figures.style import MUTED, SERIES, SURFACE, WIDTH
from moerun_tools.metrics_results import clean_text


def calibration_figure(found: Evaluation, model: str) -> Figure:
    """Draw the observed share of uses by predicted probability, and how often each is predicted."""
    frame = found.calibration.filter(found.calibration["count"] > 0)
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    shares, counts = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    shares.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), gid="ideal")
    shares.plot(
        frame["predicted"],
        frame["observed"],
        "o-",
        color=SERIES[0],
        markeredgecolor=SURFACE,
        gid="observed",
    )
    shares.set_ylabel("experts that were used")
    shares.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    shares.set_ylim(-0.02, 1.02)
    shares.set_title(
        f"Do predicted probabilities come true? {clean_text(model, 40)}, "
        f"{100 * found.calibration_error:.2f} points off on average"
    )
    middles = (found.calibration["low"] + found.calibration["high"]) / 2
    width = float(found.calibration["high"][0] - found.calibration["low"][0])
    share = found.calibration["count"] / found.calibration["count"].sum()
    counts.bar(middles, share, 0.9 * width, color=SERIES[0], alpha=0.45)
    counts.set_yscale("log")
    counts.set_ylabel("share of predictions")
    counts.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    counts.set_xlabel("predicted probability that a token uses an expert")
    counts.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    counts.set_xlim(-0.02, 1.02)
    return figure
