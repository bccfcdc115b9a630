"""Does this model suit expert offloading, and how large a cache does it want?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import InvalidArgumentError
from moerun.metrics.cache_hits import POLICIES, hit_rate
from moerun.metrics.chance_hits import chance_hit_rate
from moerun.metrics.local_consistency import srp
from moerun.metrics.objections import objections
from moerun.metrics.verdict_text import summary_of
from moerun.trace import Trace

SEGMENT_LENGTH = 16
# SRP at 16 tokens from which on a model belongs to a group (arXiv 2505.16056, section 4).
GROUPS = (("suits", 0.50), ("usable", 0.45), ("poor", 0.35), ("unsuitable", 0.0))
# Independent routing strays from its expected SRP by less than 0.007 (see objections.py). Routing
# that repeats a token's experts with a probability of 20 % is 0.02 to 0.04 above chance.
SRP_MARGIN = 0.02
HIT_MARGIN = 0.05


@dataclass(frozen=True)
class Verdict:
    """What a trace says about offloading the experts of its model.

    All rates and SRP are shares from 0 to 1. Hit rates are those of one cache a layer with
    `capacity` experts, mean over layers.

    Attributes:
        model: name of the model.
        group: "suits", "usable", "poor" or "unsuitable": the study's group, but at most "poor"
            without locality. None where the trace allows no verdict.
        study_group: the study's group by `srp` alone: 0.50 or more, 0.45, 0.35, less.
        objections: sentences on why there is no verdict; empty where there is one.
        has_locality: whether routing follows what tokens before used: `srp` exceeds `srp_chance`
            by 2 points or more, and LRU or LFU finds 5 points more than by chance.
        advice: "cache": `capacity` experts a layer, replaced while the model runs; "static": the
            `capacity` most used experts of each layer; "none": memory only helps by its size.
        segment_length: 16 tokens, of `srp` and of the look-ahead of SCH.
        srp: of the whole model.
        srp_chance: of independent routing that uses every expert as often.
        srp_chance_even: of independent routing that uses all experts equally often.
        srp_floor: what any routing reaches with a set of all experts, 2 k / (E + k).
        srp_ci_low: end of the 95 % interval of `srp`; None without a bootstrap.
        srp_ci_high: end of the 95 % interval of `srp`; None without a bootstrap.
        capacity: experts a layer at the knee of the SCH curve.
        cache_ratio: `capacity` by the experts that a token uses.
        cache_fraction: `capacity` by all experts of a layer: what a random set of them finds.
        sch_hit_rate: with 16 tokens of foresight.
        lru_hit_rate: the least recently used expert is evicted.
        lfu_hit_rate: the least frequently used expert is evicted.
        belady_hit_rate: with all foresight.
        static_hit_rate: of the most used experts, never replaced, on the tokens that chose them.
        hit_rates_by_chance: the same policies on independent routing of the same lengths, by use
            ("same": every expert as often as here, "even") and by policy.
        expert_bytes: of one expert, None where the trace does not say.
        cache_bytes: of `capacity` experts in every layer.
        total_bytes: of all experts.
    """

    model: str
    group: str | None
    study_group: str
    objections: tuple[str, ...]
    has_locality: bool
    advice: str
    segment_length: int
    srp: float
    srp_chance: float
    srp_chance_even: float
    srp_floor: float
    srp_ci_low: float | None
    srp_ci_high: float | None
    capacity: int
    cache_ratio: float
    cache_fraction: float
    sch_hit_rate: float
    lru_hit_rate: float
    lfu_hit_rate: float
    belady_hit_rate: float
    static_hit_rate: float
    hit_rates_by_chance: dict[str, dict[str, float]]
    expert_bytes: int | None
    cache_bytes: int | None
    total_bytes: int | None

    @property
    def srp_gain(self) -> float:
        """SRP above that of independent routing which uses every expert as often."""
        return self.srp - self.srp_chance

    @property
    def chance_hit_rate(self) -> float:
        """Hits by chance: of LRU where tokens draw their experts independently and evenly.

        `cache_fraction`, and a little more in short sequences: first uses fill an empty cache.
        """
        return max(self.cache_fraction, self.hit_rates_by_chance["even"]["lru"])

    @property
    def best_hit_rate(self) -> float:
        """The most that foresight finds."""
        return max(self.sch_hit_rate, self.belady_hit_rate)

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return {**asdict(self), "objections": list(self.objections)}

    def summary(self) -> str:
        """Return the verdict in a few sentences."""
        return summary_of(self)


def verdict(
    trace: Trace, *, bootstrap: int = 0, seed: int = 0, threads: int | None = None
) -> Verdict:
    """Return whether a model suits expert offloading, and the cache at the knee of its SCH curve.

    The knee is the capacity c, at least top_k, where the hit rate is farthest above the share
    c / num_experts of all experts that it costs (Satopaa et al., 2011, "Kneedle", on the whole
    curve). No group above "poor" and no cache is given to routing without locality.

    Args:
        trace: the routing.
        bootstrap: number of resamplings for the interval of SRP; 0 for none.
        seed: of the bootstrap.
        threads: number of CPU threads; None for one a core.

    Raises:
        InvalidArgumentError: no sequence has 16 tokens.
    """
    if trace.max_length < SEGMENT_LENGTH:
        raise InvalidArgumentError(
            f"{trace.path}: a verdict needs sequences of at least {SEGMENT_LENGTH} tokens; the "
            f"longest has {trace.max_length}"
        )
    row = srp(trace, (SEGMENT_LENGTH,), bootstrap=bootstrap, seed=seed, threads=threads).row(
        0, named=True
    )
    frames = {
        policy: hit_rate(trace, policy, SEGMENT_LENGTH, "mean", threads=threads)
        for policy in POLICIES
    }
    # Less than a token's experts cannot run.
    capacity = knee(frames["sch"]["hit_rate"].to_numpy(), trace.top_k)
    rates = {policy: float(frame["hit_rate"][capacity - 1]) for policy, frame in frames.items()}
    by_chance: dict[str, dict[str, float]] = {"same": {}, "even": {}}
    drawn = chance_hit_rate(trace, POLICIES, SEGMENT_LENGTH, threads=threads)
    for use, policy, rate in (
        drawn.filter(capacity=capacity).select("use", "policy", "hit_rate").iter_rows()
    ):
        by_chance[use][policy] = rate
    share = capacity / trace.num_experts
    static = float(frames["lru"]["static_hit_rate"][capacity - 1])
    group = next(name for name, least in GROUPS if row["srp"] >= least)
    has_locality = row["srp"] >= row["srp_chance"] + SRP_MARGIN and any(
        rates[policy] >= max(share, by_chance["even"][policy]) + HIT_MARGIN
        for policy in ("lru", "lfu")
    )
    reasons = tuple(objections(trace))
    if reasons:
        advice = "none"
    elif has_locality:
        advice = "cache"
    else:
        is_uneven = static >= _static_by_chance(trace, capacity) + HIT_MARGIN
        advice = "static" if is_uneven else "none"
    expert_bytes = trace.expert_bytes
    layers = len(trace.moe_layers)
    return Verdict(
        model=trace.model,
        group=None if reasons else group if has_locality else _at_most_poor(group),
        study_group=group,
        objections=reasons,
        has_locality=has_locality,
        advice=advice,
        segment_length=SEGMENT_LENGTH,
        srp=row["srp"],
        srp_chance=row["srp_chance"],
        srp_chance_even=row["srp_chance_even"],
        srp_floor=2 * trace.top_k / (trace.num_experts + trace.top_k),
        srp_ci_low=row["ci_low"],
        srp_ci_high=row["ci_high"],
        capacity=capacity,
        cache_ratio=capacity / trace.top_k,
        cache_fraction=share,
        **{f"{policy}_hit_rate": rate for policy, rate in rates.items()},
        static_hit_rate=static,
        hit_rates_by_chance=by_chance,
        expert_bytes=expert_bytes,
        cache_bytes=None if expert_bytes is None else expert_bytes * layers * capacity,
        total_bytes=None if expert_bytes is None else expert_bytes * layers * trace.num_experts,
    )


def knee(hit_rates: NDArray[np.float64], least: int = 1) -> int:
    """Return the capacity, from `least` on, at the knee of a curve of hit rates at 1 ... E."""
    share = np.arange(1, len(hit_rates) + 1) / len(hit_rates)
    return int(np.argmax((hit_rates - share)[least - 1 :])) + least


def _at_most_poor(group: str) -> str:
    return group if group == "unsuitable" else "poor"


def _static_by_chance(trace: Trace, capacity: int) -> float:
    """Highest share of look-ups that the `capacity` most used experts serve where use is even.

    More than their share of the experts: they are chosen by the tokens that they are measured on,
    of which there are as good as S^2 / sum(1 / T_s), for each of the S sequences weighs the same.
    """
    random = np.random.default_rng(0)
    draws = 32
    tokens = int(trace.num_sequences**2 / (1 / trace.lengths.astype(np.float64)).sum())
    shape = (draws, trace.num_experts)
    counts = random.binomial(max(1, tokens), trace.top_k / trace.num_experts, shape)
    most = -np.sort(-counts, axis=1)[:, :capacity].sum(axis=1) / np.maximum(1, counts.sum(axis=1))
    return max(capacity / trace.num_experts, float(most.max()))
