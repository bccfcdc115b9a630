"""Numbers as people read them; "-" where nothing was measured."""

from __future__ import annotations


def as_seconds(seconds: float | None) -> str:
    """Return a time in milliseconds or seconds."""
    if seconds is None:
        return "-"
    if seconds >= 1:
        return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.2f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"


def as_rate(rate: float | None) -> str:
    """Return a rate, without its unit."""
    if rate is None:
        return "-"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}"


def as_percent(part: float, whole: float) -> str:
    """Return what percentage `part` is of `whole`, without the sign."""
    return f"{100 * part / whole:.1f}" if whole else "-"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_binary(count: float | None) -> str:
    """Return a number of bytes in KiB, MiB, GiB or TiB, which memory is sold in."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 1000 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def of_total(part: int, total: int) -> str:
    """Return "4.5 of 18 MiB", or both units where they differ."""
    small, large = as_binary(part), as_binary(total)
    if small.split()[1] == large.split()[1]:
        small = small.split()[0]
    return f"{small} of {large}"
