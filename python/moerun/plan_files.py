"""Plans as `Model.load`, `dry_run`, `simulate` and `Model.reconfigure` take them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerun.arguments import check_str, shown
from moerun.errors import FormatError, InvalidArgumentError, MoerunError
from moerun.identity import model_id
from moerun.user_files import read_text_bounded, user_path

if TYPE_CHECKING:
    from moerun.planning import Plan

_MAX_BYTES = 16 << 20  # as the native module


def plan_path(plan: Any) -> str:
    """Return the path of a plan as text.

    Raises:
        InvalidArgumentError: it is not a path.
    """
    name = os.fspath(plan) if isinstance(plan, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name:
        raise InvalidArgumentError(f"plan must be the path of a JSON file, not {shown(plan)}")
    return check_str("plan", str(user_path(name, "plan")))


def named_plan(plan: str | os.PathLike[str] | Plan) -> tuple[str, str]:
    """Return what to call a plan, and its text; that is empty where the name is its file's path.

    Raises:
        InvalidArgumentError: it is neither a path nor a plan.
    """
    if isinstance(plan, (str, os.PathLike)):
        return plan_path(plan), ""
    from moerun.planning import Plan  # what planning needs takes a while to import

    if not isinstance(plan, Plan):
        raise InvalidArgumentError(
            f"plan must be the path of a JSON file or a moerun.planning.Plan, not {shown(plan)}"
        )
    return "the plan", plan.to_json()


def check_plan_model(name: str | None, directory: Path, text: str = "") -> None:
    """Check that a plan which says what model it is of is of this one.

    Args:
        name: path of a plan, or with `text` what to call that; None for no plan.
        directory: of the model.
        text: of the plan.

    Raises:
        FormatError: the plan is of another model.
    """
    if name is None:
        return
    planned = _model_id_in(name, text)
    if planned is None:
        return
    found = model_id(directory)
    if planned != found:
        raise FormatError(
            f"{name}: the plan is of another model: its model_id is {planned}, that of {directory} "
            f"is {found}. Other weights in the same files are another model, too. Make a plan for "
            "this model with moe-plan make, or load the model that the plan is of"
        )


def predicted_by(name: str | None) -> dict[str, float] | None:
    """Return what a plan promises, of `hit_rate` and `tpot_ms` what it has; None for nothing."""
    promised = None if name is None else _read(name, "").get("predicted")
    if not isinstance(promised, dict):
        return None
    found = {key: promised.get(key) for key in ("hit_rate", "tpot_ms")}
    return {
        key: float(value)
        for key, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    } or None


def _model_id_in(name: str, text: str) -> str | None:
    planned = _read(name, text).get("model_id")
    return planned if isinstance(planned, str) else None


def _read(name: str, text: str) -> dict[str, Any]:
    """Return what a plan says; nothing where it is none: others tell that."""
    try:
        if not text:
            text = read_text_bounded(name, _MAX_BYTES)
        value = json.loads(text)
    except (MoerunError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
