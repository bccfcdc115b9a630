"""Sequences of traces with their tokens: what predictors learn from and are measured on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import FormatError, InvalidArgumentError
from moerun.predictor.files import sequence_hash
from moerun.trace import Trace

Traces = str | os.PathLike[str] | Trace | Sequence[str | os.PathLike[str] | Trace]


@dataclass(frozen=True, eq=False)
class RoutedSequence:
    """One sequence of T tokens.

    Attributes:
        token_ids: (T) int32.
        expert_ids: (L, T, k).
        prefetch_ids: (L, T, k) uint16, None where the trace has none.
        domain: its label.
        hash: tells its tokens from others.
    """

    token_ids: NDArray[np.int32]
    expert_ids: NDArray[Any]
    prefetch_ids: NDArray[np.uint16] | None
    domain: str
    hash: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


@dataclass(frozen=True)
class RoutingSizes:
    """What traces and predictors must have in common."""

    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int


def opened_traces(traces: Traces) -> list[Trace]:
    """Open one trace or several of one model.

    Raises:
        InvalidArgumentError: there is none, they are of different models, or one has no token ids.
        As `Trace.open`, besides.
    """
    given = [traces] if isinstance(traces, (str, os.PathLike, Trace)) else list(traces)
    if not given:
        raise InvalidArgumentError("traces: expected at least one trace, found none")
    found = [each if isinstance(each, Trace) else Trace.open(each) for each in given]
    for trace in found:
        if sizes_of(trace) != sizes_of(found[0]):
            raise InvalidArgumentError(
                f"{trace.path} and {found[0].path} are of different models: "
                f"{_sizes_text(sizes_of(trace))}, and {_sizes_text(sizes_of(found[0]))}"
            )
        if "token_ids" not in trace.tensors:
            raise InvalidArgumentError(
                f"{trace.path} does not say which tokens were routed, which is what a predictor "
                "learns from; record it with moe-trace record"
            )
    return found


def sizes_of(trace: Trace) -> RoutingSizes:
    """Return the sizes of a trace."""
    return RoutingSizes(tuple(trace.moe_layers), trace.num_experts, trace.top_k)


def check_sizes(traces: Iterable[Trace], sizes: RoutingSizes, whose: str) -> None:
    """Check that traces have the sizes of a model or a predictor.

    Raises:
        InvalidArgumentError: one has others.
    """
    for trace in traces:
        if sizes_of(trace) != sizes:
            raise InvalidArgumentError(
                f"{trace.path} is of another model than {whose}: it has "
                f"{_sizes_text(sizes_of(trace))}, expected {_sizes_text(sizes)}"
            )


def read_sequences(traces: Iterable[Trace], vocab_size: int) -> list[RoutedSequence]:
    """Read all sequences.

    Raises:
        FormatError: a file holds wrong ids.
    """
    found: list[RoutedSequence] = []
    for trace in traces:
        for shard in trace.shards():
            expert_ids = shard.expert_ids
            token_ids = shard.tensor("token_ids")
            guesses = shard.tensor("prefetch_ids") if "prefetch_ids" in trace.tensors else None
            for row, length in enumerate(shard.lengths.tolist()):
                tokens = np.ascontiguousarray(token_ids[row, :length])
                outside = (tokens < 0) | (tokens >= vocab_size)
                if outside.any():
                    at = int(outside.argmax())
                    raise FormatError(
                        f"{shard.file}: token_ids[{row}, {at}]: expected ids from 0 to "
                        f"{vocab_size - 1}, those of the model, found {tokens[at]}"
                    )
                found.append(
                    RoutedSequence(
                        tokens,
                        expert_ids[row, :, :length],
                        None if guesses is None else guesses[row, :, :length],
                        shard.domains[row],
                        sequence_hash(tokens),
                    )
                )
    return found


def activity(expert_ids: NDArray[Any], num_experts: int) -> NDArray[np.bool_]:
    """Return (L, T, k) ids as (L, T, E) bool; numbers that are no expert name none."""
    result = np.zeros((*expert_ids.shape[:2], num_experts + 1), np.bool_)
    known = np.minimum(expert_ids.astype(np.int64), num_experts)
    np.put_along_axis(result, known, True, axis=2)
    return result[:, :, :num_experts]


def _sizes_text(sizes: RoutingSizes) -> str:
    layers = sizes.moe_layers
    return (
        f"{sizes.top_k} of {sizes.num_experts} experts in {len(layers)} layers "
        f"({layers[0]} to {layers[-1]})"
    )
