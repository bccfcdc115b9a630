"""The lines of the report: what was checked or measured, and what it stands against."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

NAME_WIDTH = 70
OK, MISSED, FAILED, NOT_RUN = "ok", "MISSED", "FAILED", "not run"


def check(name: str, value: Any, is_right: bool, **details: Any) -> Row:
    """A question of right or wrong: it decides about the exit status."""
    status = OK if is_right else FAILED
    return {"kind": "check", "name": name, "value": value, "status": status, **details}


def speed(
    name: str,
    value: float,
    unit: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    **details: Any,
) -> Row:
    """A measurement, beside its target where it has one."""
    is_met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    target = ""
    if at_least is not None:
        target = f">= {at_least:g}"
    if at_most is not None:
        target = f"<= {at_most:g}"
    row = {"kind": "speed", "name": name, "value": value, "unit": unit, "target": target}
    return row | {"status": "" if not target else OK if is_met else MISSED, **details}


def not_run(kind: str, name: str, why: str) -> Row:
    return {"kind": kind, "name": name, "value": None, "status": NOT_RUN, "why": why}


def failed(kind: str, name: str, why: str) -> Row:
    return {"kind": kind, "name": name, "value": None, "status": FAILED, "why": why}


def line(row: Row) -> str:
    value = row["value"]
    if isinstance(value, float):
        value = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    value = "" if value is None else str(value)
    shown = " ".join(part for part in (value, row.get("unit", "")) if part)
    text = f"{row['name']:<{NAME_WIDTH}} {shown:>18} {row.get('target', ''):>9}  {row['status']}"
    return text + (f": {row['why']}" if row.get("why") else "")


def table(rows: list[Row]) -> str:
    head = f"{'':<{NAME_WIDTH}} {'value':>18} {'target':>9}"
    checks = [line(row) for row in rows if row["kind"] == "check"]
    speeds = [line(row) for row in rows if row["kind"] == "speed"]
    return "\n".join([head, *checks, "", *speeds])


def exit_status(rows: list[Row]) -> int:
    """1: something is wrong. 3: nothing is, but not everything was looked at."""
    checks = [row["status"] for row in rows if row["kind"] == "check"]
    if FAILED in checks or not checks:
        return 1
    return 3 if NOT_RUN in checks else 0
