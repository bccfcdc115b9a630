"""Writes traces: shard by shard, so that memory stays bounded and an end at any time is no loss."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moerun.arguments import check_int, check_number, check_str
from moerun.errors import FileError, FormatError, InvalidArgumentError
from moerun.trace.header import (
    MAX_EXPERTS,
    SUFFIX,
    TraceHeader,
    shards_on_disk,
)
from moerun.trace.journal import Journal, read_journal
from moerun.trace.reader import Trace, TraceShard, open_shard
from moerun.trace.routing import SequenceRouting
from moerun.trace.sequence_check import check_sequence, optional_tensors
from moerun.trace.shard_file import (
    Labelled,
    ShardSize,
    load_sequences,
    save_shard,
)
from moerun.trace.work_folder import WorkFolder
from moerun.user_files import user_path


class TraceWriter:
    """Writes a trace; a context manager that leaves a valid one however its block ends.

    While it is open, full shards are in the folder `<path>.partial`, and every few seconds the
    sequences of the next one go to a journal there. `close` gives the shards their names: `path`
    itself, or `stem-00001-of-00003.safetensors` and so on. The end of the block closes, also after
    an exception: the sequences so far are a trace of their own, which `resume` can go on with;
    `discard` drops it instead. After a crash the folder is still there, and `resume` goes on with
    the sequences in it. The files depend on the arguments and the sequences alone: not on time,
    nor on how often a recording was interrupted and resumed.

    One writer at a time writes to a name: a lock in the folder, which ends with the process,
    keeps others out.

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
        journal_seconds: a sequence that is appended this long after the last writing is written
            with those before it.

    Raises:
        FileError: there is a trace of this name already and neither `resume` nor `overwrite` is
            set; another process writes to it; or a file cannot be written.
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
        journal_seconds: float = 5.0,
    ) -> None:
        self.path = user_path(path, "the path of a trace")
        if not self.path.name.endswith(SUFFIX) or self.path.name == SUFFIX:
            raise InvalidArgumentError(
                f"a trace is a *{SUFFIX} file, not {self.path}; try {self.path}{SUFFIX}"
            )
        layers = tuple(check_int("a number in moe_layers", n, 0, 2**20) for n in moe_layers)
        if not layers or any(a >= b for a, b in itertools.pairwise(layers)):
            raise InvalidArgumentError(f"moe_layers: expected rising layer numbers, found {layers}")
        check_int("shard_bytes", shard_bytes, 1, 10**18)
        self._journal_seconds = check_number("journal_seconds", journal_seconds, 0)
        for key, value in (metadata or {}).items():
            check_str("a key of metadata", key)
            check_str(f"metadata[{key!r}]", value)
        check_int("num_experts", num_experts, 0)
        check_int("top_k", top_k, 0)
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
            shard_bytes=shard_bytes,
        )
        self._has: tuple[str, ...] | None = None  # optional tensors, as the first sequence has them
        self._waiting: list[Labelled] = []
        self._size = ShardSize(self._header, shard_bytes)
        self._written: list[Path] = []
        self._num_written = 0  # sequences in full shards
        self._num_safe = 0  # sequences on the disk, in shards or in the journal
        self._previous = ""  # digest of the last full shard
        self._written_at = time.monotonic()
        self._is_closed = False
        self._replaced: list[Path] = []
        self._folder = WorkFolder(self.path)
        self._journal = Journal(self._folder.journal)
        try:
            self._begin(resume, overwrite)
        except OSError as error:
            self._folder.leave()
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error
        except BaseException:
            self._folder.leave()
            raise

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
        check_sequence(routing, self._header)
        has = optional_tensors(routing)
        if self._has is not None and has != self._has:
            raise InvalidArgumentError(
                f"expected the tensors {list(self._has)} as for the sequences before, found "
                f"{list(has)}"
            )
        self._has = has
        self._keep([(routing, domain)])
        if self._size.is_full:
            self._written.append(self._write_shard())
        elif time.monotonic() - self._written_at >= self._journal_seconds:
            self._write_journal()

    def close(self) -> list[Path]:
        """Write what is left and give all files their names; closing twice is fine.

        Returns:
            The files, none if there was no sequence.

        Raises:
            FileError: a file cannot be written; what is there stays for `resume`.
        """
        if self._is_closed:
            return list(self._written)
        self._is_closed = True
        try:
            if self._waiting:
                self._written.append(self._write_shard())
            shards, self._written = self._written, []
            self._journal.close()
            self._written = self._folder.move_out(shards, self._replaced if shards else [])
        except OSError as error:
            self._written = []
            self._folder.leave()
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error
        return list(self._written)

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
        self._written = []
        self._journal.close()
        try:
            self._folder.remove()
        except OSError as error:
            raise FileError(f"{self._folder} cannot be removed: {error.strerror}") from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, resume: bool, overwrite: bool) -> None:
        """Find what is there, under the lock: go on with it, replace it, or refuse."""
        outside, inside = shards_on_disk(self.path), self._folder.files()
        if (outside or inside) and not resume and not overwrite:
            raise FileError(
                f"{[*outside, *inside][0]} exists already: --resume goes on with it, --overwrite "
                "replaces it"
            )
        self._folder.clean()
        if not resume:
            self._replaced = outside
            for file in inside:
                file.unlink()
            return
        if self._folder.is_moving:
            self._folder.finish_moving()
        elif outside and not inside:
            for shard in Trace.open(self.path).shards():
                self._check_resumed(shard)  # before anything is moved
            self._folder.take_in(len(outside))
        else:  # a recording that was to replace a trace did not reach its end
            self._replaced = outside
        self._go_on()

    def _go_on(self) -> None:
        """Count the full shards, and take the other sequences back to memory."""
        shards = self._folder.shards()
        for index, file in enumerate(shards, start=1):
            if file != self._folder.shard(index):
                raise FormatError(f"{self._folder.shard(index)} is missing")
            shard = open_shard(file)
            self._check_resumed(shard)
            if shard.header.previous != self._previous:
                raise FormatError(f"{file} does not belong to {self._folder.shard(index - 1)}")
            if index == len(shards) and not self._fills(shard):
                self._keep(load_sequences(shard))
            else:
                self._written.append(file)
                self._num_written += len(shard.lengths)
                self._previous = shard.digest
        self._num_safe = self.num_sequences
        good_bytes = 0
        records = read_journal(self._journal.path) if self._journal.path.exists() else iter(())
        for first, record, end in records:
            self._check_resumed(record)
            if first > self.num_sequences:
                raise FormatError(
                    f"{self._journal.path} goes on with sequence {first}, expected "
                    f"{self.num_sequences}"
                )
            self._keep(load_sequences(record)[self.num_sequences - first :])
            good_bytes = end
        self._num_safe = self.num_sequences
        self._journal.cut(good_bytes)

    def _fills(self, shard: TraceShard) -> bool:
        """Return whether a shard is full; only the last of a trace may not be."""
        size = ShardSize(self._header, self._header.shard_bytes)
        events = shard.places["cache_events"].shape[0] if "cache_events" in shard.places else 0
        for tokens, domain in zip(shard.lengths.tolist(), shard.domains, strict=True):
            size.add(tokens, sorted(shard.tensors), events, domain)
            events = 0  # the sum counts, not whose they are
        return size.is_full

    def _keep(self, sequences: Sequence[Labelled]) -> None:
        for routing, domain in sequences:
            self._waiting.append((routing, domain))
            events = 0 if routing.cache_events is None else len(routing.cache_events)
            self._size.add(routing.num_tokens, optional_tensors(routing), events, domain)

    def _write_shard(self) -> Path:
        target = self._folder.shard(len(self._written) + 1)
        self._previous = save_shard(target, self._header, self._waiting, self._previous)
        self._num_written += len(self._waiting)
        self._num_safe = self._num_written
        self._waiting = []
        self._size.clear()
        self._journal.cut(0)
        self._written_at = time.monotonic()
        return target

    def _write_journal(self) -> None:
        unsafe = self._waiting[self._num_safe - self._num_written :]
        if unsafe:
            self._journal.append(self._header, self._num_safe, unsafe)
            self._num_safe = self.num_sequences
        self._written_at = time.monotonic()

    def _check_resumed(self, shard: TraceShard) -> None:
        found, header = shard.header, self._header
        wanted = {
            "model": (found.model, header.model),
            "num_experts": (found.num_experts, header.num_experts),
            "top_k": (found.top_k, header.top_k),
            "moe_layers": (list(found.moe_layers), list(header.moe_layers)),
            **{
                key: (found.extra.get(key), header.extra.get(key))
                for key in sorted(header.extra.keys() | found.extra.keys())
                if key != "token_ids"
            },
            "shard_bytes": (found.shard_bytes or "none", header.shard_bytes),
        }
        for name, (there, asked) in wanted.items():
            if there != asked:
                name, there, asked = _difference(name, there, asked)
                raise InvalidArgumentError(
                    f"{self.path} cannot be resumed: it was recorded with {name} = {there}, this "
                    f"would have {asked}; use the same settings, or another name"
                )
        self._has = tuple(sorted(shard.tensors))


def _difference(name: str, there: Any, asked: Any) -> tuple[str, Any, Any]:
    """Name the first entry that differs where both are JSON objects."""
    try:
        a, b = json.loads(there), json.loads(asked)
    except (TypeError, ValueError, RecursionError):
        return name, there, asked
    if not isinstance(a, dict) or not isinstance(b, dict):
        return name, there, asked
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            return _difference(key, json.dumps(a.get(key)), json.dumps(b.get(key)))
    return name, there, asked
