"""Plans that follow what is being run: made again while a model stays loaded."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moerun import _moerun
from moerun.cache_control import RoutingWindow
from moerun.errors import MoerunError, MoerunWarning
from moerun.planning.costs import CostModel
from moerun.planning.curves import LayerCurves, RoutingPart, curves_of
from moerun.planning.geometry import Geometry
from moerun.planning.plans import Choice, Problem, Settings, best_of
from moerun.planning.stored_costs import find_costs
from moerun.trace import NO_PREDICTION

if TYPE_CHECKING:
    from moerun.model import Model

REPLAN_TOKENS = 5000
LEAST_TOKENS = 512  # of the window; fewer say too little


class Hysteresis:
    """Decides whether a gain is worth a change, so that changes cannot follow one another for ever.

    A change has to gain at least `least` of a token's time. Every change doubles what the next one
    has to gain, up to a half; every decision against one takes a tenth of that back.
    """

    def __init__(self, least: float = 0.03) -> None:
        self._least = least
        self.threshold = least

    def wants(self, gain: float) -> bool:
        """Tell whether a change that saves this share of the time is to be made."""
        if gain > self.threshold:
            self.threshold = min(0.5, 2 * self.threshold)
            return True
        self.threshold = max(self._least, 0.9 * self.threshold)
        return False


@dataclass(frozen=True)
class Decision:
    """What came of planning again.

    Attributes:
        at_token: tokens decoded before.
        tpot_ms: predicted with the slots and splits that were there; None if that failed.
        planned_tpot_ms: predicted with the best ones; None if that failed.
        applied: whether they were taken.
        reason: why, or why not.
    """

    at_token: int
    tpot_ms: float | None
    planned_tpot_ms: float | None
    applied: bool
    reason: str


class OnlinePlanner:
    """Plans again for a loaded model when enough tokens were decoded since it last did.

    Args:
        model: with a cache.
        pack: as it was loaded with.
        from_stored: whether it was loaded with a plan of an earlier run; only reported.
        costs: times on the machine; None for what `moe-plan calibrate` stored, else what the
            running model shows.
        every: tokens between two plans.
    """

    def __init__(
        self,
        model: Model,
        *,
        pack: bool | str | os.PathLike[str] = False,
        from_stored: bool = False,
        costs: CostModel | None = None,
        every: int = REPLAN_TOKENS,
    ) -> None:
        self._model = model
        self._geometry = Geometry.of_model(model.path, model.device, pack)
        self._costs = costs or self._stored_costs(pack)
        self._from_stored = from_stored
        self._every = every
        # Of the caller: what the last plan chose is not for ever.
        self._may_prefetch = model.stats()["cache"]["prefetch"] != "off"
        self._last_token = 0
        self._hysteresis = Hysteresis()
        self._lock = threading.Lock()
        self.decisions: list[Decision] = []

    def _stored_costs(self, pack: Any) -> CostModel | None:
        try:
            return find_costs(self._geometry.sizes_id, self._model.device, pack=pack)
        except MoerunError as error:  # the run's own will do
            warnings.warn(str(error), MoerunWarning, stacklevel=4)
            return None

    def step(self) -> Decision | None:
        """Plan if it is time, and change the cache if that is worth it; to be called when idle.

        Returns:
            What was decided; None if it was not time, another thread is at it, or the model was
            closed.
        """
        if self._model.is_closed or not self._lock.acquire(blocking=False):
            return None
        try:
            tokens = self._model._open().decode_tokens()
            if tokens - self._last_token < self._every:
                return None
            self._last_token = tokens
            try:
                decision = self._decide(tokens)
            except MoerunError as error:  # of a plan; the text that is made is none the worse
                decision = Decision(tokens, None, None, False, f"planning failed: {error}")
            self.decisions.append(decision)
            return decision
        finally:
            self._lock.release()

    def as_dict(self) -> dict[str, Any]:
        """Return what `Model.stats()["plan"]` holds."""
        last = self.decisions[-1] if self.decisions else None
        return {
            "started_from": "stored" if self._from_stored else "uniform",
            "every": self._every,
            "planned": len(self.decisions),
            "changed": sum(each.applied for each in self.decisions),
            "costs": "calibrated" if self._costs is not None else "of this run",
            "last": None if last is None else asdict(last),
        }

    def _decide(self, tokens: int) -> Decision:
        cache = self._model.stats()["cache"]
        window = self._model.routing_window()
        count = window.expert_ids.shape[1]
        if count < LEAST_TOKENS:
            reason = f"only {count} tokens of routing are known"
            return Decision(tokens, None, None, False, reason)
        costs = self._costs or self._live_costs(cache)
        if costs is None:
            reason = "times are not known: run moe-plan calibrate once"
            return Decision(tokens, None, None, False, reason)
        curves = self._curves(cache["policy"], window)
        problem = Problem(curves, costs, self._geometry, self._may_prefetch, None, 512, 512)
        now = self._settings(cache)
        present = best_of(problem.planners, lambda _: now)
        slot_bytes = cache["arena_bytes"] - cache["ring_bytes"]
        best = best_of(problem.planners, lambda planner: planner.divide(slot_bytes))
        return self._apply(tokens, problem, present, best, cache["budget_bytes"])

    def _apply(
        self, tokens: int, problem: Problem, present: Choice, best: Choice, budget: int
    ) -> Decision:
        times = (1e3 * present.seconds, 1e3 * best.seconds)
        gain = 1 - best.seconds / present.seconds if present.seconds > 0 else 0.0
        moved_s = self._new_bytes(present, best) / problem.costs.link_bytes_per_s
        if moved_s > (present.seconds - best.seconds) * self._every:
            reason = f"moving experts would take {moved_s:.2g} s, more than it saves"
            return Decision(tokens, *times, False, reason)
        needed = self._hysteresis.threshold
        if not self._hysteresis.wants(gain):
            reason = f"it would save {gain:.1%} of a token's time, less than {needed:.0%}"
            return Decision(tokens, *times, False, reason)
        plan = problem.plan(best, budget)
        self._model.reconfigure(plan)
        return Decision(tokens, *times, True, f"it saves {gain:.1%} of a token's time")

    def _settings(self, cache: dict[str, Any]) -> Settings:
        """Return slots and records of a top segment, of each layer, as they are."""
        records = self._geometry.records
        return [(each["slots"], round(each["split"] * records)) for each in cache["layers"]]

    def _new_bytes(self, present: Choice, best: Choice) -> int:
        """Return how much a change brings into slots that is not there."""
        records = 0
        for (slots, top), (new_slots, new_top) in zip(present.settings, best.settings, strict=True):
            records += new_slots * new_top - min(slots, new_slots) * min(top, new_top)
        return records * self._geometry.record_bytes

    def _curves(self, policy: str, window: RoutingWindow) -> LayerCurves:
        ids = window.expert_ids
        ids = np.ascontiguousarray(ids[:, (ids != NO_PREDICTION).all(axis=(0, 2))])
        part = RoutingPart(ids[None], np.array([ids.shape[1]], np.int32))
        geometry = self._geometry
        curves = curves_of(
            [part],
            policy,
            model=geometry.model,
            moe_layers=geometry.moe_layers,
            num_experts=geometry.num_experts,
        )
        if not (window.named > 0).all():
            return curves
        return replace(curves, correctness=window.right / window.named, correctness_measured=True)

    def _live_costs(self, cache: dict[str, Any]) -> CostModel | None:
        """Return the times of the tokens before; None where the device does not tell them."""
        times = _moerun.layer_times(self._model._open())
        rate = cache["link_gb_per_s"]
        if len(times["token_s"]) == 0 or not rate:
            return None
        attention = np.median(times["attention_s"], axis=0)
        moe = np.median(times["moe_s"], axis=0)
        whole = times["token_s"] - times["waited_s"].sum(axis=1)
        known = whole[np.isfinite(whole)]
        head = float(np.median(known)) - attention.sum() - moe.sum() if len(known) else 0.0
        return CostModel(
            attention_s=tuple(attention.tolist()),
            moe_s=tuple(moe.tolist()),
            prompt_s=tuple((attention + moe).tolist()),
            head_s=max(0.0, head),
            link_fixed_s=0.0,
            link_bytes_per_s=1e9 * rate,
        )
