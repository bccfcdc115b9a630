"""Does this model suit expert offloading, and how large a cache does it want?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import InvalidArgumentError
from moerun.metrics.cache_hits import hit_rate
from moerun.metrics.local_consistency import srp
from moerun.trace import Trace

SEGMENT_LENGTH = 16
# SRP at 16 tokens from which on a model belongs to a group (arXiv 2505.16056, section 4).
GROUPS = (("suits", 0.50), ("usable", 0.45), ("poor", 0.35), ("unsuitable", 0.0))
_NEAR_THE_FLOOR = 0.03
_SENTENCES = {
    "suits": "suits expert offloading",
    "usable": "can be offloaded, with some loss",
    "poor": "suits expert offloading poorly",
    "unsuitable": "does not suit expert offloading",
}


@dataclass(frozen=True)
class Verdict:
    """What a trace says about offloading the experts of its model.

    Attributes:
        model: name of the model.
        group: "suits" (SRP above 0.50), "usable" (0.45 to 0.50), "poor" (0.35 to 0.45) or
            "unsuitable", by `srp`.
        segment_length: 16 tokens, of `srp` and of the look-ahead of SCH.
        srp: of the whole model.
        srp_floor: what any routing reaches with a set of all experts, 2 k / (E + k).
        srp_ci_low: end of its 95 % interval; None without a bootstrap.
        srp_ci_high: end of its 95 % interval; None without a bootstrap.
        capacity: cached experts a layer at the knee of the SCH curve.
        cache_ratio: `capacity` by the experts that a token uses.
        cache_fraction: `capacity` by all experts of a layer.
        sch_hit_rate: at that capacity, one cache a layer, mean over layers.
        lru_hit_rate: the same.
        belady_hit_rate: the same.
        expert_bytes: of one expert, None where the trace does not say.
        cache_bytes: of such a cache for all layers.
        total_bytes: of all experts.
        caveat: a sentence on why this should not be trusted, None if nothing speaks against it.
    """

    model: str
    group: str
    segment_length: int
    srp: float
    srp_floor: float
    srp_ci_low: float | None
    srp_ci_high: float | None
    capacity: int
    cache_ratio: float
    cache_fraction: float
    sch_hit_rate: float
    lru_hit_rate: float
    belady_hit_rate: float
    expert_bytes: int | None
    cache_bytes: int | None
    total_bytes: int | None
    caveat: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)

    def summary(self) -> str:
        """Return the verdict in two sentences."""
        size = ""
        if self.cache_bytes is not None and self.total_bytes is not None:
            size = f" ({_gib(self.cache_bytes)} of {_gib(self.total_bytes)})"
        return (
            f"{self.model} {_SENTENCES[self.group]}: SRP {self.srp:.1%} at "
            f"{self.segment_length} tokens. Cache {self.capacity} "
            f"expert{'' if self.capacity == 1 else 's'} a layer, "
            f"{self.cache_ratio:.3g} times what a token uses and {self.cache_fraction:.0%} of "
            f"all{size}: up to {self.sch_hit_rate:.0%} hits with {self.segment_length} tokens of "
            f"foresight, {self.lru_hit_rate:.0%} with LRU."
        )


def verdict(
    trace: Trace, *, bootstrap: int = 0, seed: int = 0, threads: int | None = None
) -> Verdict:
    """Return whether a model suits expert offloading, and the cache at the knee of its SCH curve.

    The knee is the capacity c, at least top_k, where the hit rate is farthest above the share
    c / num_experts of all experts that it costs (Satopaa et al., 2011, "Kneedle", on the whole
    curve).

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
    rates = {
        policy: hit_rate(trace, policy, SEGMENT_LENGTH, "mean", threads=threads)[
            "hit_rate"
        ].to_numpy()
        for policy in ("sch", "lru", "belady")
    }
    capacity = knee(rates["sch"], trace.top_k)  # less than a token's experts cannot run
    expert_bytes = trace.expert_bytes
    layers = len(trace.moe_layers)
    floor = 2 * trace.top_k / (trace.num_experts + trace.top_k)
    return Verdict(
        model=trace.model,
        group=next(name for name, least in GROUPS if row["srp"] >= least),
        segment_length=SEGMENT_LENGTH,
        srp=row["srp"],
        srp_floor=floor,
        srp_ci_low=row["ci_low"],
        srp_ci_high=row["ci_high"],
        capacity=capacity,
        cache_ratio=capacity / trace.top_k,
        cache_fraction=capacity / trace.num_experts,
        sch_hit_rate=float(rates["sch"][capacity - 1]),
        lru_hit_rate=float(rates["lru"][capacity - 1]),
        belady_hit_rate=float(rates["belady"][capacity - 1]),
        expert_bytes=expert_bytes,
        cache_bytes=None if expert_bytes is None else expert_bytes * layers * capacity,
        total_bytes=None if expert_bytes is None else expert_bytes * layers * trace.num_experts,
        caveat=_caveat(trace, row["srp"], floor),
    )


def knee(hit_rates: NDArray[np.float64], least: int = 1) -> int:
    """Return the capacity, from `least` on, at the knee of a curve of hit rates at 1 ... E."""
    share = np.arange(1, len(hit_rates) + 1) / len(hit_rates)
    return int(np.argmax((hit_rates - share)[least - 1 :])) + least


def _caveat(trace: Trace, value: float, floor: float) -> str | None:
    if "(random weights)" in trace.model:
        return (
            "The weights are random, and so is the routing: this says nothing of a trained model."
        )
    if value < floor + _NEAR_THE_FLOOR:
        return (
            f"A set of all experts reaches an SRP of {floor:.1%} with any routing; this is hardly "
            "more, so the group says little."
        )
    return None


def _gib(num_bytes: int) -> str:
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"
