"""The figures of the tools: each function draws one picture of what it is given."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from moerun_tools.figures.balance import load_balance, predictability
from moerun_tools.figures.heat_maps import activation_map, srp_map
from moerun_tools.figures.hit_rate import hit_rates
from moerun_tools.figures.specialization import specialization
from moerun_tools.figures.srp import srp_by_domain, srp_by_layer, srp_by_length, standing
from moerun_tools.figures.style import figure_style
from moerun_tools.metrics_results import TraceMetrics
from moerun_tools.palette import LIGHT

# File name of each figure, in the order of the report. None is drawn of what was not measured.
FIGURES: dict[str, Callable[[Sequence[TraceMetrics]], Figure | None]] = {
    "standing": standing,
    "srp_by_segment_length": srp_by_length,
    "hit_rate": hit_rates,
    "srp_by_layer": srp_by_layer,
    "srp_by_domain": srp_by_domain,
    "activation_rates": activation_map,
    "srp_by_expert": srp_map,
    "specialization": specialization,
    "load_balance": load_balance,
    "predictability": predictability,
}
FORMATS = ("png", "svg")


def render(
    name: str, results: Sequence[TraceMetrics], formats: Sequence[str]
) -> dict[str, bytes] | None:
    """Draw a figure and return it in each of the formats, None where there is nothing to draw."""
    with figure_style():
        figure = FIGURES[name](results)
        if figure is None:
            return None
        return {kind: _saved(figure, kind) for kind in formats}


def draw(figure: Callable[[], Figure], kind: str) -> bytes:
    """Draw one figure and return it in a format."""
    with figure_style():
        return _saved(figure(), kind)


def inline_svg(name: str, svg: bytes) -> str:
    """Return an SVG figure as an element for the report: its colours follow the page's theme."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Ids must be unique in the page. Only attributes are changed: text holds no bare quotes.
    text = re.sub(r'\b(id|xlink:href)="(#?)([\w.-]+)"', rf'\1="\2{name}-\3"', text)
    text = text.replace("url(#", f"url(#{name}-")
    for colour, value in LIGHT.items():
        text = text.replace(f": {value}", f": var(--{colour})")
    return text


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
