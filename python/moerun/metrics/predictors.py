"""How well a layer's experts are known before its router has spoken."""

from __future__ import annotations

import warnings

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun import _moerun
from moerun.errors import MoerunWarning
from moerun.metrics.frames import Rows
from moerun.metrics.groups import make_groups, num_threads, parts_of
from moerun.trace import Trace


def predictability(
    trace: Trace,
    *,
    domain: str | None = None,
    by_domain: bool = False,
    threads: int | None = None,
) -> pl.DataFrame:
    """Return the share of a layer's activations that simple predictors name in advance.

    Each names as many experts as a token uses, so recall is also precision. "previous_token": the
    experts of the same layer at the token before. "previous_layer": those that go most often with
    the experts of the layer before at the same token, by the sum of conditional frequencies.
    "most_used": those that are used most. The last two learn from every other sequence and are
    measured on the rest, in both directions. Guessing names top_k / num_experts.

    Args:
        trace: the routing.
        domain: only sequences of this domain, to learn from too.
        by_domain: also give rows for each domain.
        threads: number of CPU threads; None for one a core.

    Returns:
        Columns `level` ("layer", or "model": the mean over layers), `layer`, `domain` (null: all),
        `predictor`, `recall`, `recall_chance` (top_k / num_experts). The first layer has no
        layer before it.
    """
    workers = num_threads(threads)
    rows = Rows("level", "layer", "domain", "predictor", "recall", "recall_chance")
    layers = np.array(trace.moe_layers)
    for group in make_groups(trace, domain, by_domain):

        def add(
            predictor: str,
            of_layers: NDArray[np.integer],
            recall: NDArray[np.float64],
            label: str | None = group.domain,
        ) -> None:
            common = {
                "domain": label,
                "predictor": predictor,
                "recall_chance": trace.top_k / trace.num_experts,
            }
            rows.add(level="layer", layer=of_layers, recall=recall, **common)
            rows.add(level="model", layer=None, recall=float(recall.mean()), **common)

        members = group.members
        num_pairs = int(np.maximum(0, trace.lengths[members].astype(np.int64) - 1).sum())
        if num_pairs:
            hits = np.zeros(len(layers), np.uint64)
            for part in parts_of(trace):
                found = _moerun.previous_token_hits(part.arrays, workers)
                hits += found[members[part.rows]].sum(axis=0)
            add("previous_token", layers, hits / (num_pairs * trace.top_k))
        if members.sum() < 2:
            where = trace.path.name + (f", domain {group.domain}," if group.domain else "")
            warnings.warn(
                f"{where} has one sequence: nothing to learn previous_layer and most_used from",
                MoerunWarning,
                stacklevel=2,
            )
            continue
        is_odd = np.cumsum(members) % 2 == 0
        halves = [members & ~is_odd, members & is_odd]
        used, pairs = _learn(trace, halves, workers)
        if len(layers) > 1:
            add("previous_layer", layers[1:], _previous_layer(trace, halves, used, pairs, workers))
        add("most_used", layers, _most_used(used, trace.top_k))
    return rows.frame()


def _learn(
    trace: Trace, halves: list[NDArray[np.bool_]], threads: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Activations (2, L, E) and pairs of consecutive layers (2, L - 1, E, E) of the two halves."""
    layers, experts = len(trace.moe_layers), trace.num_experts
    used = np.zeros((2, layers, experts), np.uint64)
    pairs = np.zeros((2, layers - 1, experts, experts), np.uint64)
    for part in parts_of(trace):
        for half, members in enumerate(halves):
            arrays = part.only(members, experts)
            if arrays is not None:
                used[half] += _moerun.num_activations(arrays, threads).sum(axis=0)
                pairs[half] += _moerun.layer_pairs(arrays, threads)
    return used, pairs


def _previous_layer(
    trace: Trace,
    halves: list[NDArray[np.bool_]],
    used: NDArray[np.uint64],
    pairs: NDArray[np.uint64],
    threads: int,
) -> NDArray[np.float64]:
    frequencies = pairs / np.maximum(1, used[:, :-1, :, None])
    weights = frequencies.astype(np.float32)
    hits = np.zeros(len(trace.moe_layers) - 1, np.uint64)
    for part in parts_of(trace):
        for half, members in enumerate(halves):
            arrays = part.only(members, trace.num_experts)
            if arrays is not None:
                hits += _moerun.previous_layer_hits(arrays, weights[1 - half], threads).sum(axis=0)
    tokens = trace.lengths[halves[0] | halves[1]].sum(dtype=np.int64)
    result: NDArray[np.float64] = hits / (tokens * trace.top_k)
    return result


def _most_used(used: NDArray[np.uint64], top_k: int) -> NDArray[np.float64]:
    order = np.argsort(-used.astype(np.float64), axis=2, kind="stable")[:, :, :top_k]
    hits = sum(
        np.take_along_axis(used[half], order[1 - half], axis=1).sum(axis=1) for half in (0, 1)
    )
    result: NDArray[np.float64] = hits / used.sum(axis=(0, 2))
    return result
