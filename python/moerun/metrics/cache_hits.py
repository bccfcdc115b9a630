"""Hit rates of caches of experts at every capacity."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import InvalidArgumentError
from moerun.metrics.frames import Rows
from moerun.metrics.groups import check_draws, interval, make_groups, num_threads, parts_of
from moerun.trace import Trace

POLICIES = ("sch", "lru", "lfu", "belady")
LEVELS = ("layer", "mean", "model")


def hit_rate(
    trace: Trace,
    policy: str = "sch",
    segment_length: int = 16,
    level: str = "layer",
    bootstrap: int = 0,
    seed: int = 0,
    *,
    domain: str | None = None,
    by_domain: bool = False,
    threads: int | None = None,
) -> pl.DataFrame:
    """Return the hit rate of a cache of whole experts, at every capacity.

    At each token all of its experts are looked up before any is loaded, then they are served in
    stored order; first touches while the cache is filling count as hits. Each sequence starts with
    an empty cache, and the rate is the mean over sequences. "sch" (segment cache best hit rate,
    arXiv 2505.16056, section 3) evicts the expert with the fewest activations still to come in the
    `segment_length` tokens that start with the current one, "belady" the one whose next use is
    farthest away: both know the future and are bounds. "lru" and "lfu" (counts outlive eviction)
    are what a cache can do. All capacities come from one pass (Mattson et al., 1970).

    Args:
        trace: the routing.
        policy: "sch", "lru", "lfu" or "belady".
        segment_length: tokens that "sch" looks ahead, the current one included.
        level: "layer": a cache for each layer; "mean": the mean of these over layers; "model": one
            pool for the experts of all layers.
        bootstrap: number of resamplings of sequences for a 95 % interval; 0 for none.
        seed: of the bootstrap.
        domain: only sequences of this domain.
        by_domain: also give rows for each domain.
        threads: number of CPU threads; None for one a core.

    Returns:
        Columns `level`, `layer`, `domain` (null: all), `policy`, `segment_length` (null but for
        "sch"), `capacity` in experts (of one layer's cache, or of the pool), `cache_ratio`
        (capacity by the experts that one token uses there), `hit_rate`, `ci_low`, `ci_high`; and
        what sets that never change would find: `random_hit_rate` (any `capacity` experts: capacity
        by all experts there) and `static_hit_rate` (the `capacity` most used ones).

    Raises:
        InvalidArgumentError: an argument is out of its range.
        FormatError: the trace holds wrong expert ids.
    """
    if policy not in POLICIES:
        raise InvalidArgumentError(f"policy: expected {', '.join(POLICIES)}, found {policy!r}")
    if level not in LEVELS:
        raise InvalidArgumentError(f"level: expected {', '.join(LEVELS)}, found {level!r}")
    segment_length = check_int("segment_length", segment_length, 1, 2**20)
    workers = num_threads(threads)
    groups = make_groups(trace, domain, by_domain, bootstrap, seed)
    is_pool = level == "model"
    layers = len(trace.moe_layers)
    caches = 1 if level != "layer" else layers
    slots = trace.top_k * (layers if is_pool else 1)
    sizes = trace.num_experts * (layers if is_pool else 1)
    check_draws(bootstrap, caches * sizes)
    sums = [np.zeros(caches * sizes) for _ in groups]
    used = [np.zeros((layers, trace.num_experts)) for _ in groups]
    draws = [np.zeros((len(group.weights), caches * sizes)) for group in groups]
    for part in parts_of(trace):
        hits = _moerun.replay_hits(part.arrays, policy, segment_length, is_pool, workers)
        rates = hits[:, :, 1:] / (part.lengths.astype(np.float64) * slots)[:, None, None]
        if level == "mean":
            rates = rates.mean(axis=1)
        rates = rates.reshape(len(part.lengths), -1)
        counts = _moerun.num_activations(part.arrays, workers)
        of_tokens = counts / part.lengths[:, None, None]
        for group, total, use, drawn in zip(groups, sums, used, draws, strict=True):
            members = group.members[part.rows]
            total += rates[members].sum(axis=0)
            use += of_tokens[members].sum(axis=0)
            if len(drawn):
                drawn += group.weights[:, part.rows][:, members] @ rates[members]
    rows = Rows(
        "level",
        "layer",
        "domain",
        "policy",
        "segment_length",
        "capacity",
        "cache_ratio",
        "hit_rate",
        "ci_low",
        "ci_high",
        "random_hit_rate",
        "static_hit_rate",
    )
    capacity = np.arange(1, sizes + 1)
    for group, total, use, drawn in zip(groups, sums, used, draws, strict=True):
        size = group.members.sum()
        low, high = interval(total / size, drawn / size)
        rows.add(
            level=level,
            layer=np.repeat(trace.moe_layers, sizes) if level == "layer" else None,
            domain=group.domain,
            policy=policy,
            segment_length=segment_length if policy == "sch" else None,
            capacity=np.tile(capacity, caches),
            cache_ratio=np.tile(capacity / slots, caches),
            hit_rate=total / size,
            ci_low=low,
            ci_high=high,
            random_hit_rate=np.tile(capacity / sizes, caches),
            static_hit_rate=_static_hits(use / (size * slots), level),
        )
    return rows.frame()


def _static_hits(shares: NDArray[np.float64], level: str) -> NDArray[np.float64]:
    """Shares of the look-ups, (L, E), to hits of the most used experts at every capacity.

    In the order of the rows: by layer ("layer"), of their mean ("mean"), or of the pool ("model").
    """
    if level == "model":
        shares = shares.reshape(1, -1)
    hits: NDArray[np.float64] = (-np.sort(-shares, axis=1)).cumsum(axis=1).clip(max=1)
    return hits.mean(axis=0) if level == "mean" else hits.ravel()
