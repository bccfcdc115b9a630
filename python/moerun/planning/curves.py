"""Hit rates of every layer at every number of slots, from a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import FormatError, InvalidArgumentError
from moerun.metrics.groups import num_threads, parts_of
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
    workers = num_threads(threads)
    layers, experts = len(trace.moe_layers), trace.num_experts
    hits = np.zeros((layers, experts + 1), np.uint64)
    optimal = np.zeros((layers, experts + 1), np.uint64)
    used = np.zeros((layers, experts), np.uint64)
    for part in parts_of(trace):
        used += _moerun.num_activations(part.arrays, workers).sum(axis=0)
        optimal += _moerun.slot_hits(part.arrays, "optimal", restart, workers)
        if policy != "static":
            hits += _moerun.slot_hits(part.arrays, policy, restart, workers)
    lookups = trace.num_tokens * trace.top_k
    ranking = np.argsort(-used.astype(np.int64), axis=1, kind="stable")
    static = np.zeros((layers, experts + 1))
    static[:, 1:] = np.take_along_axis(used, ranking, axis=1).cumsum(axis=1) / lookups
    measured = "prefetch_ids" in trace.tensors
    return LayerCurves(
        model=trace.model,
        policy=policy,
        moe_layers=tuple(trace.moe_layers),
        num_experts=experts,
        top_k=trace.top_k,
        hit_rate=static if policy == "static" else hits / lookups,
        optimal=optimal / lookups,
        static=static,
        ranking=ranking,
        correctness=(
            _measured_correctness(trace) if measured else _default_correctness(layers, trace.top_k)
        ),
        correctness_measured=measured,
    )


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


def _measured_correctness(trace: Trace) -> NDArray[np.float64]:
    right = np.zeros((len(trace.moe_layers), trace.top_k))
    for shard in trace.shards():
        guesses, ids = shard.tensor("prefetch_ids"), shard.expert_ids
        is_token = np.arange(ids.shape[2]) < shard.lengths[:, None]  # (S, T)
        for layer in range(ids.shape[1]):
            named, active = guesses[:, layer][is_token], ids[:, layer][is_token]  # (tokens, k)
            if ((named >= trace.num_experts) & (named != NO_PREDICTION)).any():
                raise FormatError(
                    f"{shard.file}: prefetch_ids of layer {trace.moe_layers[layer]}: expected "
                    f"experts from 0 to {trace.num_experts - 1}, or {NO_PREDICTION} for none, "
                    f"found up to {named[named != NO_PREDICTION].max()}"
                )
            for rank in range(trace.top_k):
                right[layer, rank] += (named[:, rank, None] == active).any(axis=1).sum()
    result: NDArray[np.float64] = right / trace.num_tokens
    return result
