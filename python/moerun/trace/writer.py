"""Writes traces: shard by shard, so that memory stays bounded and an end at any time is no loss."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int, check_str
from moerun.errors import FileError, FormatError, InvalidArgumentError
from moerun.trace.header import (
    MAX_EXPERTS,
    SUFFIX,
    TraceHeader,
    partial_folder,
    shard_path,
    shards_on_disk,
    stem_of,
)
from moerun.trace.reader import Trace
from moerun.trace.routing import NO_PREDICTION, SequenceRouting

_FLOAT16_MAX = float(np.finfo(np.float16).max)


class TraceWriter:
    """Writes a trace; a context manager that leaves a valid one however its block ends.

    While it is open, full shards are in the folder `<path>.partial`. `close` gives them their
    names: `path` itself, or `stem-00001-of-00003.safetensors` and so on. The end of the block
    closes, also after an exception: what was appended is a trace of its own, which `resume` can
    go on with; `discard` drops it instead. After a crash the folder is still there, and `resume`
    goes on with what is in it.

    Args:
        path: where the trace goes; ends in .safetensors.
        model: name of the model.
        num_experts: routed experts of a layer, E.
        top_k: experts that a token uses in a layer, k.
        moe_layers: numbers of the L layers with experts, rising.
        metadata: what else to write down, such as `engine`, `phase`, `expert_bytes`.
        shard_bytes: a file is written when this much is there for it.
        resume: append to what is there, which must have the same arguments; if nothing is there,
            begin.
        overwrite: replace what is there, at the end.

    Raises:
        FileError: there is a trace of this name already and neither `resume` nor `overwrite` is
            set; or a file cannot be written.
        InvalidArgumentError: an argument is out of its range, or differs from what is there.
        FormatError: what is there is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: str,
        num_experts: int,
        top_k: int,
        moe_layers: Sequence[int],
        metadata: Mapping[str, str] | None = None,
        shard_bytes: int = 256 * 2**20,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        if not self.path.name.endswith(SUFFIX) or self.path.name == SUFFIX:
            raise InvalidArgumentError(
                f"a trace is a *{SUFFIX} file, not {self.path}; try {self.path}{SUFFIX}"
            )
        layers = tuple(check_int("a number in moe_layers", n, 0, 2**20) for n in moe_layers)
        if not layers or any(a >= b for a, b in itertools.pairwise(layers)):
            raise InvalidArgumentError(f"moe_layers: expected rising layer numbers, found {layers}")
        check_int("shard_bytes", shard_bytes, 1)
        for key, value in (metadata or {}).items():
            check_str("a key of metadata", key)
            check_str(f"metadata[{key!r}]", value)
        if not 1 <= top_k <= num_experts <= MAX_EXPERTS:
            raise InvalidArgumentError(
                f"expected 1 <= top_k <= num_experts <= {MAX_EXPERTS}, found top_k = {top_k} and "
                f"num_experts = {num_experts}"
            )
        self._header = TraceHeader(
            check_str("model", model),
            int(num_experts),
            int(top_k),
            layers,
            (),
            dict(metadata or {}),
        )
        self._shard_bytes = shard_bytes
        self._folder = partial_folder(self.path)
        self._has: tuple[str, ...] | None = None  # optional tensors, as the first sequence has them
        self._waiting: list[tuple[SequenceRouting, str]] = []
        self._waiting_bytes = 0
        self._written: list[Path] = []
        self._num_written = 0
        self._is_closed = False
        self._replaced = [] if resume else shards_on_disk(self.path)
        there = [*shards_on_disk(self.path), *self._partial_shards()]
        if there and not resume and not overwrite:
            raise FileError(
                f"{there[0]} exists already: --resume goes on with it, --overwrite replaces it"
            )
        if resume and shards_on_disk(self.path) and not self._partial_shards():
            self._check_resumed(Trace.open(self.path))  # before anything is moved
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if resume:
                self._take_back()
            else:
                for file in self._partial_shards():
                    file.unlink()
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error

    @property
    def num_sequences(self) -> int:
        """Sequences so far, those from before `resume` included."""
        return self._num_written + len(self._waiting)

    def append(self, routing: SequenceRouting, domain: str) -> None:
        """Add a sequence; writes a file when there is enough for one.

        Raises:
            InvalidArgumentError: a shape does not fit, an id is out of range, or other optional
                tensors are there than for the sequences before.
            FileError: the file cannot be written.
        """
        if self._is_closed:
            raise InvalidArgumentError(f"{self.path} is closed: nothing can be appended to it")
        check_str("domain", domain)
        self._check(routing)
        self._waiting.append((routing, domain))
        self._waiting_bytes += _bytes_of(routing)
        if self._waiting_bytes >= self._shard_bytes:
            self._write_shard()

    def close(self) -> list[Path]:
        """Write what is left and give all files their names; closing twice is fine.

        Returns:
            The files, none if there was no sequence.

        Raises:
            FileError: a file cannot be written; what is there stays for `resume`.
        """
        if self._is_closed:
            return list(self._written)
        if self._waiting:
            self._write_shard()
        shards = self._written
        try:
            if shards:
                for file in self._replaced:
                    file.unlink()
            for index, file in enumerate(shards):
                target = shard_path(self.path, index + 1, len(shards))
                os.replace(file, target)
                shards[index] = target
            self._folder.rmdir()
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error
        self._is_closed = True
        return list(shards)

    def discard(self) -> None:
        """Drop everything that was appended; a trace that was to be replaced stays as it was.

        What `resume` found is dropped, too.

        Raises:
            FileError: a file cannot be removed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._waiting = []
        try:
            for file in self._written:
                file.unlink()
            self._written = []
            self._folder.rmdir()
        except OSError as error:
            raise FileError(f"{self._folder} cannot be removed: {error.strerror}") from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _partial_shards(self) -> list[Path]:
        return sorted(self._folder.glob(f"[0-9]*{SUFFIX}")) if self._folder.is_dir() else []

    def _partial_path(self, index: int) -> Path:
        return self._folder / f"{index:05d}{SUFFIX}"

    def _take_back(self) -> None:
        """Move the files of a finished trace back to where those of an unfinished one are."""
        stem = stem_of(self.path)
        for file in shards_on_disk(self.path):
            number = file.name[len(stem) + 1 : len(stem) + 6]
            os.replace(file, self._partial_path(1 if file == self.path else int(number)))
        for index, file in enumerate(self._partial_shards(), start=1):
            if file != self._partial_path(index):
                raise FormatError(f"{self._folder}: {self._partial_path(index).name} is missing")
            found = Trace.open(file)
            self._check_resumed(found)
            self._written.append(file)
            self._num_written += found.num_sequences

    def _check_resumed(self, found: Trace) -> None:
        header = self._header
        wanted = {
            "model": (found.model, header.model),
            "num_experts": (found.num_experts, header.num_experts),
            "top_k": (found.top_k, header.top_k),
            "moe_layers": (found.moe_layers, list(header.moe_layers)),
            **{
                key: (found.metadata.get(key), header.extra.get(key))
                for key in sorted(header.extra.keys() | found.metadata.keys())
                if key != "token_ids"
            },
        }
        for name, (there, asked) in wanted.items():
            if there != asked:
                name, there, asked = _difference(name, there, asked)
                raise InvalidArgumentError(
                    f"{self.path} cannot be resumed: it was recorded with {name} = {there}, this "
                    f"would have {asked}; use the same settings, or another name"
                )
        self._has = tuple(sorted(found.tensors))

    def _check(self, routing: SequenceRouting) -> None:
        header = self._header
        layers, experts, k = len(header.moe_layers), header.num_experts, header.top_k
        tokens = routing.expert_ids.shape[1] if routing.expert_ids.ndim == 3 else 0
        shapes: dict[str, tuple[NDArray[Any] | None, tuple[int, ...]]] = {
            "expert_ids": (routing.expert_ids, (layers, tokens, k)),
            "token_ids": (routing.token_ids, (tokens,)),
            "expert_weights": (routing.expert_weights, (layers, tokens, k)),
            "router_logits": (routing.router_logits, (layers, tokens, experts)),
            "predicted_ids": (routing.predicted_ids, (tokens,)),
            "prefetch_ids": (routing.prefetch_ids, (layers, tokens, k)),
        }
        for name, (array, shape) in shapes.items():
            if array is not None and (array.shape != shape or tokens == 0):
                raise InvalidArgumentError(
                    f"{name}: expected the shape ({', '.join(map(str, shape))}) with at least one "
                    f"token, found {array.shape}"
                )
        ids = routing.expert_ids
        if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= experts:
            raise InvalidArgumentError(
                f"expert_ids: expected integers from 0 to {experts - 1}, found {ids.dtype} from "
                f"{ids.min()} to {ids.max()}"
            )
        guesses = routing.prefetch_ids
        if guesses is not None and ((guesses >= experts) & (guesses != NO_PREDICTION)).any():
            raise InvalidArgumentError(
                f"prefetch_ids: expected experts from 0 to {experts - 1}, or {NO_PREDICTION} for "
                f"none, found up to {guesses.max()}"
            )
        events = routing.cache_events
        if events is not None and (events.ndim != 2 or events.shape[1] != 4):
            raise InvalidArgumentError(
                f"cache_events: expected the shape (events, 4), found {events.shape}"
            )
        _moerun.check_expert_ids(
            np.ascontiguousarray(ids[None], dtype=np.uint16),
            np.array([tokens], np.int32),
            experts,
        )
        names = [*shapes, "cache_events"][1:]
        has = tuple(sorted(name for name in names if getattr(routing, name) is not None))
        if self._has is None:
            self._has = has
        elif has != self._has:
            raise InvalidArgumentError(
                f"expected the tensors {list(self._has)} as for the sequences before, found "
                f"{list(has)}"
            )

    def _write_shard(self) -> None:
        sequences = [routing for routing, _ in self._waiting]
        tensors = _stacked(sequences, self._header.num_experts)
        extra = dict(self._header.extra)
        if sequences[0].token_ids is None:
            extra["token_ids"] = "unknown"
        header = TraceHeader(
            self._header.model,
            self._header.num_experts,
            self._header.top_k,
            self._header.moe_layers,
            tuple(domain for _, domain in self._waiting),
            extra,
        )
        target = self._partial_path(len(self._written) + 1)
        temporary = target.with_suffix(".tmp")
        try:
            safetensors.numpy.save_file(tensors, temporary, header.as_metadata())
            temporary.chmod(_plain_mode(self._folder))  # the library makes it private
            os.replace(temporary, target)
        except (OSError, safetensors.SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise FileError(f"{target} cannot be written: {error}") from error
        self._written.append(target)
        self._num_written += len(self._waiting)
        self._waiting = []
        self._waiting_bytes = 0


def _difference(name: str, there: Any, asked: Any) -> tuple[str, Any, Any]:
    """Name the first entry that differs where both are JSON objects."""
    try:
        a, b = json.loads(there), json.loads(asked)
    except (TypeError, ValueError):
        return name, there, asked
    if not isinstance(a, dict) or not isinstance(b, dict):
        return name, there, asked
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            return _difference(key, json.dumps(a.get(key)), json.dumps(b.get(key)))
    return name, there, asked


def _plain_mode(folder: Path) -> int:
    """Return the permissions that a new file has in `folder`, which says what the umask is."""
    return folder.stat().st_mode & 0o666


def _bytes_of(routing: SequenceRouting) -> int:
    arrays = (
        routing.expert_ids,
        routing.token_ids,
        routing.expert_weights,
        routing.router_logits,
        routing.predicted_ids,
        routing.prefetch_ids,
        routing.cache_events,
    )
    return sum(array.nbytes for array in arrays if array is not None)


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
