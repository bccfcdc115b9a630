"""What an expert cache would have done with recorded routing, and how long it would have taken."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, check_number, check_rate, check_seconds, shown
from moerun.batch import scheduling_options
from moerun.cache_control import CacheEvent
from moerun.cache_options import Prefetch, Split, cache_options
from moerun.errors import InvalidArgumentError
from moerun.hub import resolve_model
from moerun.packs import folder_of
from moerun.plan_files import check_plan_model
from moerun.trace import SequenceRouting, Trace

Seconds = float | Sequence[float]

_MOST = 2**31 - 1


class Costs(Protocol):
    """What the parts of a pass take; `moerun.SimulationCosts`, or anything with these attributes.

    `slowdown`, `wake_s`, `link_channels` and `predict_s`, too, if it has them.
    """

    @property
    def attention_s(self) -> Seconds:
        """A token, before its routing."""

    @property
    def moe_s(self) -> Seconds:
        """A token's experts, all resident."""

    @property
    def prompt_s(self) -> Seconds:
        """Both, for a token of a prompt."""

    @property
    def head_s(self) -> float:
        """A token, after the last layer."""

    @property
    def link_fixed_s(self) -> float:
        """Each piece that is moved."""

    @property
    def link_bytes_per_s(self) -> float:
        """Rate of the slow tier."""


@dataclass(frozen=True)
class SimulationCosts:
    """Times of a model on a machine, in seconds; L layers with experts.

    Attributes:
        attention_s: a token, from the end of the last expert block to this layer's routing; layers
            without experts in between belong to it. One number for all layers, or (L).
        moe_s: a token's expert block, shared expert included, with every expert resident; one
            number or (L).
        prompt_s: both together, for each token of a prompt; one number or (L).
        head_s: a token, from the end of the last expert block to the next token.
        link_bytes_per_s: rate at which experts come from the slow tier.
        link_fixed_s: what each piece of a transfer takes besides (docs/simulation.md).
        link_channels: pieces that are under way at once: their fixed times run beside each other,
            their bytes take turns.
        slowdown: so much of its time longer takes what is computed while the link is busy.
        wake_s: so much longer takes a layer that has to wait for segments, besides the waiting.
        predict_s: what a predictor takes for each sequence whose experts it predicts.
    """

    attention_s: Seconds
    moe_s: Seconds
    prompt_s: Seconds
    head_s: float
    link_bytes_per_s: float
    link_fixed_s: float = 0.0
    slowdown: float = 0.0
    wake_s: float = 0.0
    link_channels: int = 1
    predict_s: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """What came out of a simulation.

    Attributes:
        cache: what the cache counted, in all and for each layer: the dict that
            `Model.stats()["cache"]` is after a run, with the same names.
        ttft_s: (sequences) time to first token of each; empty without a prompt.
        token_s: (tokens) time of each decoded token; in a batch, of the step that gave it.
        moved_bytes: read from the slow tier, prompts and what was in vain included.
        seconds: time of all sequences together.
        batch: None, or with `batch_size` what the batch has come to, on virtual time: the dict that
            `Model.stats()["batch"]` is after a run, with the same names but `kv_cache`.
        events: what happened, in order, as `Model.cache_events()` has it; empty unless asked for.
    """

    cache: dict[str, Any]
    ttft_s: NDArray[np.float64]
    token_s: NDArray[np.float64]
    moved_bytes: int
    seconds: float
    batch: dict[str, Any] | None = None
    events: list[CacheEvent] = field(default_factory=list, repr=False)

    @property
    def hit_rate(self) -> float | None:
        """Share of the active experts that were whole in their slots; None without a cache."""
        rate: float | None = self.cache["total"]["hit_rate"]
        return rate

    @property
    def tpot_s(self) -> float:
        """Mean time per output token; in a batch, of the steps that the tokens came from."""
        return float(self.token_s.mean())

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens of all sequences for each second of decoding; None if it took no time."""
        if self.batch is not None:
            rate: float | None = self.batch["decode_tokens_per_s"]
            return rate
        return 1 / self.tpot_s if self.tpot_s > 0 else None

    @property
    def stall_s(self) -> list[float]:
        """Seconds that decoding waited for segments, for each layer with a cache."""
        return [layer["stalled_s"] for layer in self.cache["layers"]]

    def tpot_percentile(self, percent: float) -> float:
        """Return the time per output token that `percent` % of the tokens do not exceed."""
        return float(np.percentile(self.token_s, check_number("percent", percent, 0, 100)))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers, lists and dicts; without events."""
        return {
            "tokens": len(self.token_s),
            "tpot_s": {
                "mean": self.tpot_s,
                "p50": self.tpot_percentile(50),
                "p99": self.tpot_percentile(99),
            },
            "ttft_s": {
                "mean": float(self.ttft_s.mean()) if len(self.ttft_s) != 0 else None,
                "max": float(self.ttft_s.max()) if len(self.ttft_s) != 0 else None,
            },
            "tokens_per_s": self.tokens_per_s,
            "moved_bytes": self.moved_bytes,
            "seconds": self.seconds,
            "cache": self.cache,
            "batch": self.batch,
        }


def simulate(
    trace: Trace | SequenceRouting | Sequence[SequenceRouting] | str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    costs: Costs,
    prompt_tokens: int = 0,
    prefill_chunk: int = 512,
    context_length: int | None = None,
    expert_budget: str | int | None = None,
    policy: str | None = None,
    split: Split | None = None,
    prefetch: Prefetch | None = None,
    plan: str | os.PathLike[str] | None = None,
    pack: bool | str | os.PathLike[str] = False,
    cache_events: bool = False,
    batch_size: int | None = None,
    predictor: str | os.PathLike[str] | None = None,
    schedule: bool | None = None,
) -> Simulation:
    """Run the expert cache over recorded routing on virtual time; nothing is loaded or computed.

    The sequences run one after the other, or with `batch_size` together, on one model, whose cache
    stays warm. Look-ups, hits, loads and evictions are those of a live run with the same routing
    and options; times are as good as `costs`.

    Args:
        trace: a trace or its path, or routing as `Model.trace` returns it.
        model: as for `Model.load`; of its weights, the headers are read, and with `plan`
            or `pack` samples.
        costs: what the parts of a pass take; a `SimulationCosts`.
        prompt_tokens: so many first tokens of every sequence are its prompt; 0 decodes all of it.
        prefill_chunk: most tokens of a prompt that go through the layers together.
        context_length: as for `Model.load`.
        expert_budget: as for `Model.load`.
        policy: as for `Model.load`; or "belady", which knows the future: what no policy can beat.
        split: as for `Model.load`.
        prefetch: as for `Model.load`; needs recorded predictions (`moe-trace record
            --with-prefetch`). None, or "auto" without predictions, is without.
        plan: as for `Model.load`.
        pack: as for `Model.load`; no file is written.
        cache_events: keep what happens, and leave the cache on, as `Model.load` does.
        batch_size: so many sequences decode together, as in `Model.batch`; those that come later
            in the trace join as others end. None: one sequence after the other.
        predictor: as for `Model.batch`; the trace must have the token ids.
        schedule: as for `Model.batch`, but not "auto", which compares measured times. None for
            True with a predictor, else False.

    Raises:
        InvalidArgumentError: an argument is out of its range, the trace is of another model, a
            sequence is too short, prefetch is to be on without predictions, or a predictor has no
            batch, no token ids or is missing where batches are to be scheduled.
        OutOfMemoryError: the budget is smaller than the smallest that works.
        MissingFileError, FileError, FormatError, UnsupportedModelError: as `Model.load`,
            `Trace.open` and, for the predictor, `Model.batch`.
    """
    directory = resolve_model(model)
    routings, recorded = _routing(trace)
    is_belady = policy == "belady"
    options = {
        "context_length": context_length and check_int("context_length", context_length, 1),
        "prefill_chunk": check_int("prefill_chunk", prefill_chunk, 1),
        "pack_folder": folder_of(pack),
        "cache_events": bool(cache_events),
        **cache_options(expert_budget, "lru" if is_belady else policy, split, prefetch, plan),
    }
    check_plan_model(options.get("plan"), directory)
    has_predictions = all(routing.prefetch_ids is not None for routing in routings)
    result = _moerun.simulate(
        os.fsencode(directory),
        [_ids("expert_ids", routing.expert_ids) for routing in routings],
        [_ids("prefetch_ids", routing.prefetch_ids) for routing in routings]
        if has_predictions
        else None,
        None if predictor is None else [_token_ids(routing) for routing in routings],
        **recorded,
        **_costs(costs, len(routings[0].expert_ids)),
        prompt_tokens=check_int("prompt_tokens", prompt_tokens, 0),
        belady=is_belady,
        batch_size=0 if batch_size is None else check_int("batch_size", batch_size, 1, _MOST),
        **_scheduling(directory, predictor, schedule),
        **{name: value for name, value in options.items() if value is not None},
    )
    events = [CacheEvent(*event) for event in result.pop("events")]
    return Simulation(**result, events=events)


def _routing(trace: Any) -> tuple[list[SequenceRouting], dict[str, Any]]:
    """Return the sequences, and what is known of the model that they are of."""
    if isinstance(trace, (str, os.PathLike)):
        trace = Trace.open(trace)
    if isinstance(trace, Trace):
        recorded = {
            "num_experts": trace.num_experts,
            "top_k": trace.top_k,
            "moe_layers": trace.moe_layers,
        }
        return list(sequences_of(trace)), recorded
    routings = [trace] if isinstance(trace, SequenceRouting) else trace
    is_routing = isinstance(routings, (list, tuple)) and len(routings) != 0
    if not is_routing or not all(isinstance(each, SequenceRouting) for each in routings):
        raise InvalidArgumentError(
            "trace must be a Trace, the path of one, or routing of at least one sequence as "
            f"Model.trace returns it, not {shown(trace)}"
        )
    return list(routings), {"num_experts": None, "top_k": None, "moe_layers": None}


def sequences_of(trace: Trace) -> Iterator[SequenceRouting]:
    """Yield the sequences of a trace, with what `simulate` needs of them."""
    has_predictions = "prefetch_ids" in trace.tensors
    has_tokens = "token_ids" in trace.tensors
    for shard in trace.shards():
        predictions = shard.tensor("prefetch_ids") if has_predictions else None
        tokens = shard.tensor("token_ids") if has_tokens else None
        for number, length in enumerate(shard.lengths):
            yield SequenceRouting(
                shard.expert_ids[number, :, :length],
                None if tokens is None else tokens[number, :length],
                prefetch_ids=None if predictions is None else predictions[number, :, :length],
            )


def _scheduling(
    directory: Path, predictor: str | os.PathLike[str] | None, schedule: bool | None
) -> dict[str, Any]:
    """Return the predictor and the schedule as the native module takes them."""
    if schedule is None:
        schedule = predictor is not None
    if schedule is not True and schedule is not False:
        raise InvalidArgumentError(
            f"schedule must be True or False, not {shown(schedule)}: a simulation does not know "
            "what predicting takes, so it cannot find out whether it pays"
        )
    return scheduling_options(directory, predictor, schedule)


def _token_ids(routing: SequenceRouting) -> NDArray[np.int32]:
    """Return the token ids of a sequence; none where they are not known."""
    if routing.token_ids is None:
        return np.empty(0, np.int32)
    ids = np.asarray(routing.token_ids)
    if ids.shape != (routing.num_tokens,) or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidArgumentError(
            f"token_ids must be {routing.num_tokens} integers, one a token, not {ids.dtype} of the "
            f"shape {ids.shape}"
        )
    return np.ascontiguousarray(ids, dtype=np.int32)


def _ids(name: str, array: Any) -> NDArray[np.uint16]:
    ids = np.asarray(array)
    is_valid = ids.ndim == 3 and np.issubdtype(ids.dtype, np.integer) and ids.size != 0
    if not is_valid or ids.min() < 0 or ids.max() > np.iinfo(np.uint16).max:
        raise InvalidArgumentError(
            f"{name} must be integers from 0 to 65535 of the shape (layers, tokens, top_k), not "
            f"{ids.dtype} of the shape {ids.shape}"
        )
    return np.ascontiguousarray(ids, dtype=np.uint16)


def _costs(costs: Any, num_layers: int) -> dict[str, Any]:
    """Return the costs as the native module takes them, a number for each layer."""
    names = ("attention_s", "moe_s", "prompt_s", "head_s", "link_fixed_s", "link_bytes_per_s")
    missing = [name for name in names if not hasattr(costs, name)]
    if missing:
        raise InvalidArgumentError(
            f"costs must be a SimulationCosts, not {shown(costs)}, which has no {missing[0]}"
        )

    def per_layer(name: str) -> list[float]:
        value = getattr(costs, name)
        if isinstance(value, (list, tuple, np.ndarray)):
            return [check_seconds(f"{name}[{idx}]", each) for idx, each in enumerate(value)]
        return [check_seconds(name, value)] * num_layers

    return {
        "attention_s": per_layer("attention_s"),
        "moe_s": per_layer("moe_s"),
        "prompt_s": per_layer("prompt_s"),
        "head_s": check_seconds("head_s", costs.head_s),
        "link_fixed_s": check_seconds("link_fixed_s", costs.link_fixed_s),
        "link_channels": check_int("link_channels", getattr(costs, "link_channels", 1), 1, 1024),
        "slowdown": check_seconds("slowdown", getattr(costs, "slowdown", 0.0)),
        "wake_s": check_seconds("wake_s", getattr(costs, "wake_s", 0.0)),
        "predict_s": check_seconds("predict_s", getattr(costs, "predict_s", 0.0)),
        "link_bytes_per_s": check_rate("link_bytes_per_s", costs.link_bytes_per_s),
    }
