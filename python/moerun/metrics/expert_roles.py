"""What experts are for: domains and words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun.arguments import check_int
from moerun.metrics.expert_load import count_activations
from moerun.metrics.frames import Rows
from moerun.metrics.groups import make_groups
from moerun.trace import Trace, TraceShard

_VARIANTS = ("input", "predicted", "next")
_MAX_TABLE = 1 << 26  # numbers counted at a time
_MAX_DRAWN_IDS = 2000  # token ids of a layer that chance is drawn for


def specialization(trace: Trace, *, min_count: int = 20) -> pl.DataFrame:
    """Return how far each expert is one for a domain, and for words.

    Domain: the coefficient of variation (sample standard deviation by mean) of the expert's
    activation rate over domains; 0 for an expert that all domains use alike. Vocabulary: token ids
    seen at least `min_count` times; only a token's first expert counts; each id belongs to the
    expert with the largest share of it in that layer, and an expert's score is its mean share of
    the ids that it owns (arXiv 2505.16056, section 4, after OLMoE, arXiv 2409.02060).

    Args:
        trace: the routing.
        min_count: how often a token id has to be seen.

    Returns:
        Columns `layer`, `expert`, `domain_variation`, and by the id that is read, the id that the
        model predicts, and the id that truly follows: `input_vocabulary`, `predicted_vocabulary`,
        `next_vocabulary`. Beside each, with `_chance` behind its name, the score where tokens draw
        their experts independently, each as often as in that layer. Null where it cannot be said:
        fewer than two domains, an expert that is never used or owns no id, ids that the trace does
        not hold.
    """
    min_count = check_int("min_count", min_count, 1)
    layers, experts = len(trace.moe_layers), trace.num_experts
    scores = {"domain_variation": _domain_variation(trace)}
    for name in _VARIANTS:
        scores[f"{name}_vocabulary"] = _vocabulary(trace, name, min_count)
    rows = Rows("layer", "expert", *scores, *(f"{column}_chance" for column in scores))
    rows.add(
        layer=np.repeat(trace.moe_layers, experts),
        expert=np.tile(np.arange(experts), layers),
        **{column: measured.ravel() for column, (measured, _) in scores.items()},
        **{f"{column}_chance": chance.ravel() for column, (_, chance) in scores.items()},
    )
    return rows.frame()


# Scores (L, E), as measured and by chance.
_Scores = tuple[NDArray[np.float64], NDArray[np.float64]]


def _domain_variation(trace: Trace) -> _Scores:
    groups = make_groups(trace, None, by_domain=True)[1:]
    if len(groups) < 2:
        nothing = np.full((len(trace.moe_layers), trace.num_experts), np.nan)
        return nothing, nothing
    tokens = np.array(
        [trace.lengths[group.members].sum(dtype=np.int64) for group in groups], np.float64
    )
    counts = np.stack(count_activations(trace, groups))
    rates = counts / tokens[:, None, None]
    mean = rates.mean(axis=0)
    overall = counts.sum(axis=0) / tokens.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(mean > 0, rates.std(axis=0, ddof=1) / mean, np.nan)
        # The rate over n independent tokens has the variance p * (1 - p) / n.
        chance = np.where(mean > 0, np.sqrt((1 - overall) / overall * (1 / tokens).mean()), np.nan)
    return found, chance


def _vocabulary(trace: Trace, variant: str, min_count: int) -> _Scores:
    """Scores of one variant."""
    layers, experts = len(trace.moe_layers), trace.num_experts
    scores = np.full((2, layers, experts), np.nan)
    tensor = "predicted_ids" if variant == "predicted" else "token_ids"
    frequent = _frequent_ids(trace, variant, min_count) if tensor in trace.tensors else np.zeros(0)
    if len(frequent) == 0:
        return scores[0], scores[1]
    random = np.random.default_rng(0)
    step = max(1, _MAX_TABLE // (len(frequent) * experts))
    for first in range(0, layers, step):
        count = min(step, layers - first)
        table = np.zeros((count, len(frequent) * experts), np.int64)
        for shard in trace.shards():
            for sequence, ids in _sequences(shard, variant):
                index = np.searchsorted(frequent, ids).clip(max=len(frequent) - 1)
                known = frequent[index] == ids
                top = shard.expert_ids[sequence, first : first + count, : len(ids), 0]
                for target, experts_of in zip(table, top[:, known].astype(np.int64), strict=True):
                    target += np.bincount(
                        index[known] * experts + experts_of, minlength=table.shape[1]
                    )
        for offset, uses in enumerate(table.reshape(count, len(frequent), experts)):
            totals = uses.sum(axis=1)
            some = totals[:: -(-len(totals) // _MAX_DRAWN_IDS)]
            drawn = random.multinomial(some, uses.sum(axis=0) / totals.sum())
            scores[0, first + offset] = _mean_shares(uses)
            scores[1, first + offset] = _mean_shares(drawn)
    return scores[0], scores[1]


def _mean_shares(uses: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uses (ids, E) to the mean share that each expert has of the ids that it owns."""
    owner = uses.argmax(axis=1)
    largest = uses.max(axis=1) / uses.sum(axis=1)
    owned = np.bincount(owner, minlength=uses.shape[1])
    sums = np.bincount(owner, largest, minlength=uses.shape[1])
    result: NDArray[np.float64] = np.divide(
        sums, owned, out=np.full(uses.shape[1], np.nan), where=owned > 0
    )
    return result


def _frequent_ids(trace: Trace, variant: str, min_count: int) -> NDArray[np.int64]:
    values: NDArray[np.int64] = np.zeros(0, np.int64)
    counts: NDArray[np.int64] = np.zeros(0, np.int64)
    for shard in trace.shards():
        seen = np.concatenate([ids for _, ids in _sequences(shard, variant)])
        new_values, new_counts = np.unique(seen[seen >= 0], return_counts=True)
        values, inverse = np.unique(np.concatenate([values, new_values]), return_inverse=True)
        counts = np.bincount(
            inverse, np.concatenate([counts, new_counts]), minlength=len(values)
        ).astype(np.int64)
    return values[counts >= min_count]


def _sequences(shard: TraceShard, variant: str) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (sequence, ids): ids[t] is the one that counts for the experts of token t."""
    tensor = shard.tensor("predicted_ids" if variant == "predicted" else "token_ids")
    for sequence, length in enumerate(shard.lengths):
        ids = tensor[sequence, :length].astype(np.int64)
        yield sequence, ids[1:] if variant == "next" else ids
