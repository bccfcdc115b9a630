"""One file of a trace: sequences to tensors and back, and how the file gets to the disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moerun.errors import FileError
from moerun.safetensors_file import data_digest, write_tensors
from moerun.trace.header import TraceHeader
from moerun.trace.reader import TraceShard
from moerun.trace.routing import SequenceRouting

Labelled = tuple[SequenceRouting, str]

_FLOAT16_MAX = float(np.finfo(np.float16).max)
_DOMAIN_BYTES = 8 * 2**20  # of all labels of a file, so that its header stays readable


class ShardSize:
    """How much is in a file so far; decides where the next file begins.

    The size depends on the sequences alone, so a resumed recording cuts where an uninterrupted
    one does.

    Args:
        header: sizes of the model.
        limit: bytes at which a file is full.
    """

    def __init__(self, header: TraceHeader, limit: int) -> None:
        self._header = header
        self._limit = limit
        self._num_bytes = 0
        self._domain_bytes = 0

    def add(self, tokens: int, names: Sequence[str], num_events: int, domain: str) -> None:
        """Count a sequence.

        Args:
            tokens: its tokens.
            names: its optional tensors.
            num_events: its cache events.
            domain: its label.
        """
        header = self._header
        choices = len(header.moe_layers) * header.top_k
        of_token = 2 * choices  # bytes
        sizes = {
            "token_ids": 4,
            "expert_weights": 4 * choices,
            "router_logits": 4 * len(header.moe_layers) * header.num_experts,
            "predicted_ids": 4,
            "prefetch_ids": 2 * choices,
        }
        of_token += sum(sizes.get(name, 0) for name in names)
        self._num_bytes += tokens * of_token + 16 * num_events
        self._domain_bytes += len(json.dumps(domain)) + 2

    @property
    def is_full(self) -> bool:
        """Whether the file ends here."""
        return self._num_bytes >= self._limit or self._domain_bytes >= _DOMAIN_BYTES

    def clear(self) -> None:
        """Begin with an empty file."""
        self._num_bytes = self._domain_bytes = 0


def write_sequences(
    file: BinaryIO, header: TraceHeader, sequences: Sequence[Labelled], previous: str
) -> str:
    """Write sequences as one file of a trace: the same bytes for the same sequences.

    Args:
        file: open for writing, where the file is to begin.
        header: of the trace.
        sequences: at least one.
        previous: digest of the header of the file before, "" for the first file.

    Returns:
        The digest of the header.
    """
    tensors = _stacked([routing for routing, _ in sequences], header.num_experts)
    extra = dict(header.extra)
    if sequences[0][0].token_ids is None:
        extra["token_ids"] = "unknown"
    own = replace(
        header,
        domains=tuple(domain for _, domain in sequences),
        extra=extra,
        contents=data_digest(tensors),
        previous=previous,
    )
    return write_tensors(file, tensors, own.as_metadata())


def save_shard(
    target: Path, header: TraceHeader, sequences: Sequence[Labelled], previous: str
) -> str:
    """Write a file that is complete under its name, or not there, also after a power cut.

    Returns:
        The digest of the header.

    Raises:
        FileError: it cannot be written.
    """
    temporary = target.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            digest = write_sequences(file, header, sequences, previous)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise FileError(f"{target} cannot be written: {error.strerror or error}") from error
    return digest


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_sequences(shard: TraceShard) -> list[Labelled]:
    """Return the sequences of a file as they were before they were written.

    Raises:
        FileError, FormatError: the file cannot be read, or holds a wrong expert id.
    """
    names = shard.tensors - {"cache_events"}
    arrays = {name: shard.tensor(name) for name in sorted(names)}
    arrays["expert_ids"] = shard.expert_ids.astype(np.uint16)
    events = shard.tensor("cache_events") if "cache_events" in shard.tensors else None
    found: list[Labelled] = []
    for index, tokens in enumerate(shard.lengths.tolist()):
        own: dict[str, NDArray[Any]] = {}
        for name, array in arrays.items():
            part = array[index, :tokens] if array.ndim == 2 else array[index, :, :tokens]
            # float16 to float32 and back gives the same bits.
            own[name] = part.astype(np.float32) if part.dtype == np.float16 else part.copy()
        if events is not None:
            own["cache_events"] = events[events[:, 0] == index, 1:]
        found.append((SequenceRouting(**own), shard.domains[index]))
    return found


def _stacked(sequences: list[SequenceRouting], num_experts: int) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file: all sequences, padded to the longest."""
    longest = max(sequence.num_tokens for sequence in sequences)
    unknown = [np.full(sequence.num_tokens, -1, np.int32) for sequence in sequences]
    tensors: dict[str, NDArray[Any]] = {
        "expert_ids": _padded(
            [sequence.expert_ids for sequence in sequences],
            1,
            longest,
            np.uint8 if num_experts <= 256 else np.uint16,
        ),
        "lengths": np.array([sequence.num_tokens for sequence in sequences], np.int32),
        "token_ids": _padded(
            [
                other if sequence.token_ids is None else sequence.token_ids
                for sequence, other in zip(sequences, unknown, strict=True)
            ],
            0,
            longest,
            np.int32,
        ),
    }
    for name, axis, dtype in (
        ("expert_weights", 1, np.float16),
        ("router_logits", 1, np.float16),
        ("predicted_ids", 0, np.int32),
        ("prefetch_ids", 1, np.uint16),
    ):
        arrays = [getattr(sequence, name) for sequence in sequences]
        if arrays[0] is not None:
            tensors[name] = _padded(arrays, axis, longest, dtype)
    if sequences[0].cache_events is not None:
        tensors["cache_events"] = np.concatenate(
            [
                np.insert(np.asarray(sequence.cache_events, np.int32), 0, index, axis=1)
                for index, sequence in enumerate(sequences)
            ]
        )
    return tensors


def _padded(arrays: list[NDArray[Any]], axis: int, longest: int, dtype: Any) -> NDArray[Any]:
    shape = list(arrays[0].shape)
    shape[axis] = longest
    result = np.zeros((len(arrays), *shape), dtype)
    for target, array in zip(result, arrays, strict=True):
        if dtype is np.float16:
            array = np.clip(array, -_FLOAT16_MAX, _FLOAT16_MAX)
        np.moveaxis(target, axis, 0)[: array.shape[axis]] = np.moveaxis(array, axis, 0)
    return result
