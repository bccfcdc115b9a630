"""Hit rates of every layer at every number of slots, from a trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import FormatError, InvalidArgumentError
from moerun.metrics.groups import num_threads
from moerun.trace import NO_PREDICTION, Trace

POLICIES = ("lru", "lfu", "lcp", "static")
# Where a trace does not say (docs/DESIGN.md, section 10): a layer's router, applied to the state of
# the layer before, names 72 to 89 % right; the first layer is predicted from the previous token,
# whose experts come again in 18 to 43 %. The likeliest guess gets the most, the last the least.
_DEFAULT_CORRECTNESS = (0.89, 0.72)
_DEFAULT_OF_FIRST_LAYER = (0.43, 0.18)


@dataclass(frozen=True, eq=False)
class LayerCurves:
    """What a trace says about caches of one model; L layers, E experts each, k of them active.

    Attributes:
        model: name of the model.
        policy: whose hit rates these are.
        moe_layers: numbers of the layers.
        num_experts: E.
        top_k: k.
        hit_rate: (L, E + 1) float64, at 0 ... E slots. First uses are misses.
        optimal: (L, E + 1) the same for a cache that knows the future and may leave experts out:
            no policy has more hits.
        static: (L, E + 1) the same for the experts used most in this trace, in their slots from
            the start: no other choice of experts that stay has more hits here.
        ranking: (L, E) experts, the most used first.
        correctness: (L, k) share of tokens for which the r-th expert named in advance is used.
        correctness_measured: whether the trace has predictions; otherwise `correctness` is what
            the literature reports for other models.
        missing: (L, k + 1, E + 1) share of tokens of which 0 ... k experts have no slot.
        optimal_missing: the same for the cache of `optimal`.
        absent: (L, k, E + 1) share of tokens whose r-th expert named in advance has no slot; None
            if that was not measured.
        absent_right: (L, k, E + 1) and is used; None if that was not measured.
        num_tokens: of the trace; 0 if that is not known.
    """

    model: str
    policy: str
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hit_rate: NDArray[np.float64]
    optimal: NDArray[np.float64]
    static: NDArray[np.float64]
    ranking: NDArray[np.int64]
    correctness: NDArray[np.float64]
    correctness_measured: bool
    missing: NDArray[np.float64] | None = None
    optimal_missing: NDArray[np.float64] | None = None
    absent: NDArray[np.float64] | None = None
    absent_right: NDArray[np.float64] | None = None
    num_tokens: int = 0


def layer_curves(
    trace: Trace, policy: str = "lcp", *, restart: bool = False, threads: int | None = None
) -> LayerCurves:
    """Return the hit rates that the live cache would have had on a trace, and their bounds.

    All tokens are taken as decoded, one after the other, by the rules of the live cache
    (docs/cache.md) and with its own policy objects.

    Args:
        trace: the routing.
        policy: "lru", "lfu", "lcp" or "static".
        restart: every sequence starts with empty slots. Otherwise sequences follow one another,
            as they do for a model that stays loaded, and only each file of the trace starts anew.
        threads: number of CPU threads; None for one a core.

    Raises:
        InvalidArgumentError: an argument is out of its range.
        FormatError: the trace holds wrong expert ids.
    """
    if not isinstance(trace, Trace):
        raise InvalidArgumentError(
            f"trace must be a moerun.Trace, not {type(trace).__name__}; moerun.Trace.open(path) "
            "gives one"
        )
    if policy not in POLICIES:
        raise InvalidArgumentError(f"policy: expected {', '.join(POLICIES)}, found {policy!r}")
    pieces = (
        RoutingPart(
            shard.expert_ids,
            shard.lengths,
            shard.tensor("prefetch_ids") if "prefetch_ids" in trace.tensors else None,
            str(shard.file),
        )
        for shard in trace.shards()
    )
    return curves_of(
        pieces,
        policy,
        model=trace.model,
        moe_layers=tuple(trace.moe_layers),
        num_experts=trace.num_experts,
        restart=restart,
        threads=threads,
    )


@dataclass(frozen=True, eq=False)
class RoutingPart:
    """Routing of some sequences: ids (S, L, T, k), lengths (S), guesses as the ids or none; and
    where it is from."""

    expert_ids: NDArray[Any]
    lengths: NDArray[np.int32]
    prefetch_ids: NDArray[np.uint16] | None = None
    where: str = "routing"


def curves_of(
    parts: Iterable[RoutingPart],
    policy: str,
    *,
    model: str,
    moe_layers: tuple[int, ...],
    num_experts: int,
    restart: bool = False,
    threads: int | None = None,
) -> LayerCurves:
    """Return the curves of routing that is in memory, part after part; at least one token.

    Each part starts with empty slots; all of them have guesses, or none.

    Raises:
        FormatError: an id is wrong.
    """
    workers = num_threads(threads)
    layers, columns = len(moe_layers), num_experts + 1
    totals: list[_Counts] = []
    used = np.zeros((layers, num_experts), np.int64)
    read = list(parts)
    arrays = [_moerun.TraceArrays(part.expert_ids, part.lengths, num_experts) for part in read]
    for each in arrays:
        used += _moerun.num_activations(each, workers).sum(axis=0).astype(np.int64)
    ranking = np.argsort(-used, axis=1, kind="stable")
    top_k = read[0].expert_ids.shape[3]
    guessed = read[0].prefetch_ids is not None
    for name in (policy, "optimal"):
        total = _Counts.zeros(layers, top_k, columns)
        for part, each in zip(read, arrays, strict=True):
            guesses = None
            if part.prefetch_ids is not None:
                guesses = np.ascontiguousarray(part.prefetch_ids, np.uint16)
            order = np.ascontiguousarray(ranking, np.uint16) if name == "static" else None
            try:
                total += _Counts(
                    *_moerun.slot_statistics(each, guesses, name, order, restart, workers)
                )
            except InvalidArgumentError as error:
                raise FormatError(f"{part.where}: prefetch_ids: {error}") from None
        totals.append(total)
    tokens = int(sum(int(part.lengths.sum()) for part in read))
    live, ideal = totals
    lookups = tokens * top_k
    static = np.zeros((layers, columns))
    static[:, 1:] = np.take_along_axis(used, ranking, axis=1).cumsum(axis=1) / lookups
    return LayerCurves(
        model=model,
        policy=policy,
        moe_layers=moe_layers,
        num_experts=num_experts,
        top_k=top_k,
        hit_rate=live.hits() / lookups,
        optimal=ideal.hits() / lookups,
        static=static,
        ranking=ranking,
        correctness=live.right / tokens if guessed else _default_correctness(layers, top_k),
        correctness_measured=guessed,
        missing=live.missing / tokens,
        optimal_missing=ideal.missing / tokens,
        absent=live.absent / tokens if guessed else None,
        absent_right=live.absent_right / tokens if guessed else None,
        num_tokens=tokens,
    )


@dataclass(frozen=True, eq=False)
class _Counts:
    """What the native module counts: tokens, by layer, number or rank of experts, and slots."""

    missing: NDArray[np.uint64]
    right: NDArray[np.uint64]
    absent: NDArray[np.uint64]
    absent_right: NDArray[np.uint64]

    @classmethod
    def zeros(cls, layers: int, top_k: int, columns: int) -> _Counts:
        return cls(
            np.zeros((layers, top_k + 1, columns), np.uint64),
            np.zeros((layers, top_k), np.uint64),
            np.zeros((layers, top_k, columns), np.uint64),
            np.zeros((layers, top_k, columns), np.uint64),
        )

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(
            *(
                mine + theirs
                for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )

    def hits(self) -> NDArray[np.uint64]:
        """Return the hits, (L, columns)."""
        top_k = self.missing.shape[1] - 1
        served = np.arange(top_k, -1, -1, dtype=np.uint64)
        result: NDArray[np.uint64] = (self.missing * served[:, None]).sum(axis=1)
        return result


def replay_hits(
    expert_ids: NDArray[np.integer],
    num_experts: int,
    policy: str = "lcp",
    *,
    start: Sequence[Sequence[int]] | None = None,
    static_experts: Sequence[Sequence[int]] | None = None,
) -> NDArray[np.uint64]:
    """Return the hits of the live cache on the tokens of one sequence, at every number of slots.

    Args:
        expert_ids: (L, T, k), experts in the router's order, all different within a token.
        num_experts: routed experts of a layer, E.
        policy: "lru", "lfu", "lcp" or "static".
        start: for each layer the experts that a prompt puts into empty slots, in that order; None
            for none.
        static_experts: for each layer the experts of policy "static".

    Returns:
        (L, E + 1) uint64: hits with 0 ... E slots.

    Raises:
        InvalidArgumentError: an id or a shape is wrong.
    """
    experts = check_int("num_experts", num_experts, 1, NO_PREDICTION)
    if policy not in POLICIES:
        raise InvalidArgumentError(f"policy: expected {', '.join(POLICIES)}, found {policy!r}")
    ids = np.asarray(expert_ids)
    if ids.ndim != 3 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidArgumentError(
            f"expert_ids: expected integers of shape (L, T, k), found {ids.dtype} of {ids.shape}"
        )
    _check_ids("expert_ids", ids, experts)
    starts = _lists("start", start, len(ids), experts)
    statics = _lists("static_experts", static_experts, len(ids), experts)
    return np.stack(
        [
            _moerun.policy_hits(
                policy,
                experts,
                np.array(first, np.uint16),
                np.ascontiguousarray(tokens, np.uint16),
                chosen,
            )
            for tokens, first, chosen in zip(ids, starts, statics, strict=True)
        ]
    )


def _lists(
    name: str, lists: Sequence[Sequence[int]] | None, layers: int, experts: int
) -> list[list[int]]:
    if lists is None:
        return [[] for _ in range(layers)]
    if len(lists) != layers:
        raise InvalidArgumentError(
            f"{name}: expected a list for each of {layers} layers, found {len(lists)}"
        )
    return [[check_int(name, each, 0, experts - 1) for each in ids] for ids in lists]


def _check_ids(name: str, ids: NDArray[np.integer], experts: int) -> None:
    if ids.min() < 0 or ids.max() >= experts:
        raise InvalidArgumentError(
            f"{name}: expected experts from 0 to {experts - 1}, found {ids.min()} to {ids.max()}"
        )


def _default_correctness(layers: int, top_k: int) -> NDArray[np.float64]:
    table = np.tile(np.linspace(*_DEFAULT_CORRECTNESS, top_k), (layers, 1))
    table[0] = np.linspace(*_DEFAULT_OF_FIRST_LAYER, top_k)
    return table
