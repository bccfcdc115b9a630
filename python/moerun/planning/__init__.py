"""Which cache a model should have on a machine, and what to expect of it.

`layer_curves` turns a trace into hit rates, `CostModel` holds what was measured on the machine,
`Geometry` the sizes of the model; `make_plan` and `budget_curve` do the rest. docs/planning.md has
the formulas, their sources, and what they leave out.
"""

from moerun.planning.budgets import BudgetCurve, BudgetPoint, budget_curve
from moerun.planning.costs import CostModel, fit_transfer
from moerun.planning.curves import LayerCurves, layer_curves, replay_hits
from moerun.planning.geometry import Geometry
from moerun.planning.model_id import model_id
from moerun.planning.plans import Plan, PlannedLayer, Prediction, make_plan, uniform_plan

__all__ = [
    "BudgetCurve",
    "BudgetPoint",
    "CostModel",
    "Geometry",
    "LayerCurves",
    "Plan",
    "PlannedLayer",
    "Prediction",
    "budget_curve",
    "fit_transfer",
    "layer_curves",
    "make_plan",
    "model_id",
    "replay_hits",
    "uniform_plan",
]
