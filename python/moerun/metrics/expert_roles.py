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
        `next_vocabulary`. Null where it cannot be said: fewer than two domains, an expert that
        is never used or owns no id, ids that the trace does not hold.
    """
    min_count = check_int("min_count", min_count, 1)
    layers, experts = len(trace.moe_layers), trace.num_experts
    vocabularies = [f"{name}_vocabulary" for name in _VARIANTS]
    rows = Rows("layer", "expert", "domain_variation", *vocabularies)
    rows.add(
        layer=np.repeat(trace.moe_layers, experts),
        expert=np.tile(np.arange(experts), layers),
        domain_variation=_domain_variation(trace).ravel(),
        **{
            column: _vocabulary(trace, name, min_count).ravel()
            for column, name in zip(vocabularies, _VARIANTS, strict=True)
        },
    )
    return rows.frame()


def _domain_variation(trace: Trace) -> NDArray[np.float64]:
    groups = make_groups(trace, None, by_domain=True)[1:]
    if len(groups) < 2:
        return np.full((len(trace.moe_layers), trace.num_experts), np.nan)
    rates = np.stack(
        [
            counts / trace.lengths[group.members].sum(dtype=np.int64)
            for group, counts in zip(groups, count_activations(trace, groups), strict=True)
        ]
    )
    mean = rates.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: NDArray[np.float64] = np.where(mean > 0, rates.std(axis=0, ddof=1) / mean, np.nan)
    return result


def _vocabulary(trace: Trace, variant: str, min_count: int) -> NDArray[np.float64]:
    """Scores (L, E) of one variant."""
    layers, experts = len(trace.moe_layers), trace.num_experts
    scores = np.full((layers, experts), np.nan)
    tensor = "predicted_ids" if variant == "predicted" else "token_ids"
    if tensor not in trace.tensors:
        return scores
    frequent = _frequent_ids(trace, variant, min_count)
    if len(frequent) == 0:
        return scores
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
        shares = table.reshape(count, len(frequent), experts)
        totals = shares.sum(axis=2)
        owner = shares.argmax(axis=2)
        largest = shares.max(axis=2) / totals
        for offset in range(count):
            owned = np.bincount(owner[offset], minlength=experts)
            sums = np.bincount(owner[offset], largest[offset], minlength=experts)
            scores[first + offset] = np.divide(
                sums, owned, out=np.full(experts, np.nan), where=owned > 0
            )
    return scores


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
