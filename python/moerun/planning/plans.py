"""Plans: how many slots each layer has and how much of an expert is in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, check_number, shown
from moerun.errors import InvalidArgumentError, OutOfMemoryError
from moerun.planning.costs import CostModel
from moerun.planning.curves import LayerCurves
from moerun.planning.geometry import Geometry
from moerun.sizes import size_text

Settings = list[tuple[int, int]]  # slots and records of a top segment, for each layer
# With prefetch, where it may be used, and without.
Planners = dict[bool, _moerun.Planner]


LEAST_TOKENS = 64  # of a trace


@dataclass(frozen=True)
class Choice:
    """Settings of all layers, and whether to prefetch; `seconds` a token are predicted."""

    settings: Settings
    prefetch: bool
    seconds: float


def best_of(planners: Planners, make: Callable[[_moerun.Planner], Settings]) -> Choice:
    """Return what is faster: with prefetch or without it."""
    choices = []
    for prefetch, planner in planners.items():
        settings = make(planner)
        choices.append(Choice(settings, prefetch, planner.estimate(settings)["seconds"]))
    return min(choices, key=lambda choice: choice.seconds)


@dataclass(frozen=True)
class Prediction:
    """What the cost model expects of a plan.

    Attributes:
        hit_rate: share of lookups whose top segment is in a slot.
        tpot_ms: milliseconds for a decoded token.
        stalled_ms: of these, waiting that no computing hides.
        ttft_ms: milliseconds until a prompt of `prompt_tokens` is computed.
        bytes_per_token: moved for a decoded token, on demand and in advance.
        prompt_tokens: of the prompt.
    """

    hit_rate: float
    tpot_ms: float
    stalled_ms: float
    ttft_ms: float
    bytes_per_token: float
    prompt_tokens: int

    def as_dict(self) -> dict[str, float]:
        """Return the attributes by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        layer: its number.
        slots: of its cache.
        split: share of an expert that is in a slot.
        experts: those that get slots with policy "static", empty for the others.
        hit_rate: share of its lookups whose top segment is in a slot.
        stalled_ms: milliseconds of a token waiting for it.
        warm: experts that are read into slots at once, the best first; of other policies than
            "static".
    """

    layer: int
    slots: int
    split: float
    experts: tuple[int, ...]
    hit_rate: float
    stalled_ms: float
    warm: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A configuration of the cache for `Model.load(..., plan=FILE)`.

    Attributes:
        model: name of the model, for people.
        policy: of the cache.
        prefetch: "auto" or "off".
        budget_bytes: that it was made for.
        arena_bytes: that it takes, slots and staging ring; without the ring where `is_resident`.
        is_resident: every expert is in memory.
        layers: slots and split of each layer with experts.
        predicted: what to expect.
        model_id: of the model, from `moerun.planning.model_id`; then no other model takes the plan.
    """

    model: str
    policy: str
    prefetch: str
    budget_bytes: int
    arena_bytes: int
    is_resident: bool
    layers: tuple[PlannedLayer, ...]
    predicted: Prediction
    model_id: str = ""

    def to_json(self) -> str:
        """Return the text of a plan file (docs/cache.md, Plans)."""
        layers = []
        for planned in self.layers:
            entry: dict[str, Any] = {
                "layer": planned.layer,
                "slots": planned.slots,
                "split": planned.split,
            }
            if planned.experts:
                entry["experts"] = list(planned.experts)
            if planned.warm:
                entry["warm"] = list(planned.warm)
            layers.append(entry)
        plan: dict[str, Any] = {
            "version": 1,
            "model": self.model,
            "model_id": self.model_id,
            "policy": self.policy,
            "budget_bytes": self.budget_bytes,
            "prefetch": self.prefetch,
            "resident": True,
            "layers": layers,
            "predicted": self.predicted.as_dict(),
        }
        if not self.model_id:
            del plan["model_id"]
        del plan["layers" if self.is_resident else "resident"]
        return json.dumps(plan, indent=2)


def make_plan(
    curves: LayerCurves,
    costs: CostModel,
    geometry: Geometry,
    budget_bytes: int,
    *,
    prefetch: bool = True,
    split: float | None = None,
    prompt_tokens: int = 512,
    prefill_chunk: int = 512,
) -> Plan:
    """Return the best plan found for a budget; never slower, as predicted, than a uniform one.

    Args:
        curves: hit rates and how well prefetch guesses, of the policy that is to run.
        costs: times on the machine.
        geometry: sizes of the model.
        budget_bytes: for slots and staging ring together.
        prefetch: whether the cache may read ahead. What is predicted is with it or without,
            whichever is faster: the cache finds that out by itself.
        split: one split for all layers; None lets the planner choose each layer's.
        prompt_tokens: length of the prompt of the predicted time to first token.
        prefill_chunk: as of `Model.load`.

    Raises:
        InvalidArgumentError: an argument is out of its range, or the three do not describe the
            same model.
        OutOfMemoryError: the budget does not hold the staging ring.
    """
    problem = Problem(curves, costs, geometry, prefetch, split, prompt_tokens, prefill_chunk)
    budget = problem.check_budget(budget_bytes)
    if budget >= geometry.total_bytes:
        return problem.resident_plan(budget)
    slot_bytes = budget - geometry.ring_bytes
    return problem.plan(best_of(problem.planners, lambda each: each.divide(slot_bytes)), budget)


def uniform_plan(
    curves: LayerCurves,
    costs: CostModel,
    geometry: Geometry,
    budget_bytes: int,
    split: float = 1.0,
    *,
    prefetch: bool = True,
    prompt_tokens: int = 512,
    prefill_chunk: int = 512,
) -> Plan:
    """Return what the cache does without a plan: equal bytes and one split for every layer.

    Arguments and errors are those of `make_plan`.
    """
    problem = Problem(curves, costs, geometry, prefetch, None, prompt_tokens, prefill_chunk)
    budget = problem.check_budget(budget_bytes)
    share = check_number("split", split, 0, 1)
    if budget >= geometry.total_bytes:
        return problem.resident_plan(budget)
    slot_bytes = budget - geometry.ring_bytes
    return problem.plan(
        best_of(problem.planners, lambda each: each.uniform(slot_bytes, share)), budget
    )


class Problem:
    """The inputs of a plan, checked against each other, and the native planner over them."""

    def __init__(
        self,
        curves: LayerCurves,
        costs: CostModel,
        geometry: Geometry,
        prefetch: bool,
        split: float | None,
        prompt_tokens: int,
        prefill_chunk: int,
    ) -> None:
        _check_same_model(curves, costs, geometry)
        self.curves, self.costs, self.geometry = curves, costs, geometry
        if not isinstance(prefetch, (bool, np.bool_)):
            raise InvalidArgumentError(f"prefetch must be True or False, not {shown(prefetch)}")
        self.prefetch = bool(prefetch)
        self.split = None if split is None else check_number("split", split, 0, 1)
        self.prompt_tokens = check_int("prompt_tokens", prompt_tokens, 1, 2**31)
        self.prefill_chunk = check_int("prefill_chunk", prefill_chunk, 1, 2**31)
        self.planners = self._planners(curves.hit_rate, curves.missing)

    def ideal_planners(self) -> Planners:
        """Return the planners for the cache that knows the future."""
        return self._planners(self.curves.optimal, self.curves.optimal_missing)

    def _planners(
        self, hit_rate: NDArray[np.float64], missing: NDArray[np.float64] | None
    ) -> Planners:
        return {
            ahead: self._planner(hit_rate, missing, ahead)
            for ahead in ((True, False) if self.prefetch else (False,))
        }

    def _planner(
        self, hit_rate: NDArray[np.float64], missing: NDArray[np.float64] | None, prefetch: bool
    ) -> _moerun.Planner:
        geometry, costs, curves = self.geometry, self.costs, self.curves
        guesses = curves.correctness if prefetch else curves.correctness[:, :0]
        # What the guesses would find is known of the policy's own slots.
        knows_absent = prefetch and hit_rate is curves.hit_rate
        link_fixed_s, link_bytes_per_s = costs.link_fixed_s, costs.link_bytes_per_s
        if geometry.move_bytes is None:
            link_fixed_s, link_bytes_per_s = costs.link_of_segments(geometry.expert_bytes)
        return _moerun.Planner(
            num_experts=geometry.num_experts,
            top_k=geometry.top_k,
            records=geometry.records,
            record_bytes=geometry.record_bytes,
            attention_s=costs.attention_s,
            moe_s=costs.moe_s,
            prompt_s=costs.prompt_s,
            head_s=costs.head_s,
            link_fixed_s=link_fixed_s,
            link_bytes_per_s=link_bytes_per_s,
            link_channels=costs.link_channels,
            slowdown=costs.slowdown,
            wake_s=costs.wake_s,
            hit_rate=np.ascontiguousarray(hit_rate, np.float64),
            correctness=np.ascontiguousarray(guesses),
            missing=missing,
            absent=curves.absent if knows_absent else None,
            absent_right=curves.absent_right if knows_absent else None,
            move_pieces=geometry.move_pieces,
            move_bytes=geometry.move_bytes,
            split=-1.0 if self.split is None else self.split,
        )

    def check_budget(self, budget_bytes: int) -> int:
        """Return a budget that can work."""
        budget = check_int("budget_bytes", budget_bytes, 1, 2**50)
        smallest = self.geometry.ring_bytes
        if budget < smallest:
            raise OutOfMemoryError(
                f"a budget of {size_text(budget, 'down')} does not hold the experts that one token "
                f"uses in a layer: the smallest that works is {size_text(smallest, 'up')}"
            )
        return budget

    def plan(self, choice: Choice, budget: int) -> Plan:
        """Return the plan that was chosen."""
        geometry, curves, settings = self.geometry, self.curves, choice.settings
        planner = self.planners[choice.prefetch]
        estimate = planner.estimate(settings)
        layers = []
        for index, (slots, records) in enumerate(settings):
            is_static = curves.policy == "static"
            layers.append(
                PlannedLayer(
                    layer=geometry.moe_layers[index],
                    slots=slots,
                    split=records / geometry.records,
                    experts=tuple(curves.ranking[index, :slots].tolist()) if is_static else (),
                    hit_rate=estimate["layers"][index]["hit_rate"],
                    stalled_ms=1e3 * estimate["layers"][index]["exposed_s"],
                )
            )
        return Plan(
            model=geometry.model,
            policy=curves.policy,
            prefetch="auto" if self.prefetch else "off",
            budget_bytes=budget,
            arena_bytes=planner.bytes_of(settings) + geometry.ring_bytes,
            is_resident=False,
            layers=tuple(layers),
            predicted=Prediction(
                hit_rate=estimate["hit_rate"],
                tpot_ms=1e3 * estimate["seconds"],
                stalled_ms=1e3 * estimate["exposed_s"],
                ttft_ms=1e3 * self._prompt_seconds(settings),
                bytes_per_token=estimate["bytes"],
                prompt_tokens=self.prompt_tokens,
            ),
            model_id=geometry.model_id,
        )

    def resident_plan(self, budget: int) -> Plan:
        """Return what there is to expect with every expert in memory."""
        geometry = self.geometry
        everything = [(geometry.num_experts, geometry.records)] * len(geometry.moe_layers)
        return Plan(
            model=geometry.model,
            policy=self.curves.policy,
            prefetch="auto" if self.prefetch else "off",
            budget_bytes=budget,
            arena_bytes=geometry.total_bytes,
            is_resident=True,
            layers=tuple(
                PlannedLayer(layer, geometry.num_experts, 1.0, (), 1.0, 0.0)
                for layer in geometry.moe_layers
            ),
            predicted=Prediction(
                hit_rate=1.0,
                tpot_ms=1e3 * self.costs.resident_s,
                stalled_ms=0.0,
                ttft_ms=1e3 * self._prompt_seconds(everything),
                bytes_per_token=0.0,
                prompt_tokens=self.prompt_tokens,
            ),
            model_id=geometry.model_id,
        )

    def _prompt_seconds(self, settings: Settings) -> float:
        return self.planners[False].prompt_seconds(settings, self.prompt_tokens, self.prefill_chunk)


def _check_same_model(curves: LayerCurves, costs: CostModel, geometry: Geometry) -> None:
    for name, value, kind in (
        ("curves", curves, LayerCurves),
        ("costs", costs, CostModel),
        ("geometry", geometry, Geometry),
    ):
        if not isinstance(value, kind):
            raise InvalidArgumentError(
                f"{name} must be a moerun.planning.{kind.__name__}, not {type(value).__name__}"
            )
    for name in ("moe_layers", "num_experts", "top_k"):
        of_trace, of_model = getattr(curves, name), getattr(geometry, name)
        if of_trace != of_model:
            raise InvalidArgumentError(
                f"the trace is of another model: its {name} is {shown(of_trace)}, that of "
                f"{geometry.model} is {shown(of_model)}"
            )
    if 0 < curves.num_tokens < LEAST_TOKENS:
        raise InvalidArgumentError(
            f"the trace has {curves.num_tokens} tokens, which says too little about a cache: "
            f"record at least {LEAST_TOKENS}, better some thousands"
        )
    if costs.num_layers != len(geometry.moe_layers):
        raise InvalidArgumentError(
            f"the costs are of another model: they have {costs.num_layers} layers with experts, "
            f"{geometry.model} has {len(geometry.moe_layers)}"
        )
