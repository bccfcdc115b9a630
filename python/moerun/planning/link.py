"""Measuring the link over which experts come."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moerun import _moerun
from moerun.errors import InvalidArgumentError
from moerun.planning.costs import fit_transfer

_QUANTUM = 32  # a segment begins at a multiple of so many records
_LARGE_PIECE = 2**18  # bytes
_ROUNDS = 15
_FEWEST_ROUNDS = 3
_SECONDS = 8.0


@dataclass(frozen=True)
class MeasuredLink:
    """seconds = pieces * fixed_s + bytes / bytes_per_s, and how far measured times are from it."""

    fixed_s: float
    bytes_per_s: float
    error: float
    error_worst: float


def measure_link(
    native: _moerun.Model, config: dict[str, Any], report: Callable[[str, float], None]
) -> MeasuredLink:
    """Move experts as tokens ask for them, 1 to k at once and from several records on.

    Each number and part is moved several times, every time other experts of another layer; of the
    times the median counts. The model must have a cache and nothing else to do.
    """
    layers = _moerun.moe_layers(native)
    records = config["moe_intermediate_size"]
    firsts = sorted({share * records // 8 // _QUANTUM * _QUANTUM for share in (0, 4, 7)})
    kinds = [(first, num) for first in firsts for num in range(1, config["top_k"] + 1)]
    numbers = random.Random(0)
    found = defaultdict(list)
    begin = time.monotonic()
    for turn in range(_ROUNDS):
        if turn >= _FEWEST_ROUNDS and time.monotonic() - begin > _SECONDS:
            break
        numbers.shuffle(kinds)
        for index, (first, num) in enumerate(kinds):
            report("link", (turn + index / len(kinds)) / _ROUNDS)
            experts = numbers.sample(range(config["num_experts"]), num)
            found[first, num].append(
                _moerun.measure_transfers(native, numbers.choice(layers), experts, first)
            )
    samples = []
    for each in found.values():
        pieces, moved, seconds = np.array(each, dtype=float).T
        samples.append((moved.mean(), float(np.median(seconds)), pieces.mean()))
    fixed_s, bytes_per_s = _fit(samples)
    moved, seconds, pieces = np.array(samples).T
    errors = np.abs((pieces * fixed_s + moved / bytes_per_s) / seconds - 1)
    return MeasuredLink(fixed_s, bytes_per_s, float(np.median(errors)), float(errors.max()))


def _fit(samples: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the fixed time and the rate."""
    try:
        return fit_transfer(samples)
    except InvalidArgumentError:
        # Pieces are of one size, or so small that their bytes do not show: then it is all rate
        # where they are large, all fixed time where they are small.
        moved, seconds, pieces = np.array(samples).T
        rates, paces = moved / seconds, pieces / seconds
        if moved.sum() / pieces.sum() > _LARGE_PIECE:
            return 0.0, float((rates**2).sum() / rates.sum())
        return float(paces.sum() / (paces**2).sum()), 1e3 * float(rates.max())
