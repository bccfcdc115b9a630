"""What more memory would bring: plans over a range of budgets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moerun._moerun import Planner
from moerun.arguments import check_int
from moerun.planning.costs import CostModel
from moerun.planning.curves import LayerCurves
from moerun.planning.geometry import Geometry
from moerun.planning.plans import Choice, Plan, Problem, Settings, best_of

# A share of the time that is not worth speaking of.
_NOTHING = 1e-6


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
        here: index of the point of `here_bytes`; None if that is not known or too little.
    """

    points: tuple[BudgetPoint, ...]
    knee: int
    here: int | None = None


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
    here_bytes: int | None = None,
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
        prefetch: whether the cache may read ahead.
        split: one split for all layers; None lets the planner choose each layer's.
        prompt_tokens: length of the prompt of the predicted time to first token.
        prefill_chunk: as of `Model.load`.
        here_bytes: what there is room for on a machine: a point more, unless that is too little.

    Raises:
        InvalidArgumentError: as `make_plan`.
    """
    count = check_int("points", points, 2, 10_000)
    problem = Problem(curves, costs, geometry, prefetch, split, prompt_tokens, prefill_chunk)
    ideal = problem.ideal_planners()
    smallest, total = max(1, geometry.ring_bytes), geometry.total_bytes
    budgets = [int(budget) for budget in np.linspace(smallest, total, count)]
    here = None
    if here_bytes is not None and here_bytes >= smallest:
        room = min(check_int("here_bytes", here_bytes, 1, 2**50), total)
        budgets = sorted({*budgets, room})
        here = budgets.index(room)
    found: list[BudgetPoint] = []
    best: Choice | None = None
    best_ideal: Choice | None = None
    for budget in budgets[:-1]:
        slot_bytes = budget - geometry.ring_bytes
        share = 1.0 if split is None else split
        uniform = best_of(problem.planners, partial(_uniform, bytes=slot_bytes, split=share))
        best = _faster(best_of(problem.planners, partial(_divide, bytes=slot_bytes)), best)
        best_ideal = _faster(best_of(ideal, partial(_divide, bytes=slot_bytes)), best_ideal)
        # A plan that is good for the policy may be better for the ideal, too.
        settings = best.settings
        best_ideal = _faster(best_of(ideal, partial(_same, settings=settings)), best_ideal)
        estimate = ideal[best_ideal.prefetch].estimate(best_ideal.settings)
        found.append(
            BudgetPoint(
                plan=problem.plan(best, budget),
                uniform_tpot_ms=1e3 * uniform.seconds,
                optimal_hit_rate=estimate["hit_rate"],
                optimal_tpot_ms=1e3 * best_ideal.seconds,
            )
        )
    everything = problem.resident_plan(budgets[-1])
    fastest = everything.predicted.tpot_ms
    found.append(BudgetPoint(everything, fastest, 1.0, fastest))
    times = np.array([point.plan.predicted.tpot_ms for point in found])
    return BudgetCurve(tuple(found), _knee(np.array(budgets, np.float64), times), here)


def _knee(budgets: NDArray[np.float64], times: NDArray[np.float64]) -> int:
    span, saving = budgets[-1] - budgets[0], times[0] - times[-1]
    if span <= 0 or saving <= _NOTHING * times[-1]:
        return 0
    return int(np.argmax((times[0] - times) / saving - (budgets - budgets[0]) / span))


def _divide(planner: Planner, bytes: int) -> Settings:
    return planner.divide(bytes)


def _uniform(planner: Planner, bytes: int, split: float) -> Settings:
    return planner.uniform(bytes, split)


def _same(planner: Planner, settings: Settings) -> Settings:
    del planner
    return settings


def _faster(choice: Choice, other: Choice | None) -> Choice:
    return other if other is not None and other.seconds < choice.seconds else choice
