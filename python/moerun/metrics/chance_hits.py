"""Hit rates that chance gives: the policies replayed over routing that has no memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import InvalidArgumentError
from moerun.metrics.cache_hits import POLICIES
from moerun.metrics.expert_load import sequence_rates
from moerun.metrics.frames import Rows
from moerun.metrics.groups import make_groups, num_threads
from moerun.trace import Trace

USES = ("same", "even")
_MAX_ACTIVATIONS = 1 << 18  # drawn; the rates are then known to about 0.1 points
_MAX_NUMBERS = 1 << 24  # drawn: an expert's place in the order of a token
_MAX_BLOCK = 1 << 21


def chance_hit_rate(
    trace: Trace,
    policies: Sequence[str] = POLICIES,
    segment_length: int = 16,
    seed: int = 0,
    *,
    threads: int | None = None,
) -> pl.DataFrame:
    """Return the hit rates of caches where tokens draw their experts independently.

    Draws sequences of the lengths of the trace in which each token uses top_k experts without
    regard to other tokens, and replays them like recorded ones. "same": an expert of a layer is
    used as often as in the trace; "even": all experts are used equally often. At most 2^18
    activations are drawn, from sequences and layers that are spread evenly over the trace.

    Args:
        trace: whose shape and use of experts are taken.
        policies: of "sch", "lru", "lfu" and "belady".
        segment_length: tokens that "sch" looks ahead.
        seed: of the draws.
        threads: number of CPU threads; None for one a core.

    Returns:
        Columns `use` ("same" or "even"), `policy`, `segment_length` (null but for "sch"),
        `capacity` of one layer's cache, `cache_ratio` (capacity / top_k), `hit_rate` (share of
        look-ups; one cache a layer, mean over layers and sequences).

    Raises:
        InvalidArgumentError: an argument is out of its range.
        FormatError: the trace holds wrong expert ids.
    """
    for policy in policies:
        if policy not in POLICIES:
            raise InvalidArgumentError(f"policy: expected {', '.join(POLICIES)}, found {policy!r}")
    segment_length = check_int("segment_length", segment_length, 1, 2**20)
    seed = check_int("seed", seed, 0)
    workers = num_threads(threads)
    (group,) = make_groups(trace, None, by_domain=False)
    recorded = sequence_rates(trace, group)
    experts, top_k = trace.num_experts, trace.top_k
    rows = Rows("use", "policy", "segment_length", "capacity", "cache_ratio", "hit_rate")
    capacity = np.arange(1, experts + 1)
    for number, use in enumerate(USES):
        rates = recorded if use == "same" else np.full_like(recorded, top_k / experts)
        ids, lengths = _draw(rates, trace.lengths, top_k, np.random.default_rng([seed, number]))
        arrays = _moerun.TraceArrays(ids, lengths, experts)
        looked_up = (lengths.astype(np.float64) * top_k)[:, None, None]
        for policy in policies:
            hits = _moerun.replay_hits(arrays, policy, segment_length, False, workers)
            rows.add(
                use=use,
                policy=policy,
                segment_length=segment_length if policy == "sch" else None,
                capacity=capacity,
                cache_ratio=capacity / top_k,
                hit_rate=(hits[:, :, 1:] / looked_up).mean(axis=(0, 1)),
            )
    return rows.frame()


def _draw(
    rates: NDArray[np.float64],
    lengths: NDArray[np.int32],
    top_k: int,
    random: np.random.Generator,
) -> tuple[NDArray[np.uint16], NDArray[np.int32]]:
    """Draw expert ids (S, L, T, k) by rates (L, E), for some of the lengths and layers."""
    layers, experts = rates.shape
    budget = max(1, min(_MAX_ACTIVATIONS // top_k, _MAX_NUMBERS // experts))  # tokens of a layer
    longest = np.minimum(np.sort(lengths), budget)
    mean = max(1.0, float(longest.mean()))
    few_layers = np.unique(np.linspace(0, layers - 1, max(1, min(layers, int(budget / mean)))))
    chosen = rates[few_layers.astype(np.int64)]
    count = max(1, min(len(longest), int(budget / (mean * len(chosen)))))
    middles = (np.arange(count) + 0.5) * len(longest) / count
    drawn = longest[middles.astype(np.int64)]
    ids = np.zeros((count, len(chosen), int(drawn[-1]), top_k), np.uint16)
    for of_sequence, length in zip(ids, drawn, strict=True):
        for target, of_layer in zip(of_sequence, chosen, strict=True):
            target[:length] = _independent_tokens(of_layer, int(length), top_k, random)
    return ids, drawn.astype(np.int32)


def _independent_tokens(
    rates: NDArray[np.float64], tokens: int, top_k: int, random: np.random.Generator
) -> NDArray[np.uint16]:
    """Draw experts (tokens, top_k): expert e is among a token's with probability rates[e].

    Systematic sampling in a random order (W. G. Madow, 1949): with the experts laid out as pieces
    of a line, each as long as its probability, the points u, u + 1, ... lie in the chosen ones.
    """
    result = np.empty((tokens, top_k), np.uint16)
    step = max(1, _MAX_BLOCK // len(rates))
    for first in range(0, tokens, step):
        size = min(step, tokens - first)
        order = np.argsort(random.random((size, len(rates)), dtype=np.float32), axis=1)
        ends = np.minimum(rates[order].cumsum(axis=1), top_k)
        ends[:, -1] = top_k
        points = np.floor(ends - (1 - random.random((size, 1))))
        is_chosen = np.diff(points, axis=1, prepend=-1.0) > 0
        # Rounding may choose one too many or too few.
        places = np.argsort(~is_chosen, axis=1, kind="stable")[:, :top_k]
        result[first : first + size] = np.take_along_axis(order, places, axis=1)
    return result
