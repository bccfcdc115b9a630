"""Which of the waiting sequences to decode together: the token scheduler of ExpertFlow.

A batch needs every expert that any of its sequences uses. Two batches of sequences whose predicted
paths overlap need fewer than two in order of arrival. From arXiv 2410.17954; docs/batching.md says
how the search works.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, shown
from moerun.errors import InvalidArgumentError

__all__ = ["active_experts", "split_batches"]


def split_batches(
    paths: NDArray[Any], sizes: Sequence[int] | None = None, *, top_k: int | None = None
) -> tuple[NDArray[np.int64], ...]:
    """Split waiting sequences into batches that need few experts.

    The sum over batches of `active_experts` is never more than in order of arrival, and that order
    stays where nothing better is found. The same input has the same result.

    Args:
        paths: (M, L, E), for each of M sequences which experts of L layers its next token is
            predicted to use: bool, or with `top_k` floats that rise with their probabilities.
        sizes: of the batches, M in all; None for two halves, the first the larger one.
        top_k: how many experts of each layer count as used, the likeliest; for floats only.

    Returns:
        The sequences of each batch, int64, each in rising order. Of batches of equal size, the one
        with the sequence that arrived first comes first.

    Raises:
        InvalidArgumentError: an array of another shape or type, numbers that are not numbers, more
            than 4096 sequences or 64 batches, or sizes that do not add up to M.
    """
    words, num_bits = _packed(paths, top_k)
    count = len(words)
    if sizes is None:
        sizes = (count - count // 2, count // 2)
    batches = _moerun.split_batches(words, num_bits, _whole_numbers("sizes", "a size", sizes))
    return tuple(np.array(batch, np.int64) for batch in batches)


def active_experts(
    paths: NDArray[Any], indices: Sequence[int] | NDArray[Any], *, top_k: int | None = None
) -> int:
    """Return how many experts of all layers the sequences `indices` are predicted to use together.

    Args:
        paths: (M, L, E) bool, or floats with `top_k`, as for `split_batches`.
        indices: of sequences, 0 to M - 1; any number of them.
        top_k: as for `split_batches`.

    Raises:
        InvalidArgumentError: as for `split_batches`, or there is no such sequence.
    """
    words, num_bits = _packed(paths, top_k)
    chosen = _whole_numbers("indices", "an index", indices)
    return _moerun.num_active_experts(words, num_bits, chosen)


def _packed(paths: Any, top_k: int | None) -> tuple[NDArray[np.uint64], int]:
    """Return the rows of bits of `paths`, and how many bits count."""
    array = np.asarray(paths)
    if array.ndim != 3:
        raise InvalidArgumentError(
            f"paths must have the shape (sequences, layers, experts), not {array.shape}"
        )
    num_bits = array.shape[1] * array.shape[2]
    if np.issubdtype(array.dtype, np.floating):
        if top_k is None:
            raise InvalidArgumentError("paths of probabilities need top_k, the experts a layer")
        count = check_int("top_k", top_k, 0, array.shape[2])
        return _moerun.likeliest_paths(array.astype(np.float32), count), num_bits
    if array.dtype != np.bool_:
        raise InvalidArgumentError(f"paths must be bool or float, not {array.dtype}")
    if top_k is not None:
        raise InvalidArgumentError("top_k is for paths of floats; these are bool")
    packed = np.packbits(array.reshape(len(array), num_bits), axis=1, bitorder="little")
    rows = np.zeros((len(array), -(-num_bits // 64) * 8), np.uint8)
    rows[:, : packed.shape[1]] = packed
    return rows.view("<u8"), num_bits


def _whole_numbers(name: str, one: str, values: Any) -> list[int]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidArgumentError(f"{name} must be a sequence of ints, not {shown(values)}")
    return [check_int(one, value, 0, 2**32) for value in values]
