"""How often experts are used: rates, and how evenly windows spread their tokens over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun import _moerun
from moerun.metrics.chance import independent_variation
from moerun.metrics.frames import Rows
from moerun.metrics.groups import Group, make_groups, num_threads, parts_of, usable_lengths
from moerun.trace import Trace


def activation_rates(
    trace: Trace, *, domain: str | None = None, by_domain: bool = False
) -> pl.DataFrame:
    """Return the share of tokens that use each expert.

    Args:
        trace: the routing.
        domain: only sequences of this domain.
        by_domain: also give rows for each domain.

    Returns:
        Columns `layer`, `expert`, `domain` (null: all), `activation_rate` (mean over experts:
        top_k / num_experts).
    """
    groups = make_groups(trace, domain, by_domain)
    rows = Rows("layer", "expert", "domain", "activation_rate")
    for group, counts in zip(groups, count_activations(trace, groups), strict=True):
        tokens = int(trace.lengths[group.members].sum(dtype=np.int64))
        rows.add(
            layer=np.repeat(trace.moe_layers, trace.num_experts),
            expert=np.tile(np.arange(trace.num_experts), len(trace.moe_layers)),
            domain=group.domain,
            activation_rate=counts.ravel() / tokens,
        )
    return rows.frame()


def count_activations(trace: Trace, groups: list[Group]) -> list[NDArray[np.uint64]]:
    """Return for each group how many of its tokens use each expert, (L, E)."""
    shape = (len(trace.moe_layers), trace.num_experts)
    sums = [np.zeros(shape, np.uint64) for _ in groups]
    for part in parts_of(trace):
        counts = _moerun.num_activations(part.arrays, num_threads(None))
        for group, total in zip(groups, sums, strict=True):
            total += counts[group.members[part.rows]].sum(axis=0)
    return sums


def sequence_rates(trace: Trace, group: Group) -> NDArray[np.float64]:
    """Return the rate at which a token of a group uses each expert, (L, E).

    Each sequence has the same weight, as in the mean of hit rates over sequences.
    """
    rates: NDArray[np.float64] = weighted_rates(trace, group.members[None].astype(np.float64))[0]
    return rates


def weighted_rates(trace: Trace, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return means over sequences of the rates at which a token uses each expert.

    Args:
        trace: the routing.
        weights: (N, sequences of the trace) weight of each sequence in each of N means; each row
            has a positive sum.

    Returns:
        (N, L, E), from 0 to 1.
    """
    sums = np.zeros((len(weights), len(trace.moe_layers), trace.num_experts))
    for part in parts_of(trace):
        counts = _moerun.num_activations(part.arrays, num_threads(None))
        rates = counts / np.maximum(1, part.lengths)[:, None, None]
        sums += np.tensordot(weights[:, part.rows], rates, axes=1)
    means: NDArray[np.float64] = sums / weights.sum(axis=1)[:, None, None]
    return means


def load_balance(
    trace: Trace,
    segment_lengths: Sequence[int] = (4, 16, 64, 256),
    *,
    domain: str | None = None,
    by_domain: bool = False,
    threads: int | None = None,
) -> pl.DataFrame:
    """Return how unevenly the tokens of a window use the experts of a layer.

    In each overlapping window of m tokens an expert has an activation frequency f / m; `std` is
    the standard deviation of these over experts, averaged over windows. 0 is perfect balance; the
    less balanced a window, the smaller the cache that serves it.

    Args:
        trace: the routing.
        segment_lengths: window lengths m in tokens; those longer than every sequence are left out,
            with a warning.
        domain: only sequences of this domain.
        by_domain: also give rows for each domain.
        threads: number of CPU threads; None for one a core.

    Returns:
        Columns `level` ("layer", or "model": the mean over layers), `layer`, `domain` (null: all),
        `segment_length`, `std`, `variation` (std by the mean frequency, top_k / num_experts),
        `variation_chance` (where independent tokens use all experts equally often).
    """
    groups = make_groups(trace, domain, by_domain)
    workers = num_threads(threads)
    rows = Rows(
        "level", "layer", "domain", "segment_length", "std", "variation", "variation_chance"
    )
    mean_frequency = trace.top_k / trace.num_experts
    for m in usable_lengths(trace, segment_lengths):
        sums = [np.zeros(len(trace.moe_layers)) for _ in groups]
        for part in parts_of(trace):
            deviations = _moerun.window_deviations(part.arrays, m, workers)
            for group, total in zip(groups, sums, strict=True):
                total += deviations[group.members[part.rows]].sum(axis=0)
        for group, total in zip(groups, sums, strict=True):
            windows = np.maximum(0, trace.lengths[group.members].astype(np.int64) - m + 1).sum()
            if windows == 0:
                continue
            std = total / windows
            for level, layer, values in (
                ("layer", np.array(trace.moe_layers), std),
                ("model", None, np.array([std.mean()])),
            ):
                rows.add(
                    level=level,
                    layer=layer,
                    domain=group.domain,
                    segment_length=m,
                    std=values,
                    variation=values / mean_frequency,
                    variation_chance=independent_variation(mean_frequency, m),
                )
    return rows.frame()
