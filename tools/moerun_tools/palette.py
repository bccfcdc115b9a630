"""The colours of figures and of the report, for a light and a dark page."""

from __future__ import annotations

# Each colour is written as its name in the report's style sheet, with another value in the dark.
# The hues are those of Okabe and Ito, some darker, which people with any colour vision can tell
# apart; the ramp is one hue by lightness, for segment lengths, which have an order.
LIGHT = {
    "surface": "#ffffff",
    "ink": "#1d2329",
    "muted": "#5c6670",
    "grid": "#e4e7ea",
    "zone-1": "#d9ecdf",
    "zone-2": "#edf1d6",
    "zone-3": "#f8ead0",
    "zone-4": "#f6dcd3",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#00875f",
    "purple": "#a2569a",
    "ochre": "#a87800",
    "sky": "#3f9bd6",
    "ramp-1": "#86c5e8",
    "ramp-2": "#5fabd9",
    "ramp-3": "#3d8fc6",
    "ramp-4": "#2173af",
    "ramp-5": "#0f5791",
    "ramp-6": "#073b6b",
}
DARK = {
    "surface": "#15191d",
    "ink": "#e6e9ec",
    "muted": "#98a2ac",
    "grid": "#2b3238",
    "zone-1": "#17352a",
    "zone-2": "#2d3319",
    "zone-3": "#3a2d14",
    "zone-4": "#3b231c",
    "blue": "#4fabe3",
    "orange": "#f0884a",
    "green": "#39bd91",
    "purple": "#cf8ac8",
    "ochre": "#d6a935",
    "sky": "#8fcbf2",
    "ramp-1": "#2b5f82",
    "ramp-2": "#3679a5",
    "ramp-3": "#4b95c6",
    "ramp-4": "#70b1dc",
    "ramp-5": "#a0cdea",
    "ramp-6": "#d3e8f6",
}


def style_variables(colours: dict[str, str]) -> str:
    """Return the colours as declarations of a style sheet."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
