"""Segment routing best performance (SRP)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun import _moerun
from moerun.errors import InvalidArgumentError
from moerun.metrics.chance import independent_srp
from moerun.metrics.expert_load import weighted_rates
from moerun.metrics.frames import Rows
from moerun.metrics.groups import (
    Group,
    check_draws,
    interval,
    make_groups,
    num_threads,
    parts_of,
    usable_lengths,
)
from moerun.trace import Trace

LEVELS = ("model", "layer", "expert")
_MAX_BLOCK = 1 << 24  # numbers of a block of bootstrap sums


def srp(
    trace: Trace,
    segment_lengths: Sequence[int] = (4, 16, 64, 256),
    level: str = "model",
    domain: str | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    *,
    by_domain: bool = False,
    threads: int | None = None,
) -> pl.DataFrame:
    """Return how well one fixed set of experts serves a segment of tokens.

    Over all overlapping windows of m tokens, f is how often an expert is active in a window. An
    expert belongs to the set of a window if f reaches a threshold; F1 compares that choice with
    the activations, F1(a) = 2 * sum of f over f >= a / sum of (m * [f >= a] + f), and SRP is its
    maximum over thresholds a = 0 ... m (arXiv 2505.16056, section 3).

    Args:
        trace: the routing.
        segment_lengths: window lengths m in tokens; those longer than every sequence are left out,
            with a warning.
        level: one threshold for the "model", for each "layer" or for each "expert".
        domain: only sequences of this domain.
        bootstrap: number of resamplings of sequences for a 95 % interval; 0 for none.
        seed: of the bootstrap.
        by_domain: also give rows for each domain.
        threads: number of CPU threads; None for one a core.

    Returns:
        Columns `level`, `layer`, `expert`, `domain` (null: all), `segment_length`, `srp`,
        `threshold` (the smallest best one), `cache_ratio` (size of the chosen set by the number of
        active experts, the study's rho-hat), `activation_rate`, `ci_low`, `ci_high`; and what
        chance gives, which has no memory of earlier tokens: `srp_chance` where every expert is
        used as often as here, `srp_chance_even` where all are used equally often.

    Raises:
        InvalidArgumentError: an argument is out of its range.
        FormatError: the trace holds wrong expert ids.
    """
    if level not in LEVELS:
        raise InvalidArgumentError(f"level: expected {', '.join(LEVELS)}, found {level!r}")
    make_groups(trace, domain, by_domain, bootstrap, seed)  # refuses what is wrong
    workers = num_threads(threads)
    rows = Rows(
        "level",
        "layer",
        "expert",
        "domain",
        "segment_length",
        "srp",
        "threshold",
        "cache_ratio",
        "activation_rate",
        "ci_low",
        "ci_high",
        "srp_chance",
        "srp_chance_even",
    )
    lengths = usable_lengths(trace, segment_lengths)
    for m in lengths:
        numbers = {"model": m + 1, "layer": len(trace.moe_layers) * (m + 1)}
        check_draws(bootstrap, numbers.get(level, len(trace.moe_layers) * trace.num_experts))
    groups_of = {
        m: make_groups(trace, domain, by_domain, bootstrap, seed, least_tokens=m) for m in lengths
    }
    chances = _chances(trace, groups_of, level)
    for m, groups in groups_of.items():
        even = independent_srp(np.full((1, 1), trace.top_k / trace.num_experts), m).item()
        if level == "expert":
            results = _of_experts(trace, groups, m, workers)
        else:
            results = _of_layers(trace, groups, m, level == "model", workers)
        layers = np.array(trace.moe_layers)
        for group, (histograms, draws), chance in zip(groups, results, chances[m], strict=True):
            if not histograms.any():
                continue
            best, threshold, ratio, rate = _moerun.srp(histograms)
            low, high = interval(best, draws)
            rows.add(
                level=level,
                layer=None if level == "model" else np.repeat(layers, len(best) // len(layers)),
                expert=np.tile(np.arange(trace.num_experts), len(layers))
                if level == "expert"
                else None,
                domain=group.domain,
                segment_length=m,
                srp=best,
                threshold=threshold,
                cache_ratio=ratio,
                activation_rate=rate,
                ci_low=low,
                ci_high=high,
                srp_chance=chance,
                srp_chance_even=even,
            )
    return rows.frame()


def _chances(
    trace: Trace, groups_of: dict[int, list[Group]], level: str
) -> dict[int, list[NDArray[np.float64]]]:
    """SRP of independent routing for each length, group and unit.

    The rates of use are those of the windows: a sequence counts by how many it has.
    """
    num_windows = [
        np.maximum(0, trace.lengths.astype(np.float64) - m + 1) * group.members
        for m, groups in groups_of.items()
        for group in groups
    ]
    if not num_windows:
        return {}
    rates = iter(weighted_rates(trace, np.array(num_windows)))
    units = {"model": 1, "layer": len(trace.moe_layers), "expert": -1}[level]
    columns = 1 if level == "expert" else -1
    return {
        m: [independent_srp(next(rates).reshape(units, columns), m) for _ in groups]
        for m, groups in groups_of.items()
    }


# Histograms of a group's units (units, m + 1), and SRP in each bootstrap sample (draws, units).
_Result = tuple[NDArray[np.uint64], NDArray[np.float64]]


def _of_layers(
    trace: Trace, groups: list[Group], m: int, is_model: bool, threads: int
) -> list[_Result]:
    units = 1 if is_model else len(trace.moe_layers)
    sums = [np.zeros((units, m + 1), np.uint64) for _ in groups]
    draws = [np.zeros((len(group.weights), units * (m + 1))) for group in groups]
    for part in parts_of(trace):
        counts = _moerun.layer_histograms(part.arrays, m, threads)  # (S, L, m + 1)
        if is_model:
            counts = counts.sum(axis=1, keepdims=True)
        for group, total, drawn in zip(groups, sums, draws, strict=True):
            chosen = counts[group.members[part.rows]]
            total += chosen.sum(axis=0)
            if len(drawn):
                weights = group.weights[:, part.rows][:, group.members[part.rows]]
                drawn += weights @ chosen.reshape(len(chosen), -1).astype(np.float64)
    return [
        (total, _srp_of_draws(drawn.reshape(-1, units, m + 1)))
        for total, drawn in zip(sums, draws, strict=True)
    ]


def _of_experts(trace: Trace, groups: list[Group], m: int, threads: int) -> list[_Result]:
    layers, experts = len(trace.moe_layers), trace.num_experts
    sums = [np.zeros((layers, experts, m + 1), np.uint64) for _ in groups]
    for part in parts_of(trace):
        for group, total in zip(groups, sums, strict=True):
            arrays = part.only(group.members, experts)
            if arrays is not None:
                total += _moerun.expert_histograms(arrays, m, threads)
    return [
        (total.reshape(-1, m + 1), _draws_of_experts(trace, group, m, threads))
        for group, total in zip(groups, sums, strict=True)
    ]


def _draws_of_experts(trace: Trace, group: Group, m: int, threads: int) -> NDArray[np.float64]:
    """SRP of each expert in each bootstrap sample, layer by layer so that memory is bounded."""
    num_draws = len(group.weights)
    layers, experts = len(trace.moe_layers), trace.num_experts
    result = np.zeros((num_draws, layers, experts))
    if num_draws == 0:
        return result.reshape(0, layers * experts)
    step = max(1, _MAX_BLOCK // (num_draws * (m + 1)))
    for layer in range(layers):
        drawn = [
            np.zeros((num_draws, min(step, experts - first) * (m + 1)))
            for first in range(0, experts, step)
        ]
        for part in parts_of(trace):
            members = group.members[part.rows]
            arrays = part.only(group.members, experts)
            if arrays is None:
                continue
            counts = _moerun.expert_histograms_by_sequence(arrays, layer, m, threads)
            weights = group.weights[:, part.rows][:, members]
            for block, target in enumerate(drawn):
                chosen = counts[:, block * step : (block + 1) * step]
                target += weights @ chosen.reshape(len(chosen), -1).astype(np.float64)
        for block, target in enumerate(drawn):
            found = _srp_of_draws(target.reshape(num_draws, -1, m + 1))
            result[:, layer, block * step : (block + 1) * step] = found
    return result.reshape(num_draws, layers * experts)


def _srp_of_draws(histograms: NDArray[np.float64]) -> NDArray[np.float64]:
    """(draws, units, m + 1) sums to (draws, units)."""
    draws, units, row = histograms.shape
    if draws == 0:
        return np.zeros((0, units))
    whole = np.ascontiguousarray(np.rint(histograms).astype(np.uint64).reshape(-1, row))
    return _moerun.srp(whole)[0].reshape(draws, units)
