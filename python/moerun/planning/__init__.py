"""Which cache a model should have on a machine, and what to expect of it.

`layer_curves` turns a trace into hit rates, `CostModel` holds what was measured on the machine,
`Geometry` the sizes of the model; `make_plan` and `budget_curve` do the rest. docs/planning.md has
the formulas, their sources, and what they leave out.
"""

from moerun.boundary import guard
from moerun.identity import machine_name, model_id
from moerun.planning.budgets import BudgetCurve, BudgetPoint, budget_curve
from moerun.planning.calibration import calibrate
from moerun.planning.costs import CostModel, fit_transfer
from moerun.planning.curves import LayerCurves, layer_curves, replay_hits
from moerun.planning.geometry import Geometry
from moerun.planning.plans import Plan, PlannedLayer, Prediction, make_plan, uniform_plan
from moerun.planning.search import Trial, find_plan
from moerun.planning.stored_costs import (
    all_stored_costs,
    costs_folder,
    find_costs,
    forget_costs,
    store_costs,
    stored_costs,
)

__all__ = [
    "BudgetCurve",
    "BudgetPoint",
    "CostModel",
    "Geometry",
    "LayerCurves",
    "Plan",
    "PlannedLayer",
    "Prediction",
    "Trial",
    "all_stored_costs",
    "budget_curve",
    "calibrate",
    "costs_folder",
    "find_costs",
    "find_plan",
    "fit_transfer",
    "forget_costs",
    "layer_curves",
    "machine_name",
    "make_plan",
    "model_id",
    "replay_hits",
    "store_costs",
    "stored_costs",
    "uniform_plan",
]

guard(__all__, __name__)
