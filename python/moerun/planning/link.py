"""Measuring the link over which experts come."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """The link as `CostModel` has it, and how far measured times are from it."""

    fixed_s: float
    bytes_per_s: float
    channels: int
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
    moved, seconds, pieces = np.array(samples).T
    fits = [(*_fit(samples), 1)]
    if native.device == "cpu":  # two threads read
        fits.append((*fit_channels(moved, seconds, pieces, 2), 2))

    def errors(fit: tuple[float, float, int]) -> NDArray[np.float64]:
        fixed_s, bytes_per_s, channels = fit
        result: NDArray[np.float64] = np.abs(
            _seconds(moved, pieces, fixed_s, bytes_per_s, channels) / seconds - 1
        )
        return result

    best = min(fits, key=lambda fit: float((errors(fit) ** 2).sum()))
    found_errors = errors(best)
    return MeasuredLink(*best, float(np.median(found_errors)), float(found_errors.max()))


def _seconds(
    moved: NDArray[np.float64], pieces: NDArray[np.float64], fixed_s: Any, rate: Any, channels: int
) -> NDArray[np.float64]:
    """Return what a queue takes; as the cost model's TransferCost::seconds."""
    piece_s = moved / pieces / rate
    turns, in_turn = np.ceil(pieces / channels), (pieces - 1) % channels
    result: NDArray[np.float64] = np.maximum(
        fixed_s + pieces * piece_s, turns * (fixed_s + piece_s) + in_turn * piece_s
    )
    return result


def fit_channels(
    moved: NDArray[np.float64],
    seconds: NDArray[np.float64],
    pieces: NDArray[np.float64],
    channels: int,
) -> tuple[float, float]:
    """Return the fixed time and the rate with the least sum of squared relative errors.

    Args:
        moved: (N) bytes.
        seconds: (N) that they took.
        pieces: (N) in which they were moved, of one size in each sample.
        channels: pieces under way at once.
    """
    quickest = float((seconds / pieces).min())
    fixed = np.concatenate([[0.0], np.geomspace(1e-4, 4.0, 120) * quickest * channels])
    rates = np.geomspace(0.25, 64.0, 200) * float((moved / seconds).max())
    for _ in range(3):  # ever finer around the best
        grid = _seconds(moved, pieces, fixed[:, None, None], rates[:, None], channels)
        wrong = ((grid / seconds - 1) ** 2).sum(axis=2)
        at, of = divmod(int(wrong.argmin()), len(rates))
        best = float(fixed[at]), float(rates[of])
        fixed = np.linspace(fixed[max(at - 1, 0)], fixed[min(at + 1, len(fixed) - 1)], 41)
        rates = np.linspace(rates[max(of - 1, 0)], rates[min(of + 1, len(rates) - 1)], 41)
    return best


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
