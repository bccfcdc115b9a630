"""Opens traces: safetensors files in the format that docs/traces.md describes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.errors import FileError, FormatError, InvalidArgumentError
from moerun.safetensors_file import TensorPlace, header_digest, read_header, read_tensor
from moerun.trace.header import TraceHeader, find_files
from moerun.user_files import open_regular, user_path

# Tensors by name: dtypes as safetensors names them, and what the axes are.
_REQUIRED = {
    "expert_ids": (("U8", "U16"), "SLTK"),
    "lengths": (("I32",), "S"),
    "token_ids": (("I32",), "ST"),
}
_OPTIONAL = {
    "expert_weights": (("F16",), "SLTK"),
    "router_logits": (("F16",), "SLTE"),
    "predicted_ids": (("I32",), "ST"),
    "prefetch_ids": (("U16",), "SLTK"),
    "cache_events": (("I32",), "N5"),
}


@dataclass(frozen=True)
class TraceShard:
    """One file of a trace: S sequences, padded to T tokens.

    Attributes:
        file: where it is.
        header: its metadata.
        first_sequence: number of sequences in the files before.
        lengths: (S) int32, tokens of each sequence.
        places: where the tensors are in the file, by name.
        digest: SHA-256 of the header of the file.
        begin: byte of `file` where it begins; above 0 in a journal only.
    """

    file: Path
    header: TraceHeader
    first_sequence: int
    lengths: NDArray[np.int32]
    places: Mapping[str, TensorPlace]
    digest: str
    begin: int = 0

    @property
    def domains(self) -> tuple[str, ...]:
        """A label for each sequence."""
        return self.header.domains

    @property
    def tensors(self) -> frozenset[str]:
        """Names of what there is beside `expert_ids` and `lengths`."""
        optional = self.places.keys() & _OPTIONAL.keys()
        if self.header.extra.get("token_ids") != "unknown":
            optional |= {"token_ids"}
        return frozenset(optional)

    @cached_property
    def expert_ids(self) -> NDArray[np.uint16]:
        """(S, L, T, k) uint8 or uint16, read and checked when first asked for.

        Raises:
            FormatError: an id is not below the number of experts, or comes twice in a token.
        """
        ids = self.tensor("expert_ids")
        try:
            _moerun.check_expert_ids(ids, self.lengths, self.header.num_experts)
        except InvalidArgumentError as error:
            raise FormatError(f"{self.file}: {error}") from None
        return ids

    def tensor(self, name: str) -> NDArray[Any]:
        """Return a tensor of this file as it is stored, None of it checked but shape and dtype.

        Raises:
            InvalidArgumentError: this trace has no such tensor.
            FileError: the file cannot be read any more, or is another one now.
            OutOfMemoryError: there is not enough memory for it.
        """
        if name not in self.places:
            raise InvalidArgumentError(f"{self.file} has no tensor {name}")
        where = str(self.file)
        with open_regular(self.file) as file:
            if header_digest(file, where, self.begin) != self.digest:
                raise FileError(f"{where} was written anew since it was opened; open it again")
            return read_tensor(file, self.places[name], where)


class Trace:
    """The routing of many sequences, on disk; made by `Trace.open`, read shard by shard.

    Attributes:
        path: what was opened.
        files: its files, in order.
        model: name of the model.
        num_experts: routed experts of a layer, E.
        top_k: experts that a token uses in a layer, k.
        moe_layers: numbers of the L layers with experts.
        domains: a label for each sequence.
        lengths: (sequences) int32, tokens of each sequence.
        metadata: what else the recorder wrote down, such as `engine` and `phase`.
        tensors: names of what there is beside `expert_ids` and `lengths`, in every file.
    """

    def __init__(self, path: Path, shards: list[TraceShard]) -> None:
        self.path = path
        self._shards = shards
        header = shards[0].header
        self.files = [shard.file for shard in shards]
        self.model = header.model
        self.num_experts = header.num_experts
        self.top_k = header.top_k
        self.moe_layers = list(header.moe_layers)
        self.domains = [domain for shard in shards for domain in shard.domains]
        self.lengths: NDArray[np.int32] = np.concatenate([shard.lengths for shard in shards])
        self.metadata = dict(header.extra)
        self.tensors = frozenset.intersection(*(shard.tensors for shard in shards))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a trace; reads the headers and the lengths of its files, nothing else.

        Args:
            path: a file; any shard of a set, or `t.safetensors` for `t-00001-of-00003.safetensors`
                and so on; or a folder with one trace in it.

        Raises:
            InvalidArgumentError: `path` is not a str or a path.
            MissingFileError: there is no trace, or a shard is missing.
            FileError: a file cannot be read, or a folder holds several traces.
            FormatError: a file is not a trace, is of another version, lacks a tensor, or the
                files do not belong together.
        """
        name = user_path(path, "the path of a trace")
        shards: list[TraceShard] = []
        num_sequences = 0
        for file in find_files(name):
            shard = open_shard(file, num_sequences)
            if shards:
                _check_same(shards[0], shard)
            shards.append(shard)
            num_sequences += len(shard.lengths)
        if len(shards) > 1:
            _check_chain(shards)
        return cls(name, shards)

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    @property
    def domain_names(self) -> list[str]:
        """The domains, each once, in the order in which they come."""
        return list(dict.fromkeys(self.domains))

    @property
    def expert_bytes(self) -> int | None:
        """Bytes of one routed expert as it was loaded, None if not recorded."""
        text = self.metadata.get("expert_bytes", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None

    def shards(self) -> Iterator[TraceShard]:
        """Yield the files one after the other; what has been read of one is not kept."""
        for shard in self._shards:
            yield replace(shard)  # without what this one has read

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held open between reads."""

    def __repr__(self) -> str:
        return (
            f"<moerun.Trace {self.path} model={self.model} sequences={self.num_sequences} "
            f"tokens={self.num_tokens} layers={len(self.moe_layers)} "
            f"num_experts={self.num_experts} top_k={self.top_k}>"
        )


def open_shard(file: Path, first_sequence: int = 0) -> TraceShard:
    """Open one file of a trace and check it as a trace of its own.

    Raises:
        FileError: it cannot be read.
        FormatError: it is no trace, or something in it is wrong.
    """
    with open_regular(file) as opened:
        return open_part(opened, file, first_sequence=first_sequence)


def open_part(
    opened: BinaryIO, file: Path, begin: int = 0, end: int | None = None, first_sequence: int = 0
) -> TraceShard:
    """Open a file of a trace that lies from byte `begin` to `end` in another file.

    Args:
        opened: `file`, opened by `open_regular`.
        file: its name.
        begin: its first byte.
        end: the byte after its last one, None for the end of `file`.
        first_sequence: number of its first sequence.

    Raises:
        FileError, FormatError: as `open_shard`.
    """
    found = read_header(opened, str(file), begin=begin, end=end)
    header = TraceHeader.parse(found.metadata, file)
    for name in _REQUIRED:
        if name not in found.tensors:
            raise FormatError(f"{file}: the tensor {name} is missing")
    sizes = {"S": len(header.domains), "L": len(header.moe_layers), "K": header.top_k}
    sizes |= {"E": header.num_experts, "5": 5}
    for name, (dtypes, axes) in {**_REQUIRED, **_OPTIONAL}.items():
        if name in found.tensors:
            place = found.tensors[name]
            _check_tensor(file, name, place.dtype, list(place.shape), dtypes, axes, sizes)
    lengths = read_tensor(opened, found.tensors["lengths"], str(file))
    wrong = np.flatnonzero((lengths < 1) | (lengths > sizes["T"]))
    if len(wrong) != 0:
        raise FormatError(
            f"{file}: lengths[{wrong[0]}]: expected 1 to {sizes['T']} tokens, found "
            f"{lengths[wrong[0]]}"
        )
    return TraceShard(file, header, first_sequence, lengths, found.tensors, found.digest, begin)


def _check_tensor(
    file: Path,
    name: str,
    dtype: str,
    shape: list[int],
    dtypes: tuple[str, ...],
    axes: str,
    sizes: dict[str, int],
) -> None:
    """Check a tensor against the sizes known so far; T and N are what the first one says."""
    if dtype not in dtypes:
        raise FormatError(f"{file}: tensor {name}: expected {' or '.join(dtypes)}, found {dtype}")
    if len(shape) == len(axes):
        for axis, size in zip(axes, shape, strict=True):
            sizes.setdefault(axis, size)
        if all(sizes[axis] == size for axis, size in zip(axes, shape, strict=True)):
            if 0 not in shape or axes == "N5":
                return
            raise FormatError(f"{file}: tensor {name} is empty: its shape is {shape}")
    expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
    raise FormatError(
        f"{file}: tensor {name}: expected the shape [{expected}] that the metadata and the other "
        f"tensors give, found {shape}"
    )


def _check_same(first: TraceShard, other: TraceShard) -> None:
    for name in ("model", "num_experts", "top_k", "moe_layers"):
        a, b = getattr(first.header, name), getattr(other.header, name)
        if a != b:
            raise FormatError(
                f"{other.file} does not belong to {first.file}: its {name} is {_short(b)}, not "
                f"{_short(a)}"
            )


def _check_chain(shards: list[TraceShard]) -> None:
    """Check that every file was written after the one before it, in one recording."""
    if not any(shard.header.contents or shard.header.previous for shard in shards):
        return  # from a recorder that ties nothing together
    for before, shard in zip([None, *shards], shards, strict=False):
        expected = "" if before is None else before.digest
        if shard.header.previous != expected or not shard.header.contents:
            raise FormatError(
                f"{shard.file} does not belong to {(before or shards[1]).file}: they are of two "
                "recordings with one name. Take all files from one of them, or record again with "
                "--overwrite"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
