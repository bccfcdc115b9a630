"""Plans that were tried: the cost model proposes, the simulator decides."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moerun.arguments import check_int
from moerun.errors import InvalidArgumentError
from moerun.planning.costs import CostModel
from moerun.planning.curves import layer_curves
from moerun.planning.geometry import Geometry
from moerun.planning.plans import Plan, Prediction, Problem, Settings, best_of
from moerun.simulation import sequences_of, simulate
from moerun.sizes import size_text
from moerun.trace import SequenceRouting, Trace

# Policies that a plan may choose from; static is left out, as it has seen the trace it is tried on.
CHOICES = ("lcp", "lfu", "lru")
_UNIFORM_SPLITS = (1.0, 0.75, 0.5)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A plan that was simulated.

    Attributes:
        name: what it is: "planned", or one of the simple configurations.
        prefetch: whether the simulation read ahead.
        plan: its configuration, with what the simulation found as `predicted`.
        modelled_tpot_ms: what the cost model had expected.
    """

    name: str
    prefetch: bool
    plan: Plan
    modelled_tpot_ms: float

    @classmethod
    def of(cls, name: str, prefetch: bool, plan: Plan) -> Trial:
        """Return what the cost model says of a plan; nothing has been simulated."""
        return cls(name, prefetch, plan, plan.predicted.tpot_ms)


def find_plan(
    trace: Trace,
    model: str | os.PathLike[str] | None = None,
    *,
    costs: CostModel,
    budget_bytes: int,
    policies: Sequence[str] = CHOICES,
    prefetch: bool = True,
    split: float | None = None,
    pack: bool | str | os.PathLike[str] = False,
    prompt_tokens: int = 512,
    prefill_chunk: int = 512,
    max_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Plan, list[Trial]]:
    """Return the plan that takes the least time in a simulation, and all that were tried.

    Tried are the plans of `make_plan` with and without prefetch, those for one split everywhere,
    uniform ones, and prefetch without slots. So the plan is never slower, as simulated, than any
    of these. A prompt's time is that of the cost model.

    Args:
        trace: the routing; with `prefetch_ids` (moe-trace record --with-prefetch) prefetch is
            tried, without them it is not.
        model: as for `Model.load`; only its configuration and headers are read.
        costs: times on the machine, on the CPU.
        budget_bytes: for slots and staging ring together, less than all experts take.
        policies: of which one is chosen: "lcp", "lfu", "lru", "static".
        prefetch: whether the cache may read ahead.
        split: one split for all layers; None lets each layer have its own.
        pack: whether experts would come from a record file, as for `Model.load`.
        prompt_tokens: length of the prompt of the predicted time to first token.
        prefill_chunk: as of `Model.load`.
        max_tokens: so many of the trace are simulated, roughly: whole sequences, evenly spaced.
        progress: called with the number of simulations done and their number.

    Raises:
        InvalidArgumentError: an argument is out of its range, or does not fit the model.
        OutOfMemoryError: the budget does not hold the staging ring.
        FormatError: the trace holds wrong ids.
    """
    check_int("max_tokens", max_tokens, 1)
    if not policies:
        raise InvalidArgumentError("policies: expected at least one, found none")
    geometry = Geometry.of_model(model, "cpu", pack)
    may_prefetch = prefetch and "prefetch_ids" in trace.tensors
    trials: dict[str, Trial] = {}
    for policy in policies:
        problem = Problem(
            layer_curves(trace, policy),
            costs,
            geometry,
            may_prefetch,
            split,
            prompt_tokens,
            prefill_chunk,
        )
        budget = problem.check_budget(budget_bytes)
        if budget >= geometry.total_bytes:
            raise InvalidArgumentError(
                f"every expert fits in {size_text(budget, 'down')} (they take "
                f"{size_text(geometry.total_bytes, 'up')}): there is nothing to plan"
            )
        for trial in _candidates(problem, budget, split):
            trials.setdefault(_key(trial), trial)
    # The simulations take the time: those of which the cost model expects nothing are left out.
    wanted = sorted(trials.values(), key=lambda trial: trial.modelled_tpot_ms)
    limit = 1.25 * wanted[0].modelled_tpot_ms
    wanted = [trial for trial in wanted if trial.modelled_tpot_ms <= limit]
    sequences = _sample(trace, max_tokens)
    tried = []
    for done, trial in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted))
        tried.append(_simulated(trial, sequences, model, costs, pack))
    if progress is not None:
        progress(len(wanted), len(wanted))
    tried.sort(key=lambda trial: trial.plan.predicted.tpot_ms)
    return tried[0].plan, tried


def _candidates(problem: Problem, budget: int, split: float | None) -> Iterator[Trial]:
    slot_bytes = budget - problem.geometry.ring_bytes
    for prefetch, planner in problem.planners.items():
        made = {"planned": _dividing(slot_bytes)}
        for each in _UNIFORM_SPLITS if split is None else (split,):
            made[f"uniform, split {each:g}"] = _uniform(slot_bytes, each)
        if prefetch and split is None:
            made["prefetch only"] = _uniform(slot_bytes, 0.0)
        for name, make in made.items():
            choice = best_of({prefetch: planner}, make)
            yield Trial.of(name, prefetch, problem.plan(choice, budget))


def _dividing(slot_bytes: int) -> Callable[..., Settings]:
    return lambda planner: planner.divide(slot_bytes)


def _uniform(slot_bytes: int, split: float) -> Callable[..., Settings]:
    return lambda planner: planner.uniform(slot_bytes, split)


def _key(trial: Trial) -> str:
    """Return what two trials that do the same have in common."""
    plan = trial.plan
    layers = [(layer.slots, layer.split, layer.experts) for layer in plan.layers]
    return repr((plan.policy if any(slots for slots, *_ in layers) else "", trial.prefetch, layers))


def _sample(trace: Trace, max_tokens: int) -> list[SequenceRouting]:
    # From all over the trace: kinds of text follow one another in it.
    step = max(1.0, trace.num_tokens / max_tokens)
    found: list[SequenceRouting] = []
    for number, sequence in enumerate(sequences_of(trace)):
        if number >= step * len(found):
            found.append(sequence)
    return found


def _simulated(
    trial: Trial,
    sequences: list[SequenceRouting],
    model: str | os.PathLike[str] | None,
    costs: CostModel,
    pack: bool | str | os.PathLike[str],
) -> Trial:
    plan = trial.plan
    with tempfile.TemporaryDirectory(prefix="moerun-plan-") as folder:
        file = Path(folder) / "plan.json"
        file.write_text(plan.to_json(), encoding="utf-8")
        found = simulate(
            sequences,
            model,
            costs=costs,
            plan=file,
            pack=pack,
            prefetch=trial.prefetch,
        )
    tokens = len(found.token_s)
    total = found.cache["total"]
    predicted = Prediction(
        hit_rate=(total["hits"] + total["top_hits"]) / total["lookups"],
        tpot_ms=1e3 * found.tpot_s,
        stalled_ms=1e3 * sum(found.stall_s) / tokens,
        ttft_ms=plan.predicted.ttft_ms,
        bytes_per_token=found.moved_bytes / tokens,
        prompt_tokens=plan.predicted.prompt_tokens,
    )
    layers = tuple(
        dataclasses.replace(
            layer,
            hit_rate=(seen["hits"] + seen["top_hits"]) / max(1, seen["lookups"]),
            stalled_ms=1e3 * seen["stalled_s"] / tokens,
        )
        for layer, seen in zip(plan.layers, found.cache["layers"], strict=True)
    )
    return dataclasses.replace(
        trial, plan=dataclasses.replace(plan, predicted=predicted, layers=layers)
    )
