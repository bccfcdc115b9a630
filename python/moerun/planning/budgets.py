"""What more memory would bring: plans over a range of budgets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moerun._moerun import Planner
from moerun.arguments import check_int
from moerun.planning.costs import CostModel
from moerun.planning.curves import LayerCurves
from moerun.planning.geometry import Geometry
from moerun.planning.plans import Plan, Problem


@dataclass(frozen=True)
class BudgetPoint:
    """One budget.

    Attributes:
        plan: for it, with what is predicted.
        uniform_tpot_ms: milliseconds a token with equal bytes and whole experts for every layer,
            or the split that was given.
        optimal_hit_rate: of the best plan for a cache that knows the future.
        optimal_tpot_ms: milliseconds a token with it: what no policy can beat.
    """

    plan: Plan
    uniform_tpot_ms: float
    optimal_hit_rate: float
    optimal_tpot_ms: float

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        return self.plan.budget_bytes


@dataclass(frozen=True)
class BudgetCurve:
    """Points by rising budget, from the smallest that works to every expert in memory.

    Attributes:
        points: of the curve.
        knee: index of the point from which on more memory brings less time than before.
    """

    points: tuple[BudgetPoint, ...]
    knee: int


def budget_curve(
    curves: LayerCurves,
    costs: CostModel,
    geometry: Geometry,
    *,
    points: int = 24,
    prefetch: bool = True,
    split: float | None = None,
    prompt_tokens: int = 512,
    prefill_chunk: int = 512,
) -> BudgetCurve:
    """Return plans for budgets from the smallest that works to all experts, evenly spaced.

    A larger budget is never predicted to be slower: where the plan for a smaller one is better, it
    is taken. The knee is where the time saved so far, as a share of all that can be saved, is
    farthest above the share of memory spent (Satopaa et al., 2011, "Kneedle").

    Args:
        points: budgets, at least 2.
        curves: as the other arguments, as for `make_plan`.
        costs: times on the machine.
        geometry: sizes of the model.
        prefetch: whether the cache is to read ahead.
        split: one split for all layers; None lets the planner choose each layer's.
        prompt_tokens: length of the prompt of the predicted time to first token.
        prefill_chunk: as of `Model.load`.

    Raises:
        InvalidArgumentError: as `make_plan`.
    """
    count = check_int("points", points, 2, 10_000)
    problem = Problem(curves, costs, geometry, prefetch, split, prompt_tokens, prefill_chunk)
    ideal = problem.planner_for(curves.optimal)
    smallest, total = max(1, geometry.ring_bytes), geometry.total_bytes
    budgets = [int(budget) for budget in np.linspace(smallest, total, count)]
    found: list[BudgetPoint] = []
    best: list[tuple[int, int]] | None = None
    best_ideal: list[tuple[int, int]] | None = None
    for budget in budgets[:-1]:
        slot_bytes = budget - geometry.ring_bytes
        uniform = problem.planner.uniform(slot_bytes, 1.0 if split is None else split)
        best = _faster(problem.planner, problem.planner.divide(slot_bytes), best)
        best_ideal = _faster(ideal, ideal.divide(slot_bytes), best_ideal)
        # A plan that is good for the policy may be better for the ideal, too.
        best_ideal = _faster(ideal, best_ideal, best)
        estimate = ideal.estimate(best_ideal)
        found.append(
            BudgetPoint(
                plan=problem.plan(best, budget),
                uniform_tpot_ms=1e3 * problem.planner.estimate(uniform)["seconds"],
                optimal_hit_rate=estimate["hit_rate"],
                optimal_tpot_ms=1e3 * estimate["seconds"],
            )
        )
    everything = problem.resident_plan(budgets[-1])
    fastest = everything.predicted.tpot_ms
    found.append(BudgetPoint(everything, fastest, 1.0, fastest))
    times = np.array([point.plan.predicted.tpot_ms for point in found])
    return BudgetCurve(tuple(found), _knee(np.array(budgets, np.float64), times))


def _knee(budgets: NDArray[np.float64], times: NDArray[np.float64]) -> int:
    span, saving = budgets[-1] - budgets[0], times[0] - times[-1]
    if span <= 0 or saving <= 0:
        return 0
    return int(np.argmax((times[0] - times) / saving - (budgets - budgets[0]) / span))


def _faster(
    planner: Planner, settings: list[tuple[int, int]], other: list[tuple[int, int]] | None
) -> list[tuple[int, int]]:
    if other is None:
        return settings
    times = [planner.estimate(each)["seconds"] for each in (settings, other)]
    return other if times[1] < times[0] else settings
