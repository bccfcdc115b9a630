"""Sequences of a trace by domain, and how results over them are resampled."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import InvalidArgumentError, MoerunWarning
from moerun.sizes import size_text
from moerun.trace import Trace

CONFIDENCE = 0.95
_MOST_DRAWN = 1 << 27  # numbers that all bootstrap samples have together: 1 GiB


@dataclass(frozen=True)
class Group:
    """Sequences that are measured together.

    Attributes:
        domain: their domain, None for all sequences.
        members: (sequences of the trace) bool.
        weights: (draws, sequences of the trace) float64: how often each sequence is in each
            bootstrap sample; no draws without a bootstrap.
    """

    domain: str | None
    members: NDArray[np.bool_]
    weights: NDArray[np.float64]


def make_groups(
    trace: Trace,
    domain: str | None,
    by_domain: bool,
    bootstrap: int = 0,
    seed: int = 0,
    least_tokens: int = 1,
) -> list[Group]:
    """Return the group of `domain` (None for all), and with `by_domain` one for each domain.

    Sequences of fewer than `least_tokens` tokens are in none, and a group without any is left out:
    a bootstrap sample of sequences that do not count would have no value.

    Raises:
        InvalidArgumentError: the trace has no such domain, or a number is out of its range.
    """
    if not isinstance(trace, Trace):
        raise InvalidArgumentError(
            f"trace must be a moerun.Trace, not {type(trace).__name__}; moerun.Trace.open(path) "
            "gives one"
        )
    bootstrap = check_int("bootstrap", bootstrap, 0, 1_000_000)
    seed = check_int("seed", seed, 0)
    names = trace.domain_names
    if domain is not None and domain not in names:
        raise InvalidArgumentError(f"domain: expected one of {', '.join(names)}, found {domain!r}")
    if domain is not None and by_domain:
        raise InvalidArgumentError("domain and by_domain exclude each other")
    labels = trace.domains
    check_draws(bootstrap, len(labels))
    wanted: list[str | None] = [domain, *names] if by_domain else [domain]
    groups = []
    for name in wanted:
        members = trace.lengths >= least_tokens
        if name is not None:
            members &= np.array([label == name for label in labels])
        size = int(members.sum())
        if size == 0:
            continue
        # Each domain has its own draws, the same ones whatever else is asked for. Of one sequence
        # there is only one sample.
        random = np.random.default_rng([seed, 0 if name is None else names.index(name) + 1])
        draws = bootstrap if size > 1 else 0
        weights = np.zeros((draws, len(labels)))
        if draws:
            weights[:, members] = random.multinomial(size, np.full(size, 1 / size), draws)
        groups.append(Group(name, members, weights))
    return groups


def check_draws(bootstrap: int, numbers: int) -> None:
    """Refuse bootstrap samples of so many numbers each that memory would not hold them.

    Raises:
        InvalidArgumentError: it names the most samples that can be drawn.
    """
    most = _MOST_DRAWN // max(numbers, 1)
    if bootstrap > most:
        raise InvalidArgumentError(
            f"bootstrap: {bootstrap:,} samples of {numbers:,} numbers each need "
            f"{size_text(8 * bootstrap * numbers)}; at most {most:,} are drawn for this trace "
            "(1,000 are enough for a 95 % interval)"
        )


def interval(value: NDArray[Any], draws: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the ends of the reverse-percentile bootstrap interval, nan with fewer than two draws.

    `draws` has one more axis than `value`, the first. The interval mirrors the percentiles of the
    draws at the value (arXiv 2505.16056, appendix).
    """
    if len(draws) < 2:
        missing = np.full(np.shape(value), np.nan)
        return missing, missing
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return 2 * value - high, 2 * value - low


@dataclass(frozen=True)
class Part:
    """The arrays of one file of a trace, and where its sequences stand in the trace."""

    arrays: _moerun.TraceArrays
    expert_ids: NDArray[Any]  # (S, L, T, k)
    lengths: NDArray[np.int32]  # (S)
    rows: slice

    def only(self, members: NDArray[np.bool_], num_experts: int) -> _moerun.TraceArrays | None:
        """Return the arrays of some of the sequences, None if it has none of them."""
        chosen = members[self.rows]
        if chosen.all():
            return self.arrays
        if not chosen.any():
            return None
        return _moerun.TraceArrays(self.expert_ids[chosen], self.lengths[chosen], num_experts)


def parts_of(trace: Trace) -> Iterator[Part]:
    """Yield the files of a trace one after the other; one is in memory at a time."""
    for shard in trace.shards():
        ids = shard.expert_ids
        yield Part(
            _moerun.TraceArrays(ids, shard.lengths, trace.num_experts),
            ids,
            shard.lengths,
            slice(shard.first_sequence, shard.first_sequence + len(shard.lengths)),
        )


def num_threads(threads: int | None) -> int:
    """Return the number of threads to use: as asked, or one a usable core."""
    if threads is not None:
        return check_int("threads", threads, 1, 1024)
    return len(os.sched_getaffinity(0))


def usable_lengths(trace: Trace, segment_lengths: Sequence[int]) -> list[int]:
    """Return the segment lengths for which the trace has windows; warns about sequences without.

    Raises:
        InvalidArgumentError: a length is not a whole number from 1 on.
    """
    if isinstance(segment_lengths, (str, bytes)) or not isinstance(segment_lengths, Iterable):
        raise InvalidArgumentError(
            f"segment_lengths must be a sequence of ints, not {type(segment_lengths).__name__}"
        )
    lengths = [check_int("a segment length", m, 1, 2**20) for m in segment_lengths]
    for m in lengths:
        short = int((trace.lengths < m).sum())
        if short == trace.num_sequences:
            warnings.warn(
                f"windows of {m} tokens are left out: the longest sequence of {trace.path.name} "
                f"has {trace.max_length} tokens",
                MoerunWarning,
                stacklevel=3,
            )
        elif short:
            warnings.warn(
                f"{short} of {trace.num_sequences} sequences of {trace.path.name} have no window "
                f"of {m} tokens: they are shorter",
                MoerunWarning,
                stacklevel=3,
            )
    return [m for m in dict.fromkeys(lengths) if m <= trace.max_length]
