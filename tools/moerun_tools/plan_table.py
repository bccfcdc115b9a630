"""Numbers of plans as text: columns and times."""

from __future__ import annotations

from collections.abc import Sequence

from moerun_tools.units import as_binary, as_percent


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def milliseconds(value: float | None) -> str:
    """Return milliseconds with four digits that matter, without the unit."""
    if value is None:
        return "-"
    return f"{value:.0f}" if 1000 <= value < 1e9 else f"{value:.4g}"


def budget_text(budget: int, total: int) -> str:
    """Return a budget and its share of all experts."""
    return f"{as_binary(budget)} ({as_percent(budget, total)} % of the experts)"


def percent(share: float | None) -> str:
    """Return a share from 0 to 1 in percent, without the sign."""
    return "-" if share is None else as_percent(share, 1)
