"""Numbers as people read them; "-" where nothing was measured."""

from __future__ import annotations


def as_seconds(seconds: float | None) -> str:
    """Return a time in milliseconds or seconds."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def as_rate(rate: float | None) -> str:
    """Return a rate, without its unit."""
    if rate is None:
        return "-"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}"


def as_bytes(count: int) -> str:
    """Return a number of bytes in decimal units."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def as_percent(part: float, whole: float) -> str:
    """Return what percentage `part` is of `whole`, without the sign."""
    return f"{100 * part / whole:.1f}" if whole else "-"
