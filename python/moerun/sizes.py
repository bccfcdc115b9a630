"""Sizes of memory as people read them; the same text as the runtime's messages."""

from __future__ import annotations

import math
from typing import Literal

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def size_text(num_bytes: int, rounding: Literal["nearest", "up", "down"] = "nearest") -> str:
    """Return "1001 bytes", "288 KiB" or "4.53 MiB": two decimals at most.

    Args:
        num_bytes: the size.
        rounding: "up" for the least that works and "down" for the most, so that the text keeps
            the limit.
    """
    if num_bytes < 1024:
        return f"{num_bytes} {'byte' if num_bytes == 1 else 'bytes'}"
    size, unit = num_bytes / 1024, 0
    while size >= 1024 and unit + 1 < len(_UNITS):
        size, unit = size / 1024, unit + 1
    scaled = size * 100
    whole = (
        math.ceil(scaled)
        if rounding == "up"
        else math.floor(scaled)
        if rounding == "down"
        else round(scaled)
    )
    return f"{whole / 100:g} {_UNITS[unit]}" if whole < 10**7 else f"{whole // 100} {_UNITS[unit]}"
