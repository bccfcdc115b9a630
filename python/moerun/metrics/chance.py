"""SRP and load balance by chance: a token draws its experts without regard to earlier tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moerun.arguments import check_int, check_number, shown
from moerun.errors import InvalidArgumentError

_MAX_BLOCK = 1 << 22  # numbers of an array


def independent_srp(rates: NDArray[np.float64], segment_length: int) -> NDArray[np.float64]:
    """Return the SRP of groups of experts whose use has no memory.

    An expert that a token uses with probability p, whatever other tokens use, is active in a
    window of m tokens f ~ Binomial(m, p) times. With these expectations in place of sums over
    windows, F1(a) = 2 * sum over e of E[f_e; f_e >= a] / sum over e of (m * P(f_e >= a) + m * p_e),
    and SRP is its maximum over a = 0 ... m, as for a recorded trace.

    Args:
        rates: (groups, experts) probability that a token uses an expert; the experts of a group
            share one threshold.
        segment_length: m, in tokens.

    Returns:
        SRP by group, from 0 to 1; 0 for a group that is never used.

    Raises:
        InvalidArgumentError: an argument is out of its range.
    """
    m = check_int("segment_length", segment_length, 1, 2**20)
    try:
        rates = np.asarray(rates, np.float64)
    except (TypeError, ValueError, ArithmeticError):
        raise InvalidArgumentError(f"rates must be numbers, not {shown(rates)}") from None
    if rates.ndim != 2 or not ((rates >= 0) & (rates <= 1 + 1e-9)).all():
        raise InvalidArgumentError(
            "rates: expected an array (groups, experts) of probabilities from 0 to 1"
        )
    step = max(1, _MAX_BLOCK // (m + 1))
    blocks = [
        _srp_of_histograms(_expected_histograms(rates[first : first + step], m))
        for first in range(0, len(rates), step)
    ]
    return np.concatenate([np.zeros(0), *blocks])


def independent_variation(share: float, length: float) -> float:
    """Return std / mean of the experts' use in windows of independent tokens that use all evenly.

    An expert of probability p = `share` is active in a window of m = `length` tokens a binomial
    number of times, of variance m * p * (1 - p).

    Raises:
        InvalidArgumentError: `share` is not above 0 and at most 1, or `length` is not above 0.
    """
    share = check_number("share", share, 0.0, 1.0, above_minimum=True)
    length = check_number("length", length, 0.0, above_minimum=True)
    return math.sqrt((1 - share) / (share * length))


def _expected_histograms(rates: NDArray[np.float64], m: int) -> NDArray[np.float64]:
    """How many experts of a group are expected to be active f times in a window, (groups, m + 1).

    Only f within 6 * sqrt(m) + 16 of the mean are summed: the others have a probability below
    1e-30 (Hoeffding, 1963).
    """
    width = min(m + 1, 2 * (math.isqrt(36 * m) + 17) + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, m + 1)))])
    result = np.zeros(rates.shape[0] * (m + 1))
    groups = np.repeat(np.arange(len(rates)), rates.shape[1])
    for part in _parts(rates.size, width):
        exact = rates.ravel()[part, None]
        p = np.clip(exact, 1e-300, 1 - 1e-16)
        first = np.clip(np.rint(m * p).astype(np.int64) - width // 2, 0, m + 1 - width)
        f = first + np.arange(width)
        weights = f * np.log(p) + (m - f) * np.log1p(-p) - log_factorials[f] - log_factorials[m - f]
        weights = np.exp(weights - weights.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        weights = np.where(exact > 0, weights, f == 0)
        place = groups[part][:, None] * (m + 1) + f
        result += np.bincount(place.ravel(), weights.ravel(), len(result))
    return result.reshape(len(rates), m + 1)


def _parts(count: int, width: int) -> Iterator[slice]:
    step = max(1, _MAX_BLOCK // width)
    return (slice(first, first + step) for first in range(0, count, step))


def _srp_of_histograms(histograms: NDArray[np.float64]) -> NDArray[np.float64]:
    m = histograms.shape[1] - 1
    chosen = histograms[:, ::-1].cumsum(axis=1)
    active = (histograms * np.arange(m + 1))[:, ::-1].cumsum(axis=1)
    total = active[:, -1:]
    size = m * chosen + total
    f1 = np.divide(2 * active, size, out=np.zeros_like(size), where=(size > 0) & (total > 0))
    best: NDArray[np.float64] = f1.max(axis=1).clip(max=1)
    return best
