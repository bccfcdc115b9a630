"""Turns the router dumps of the study's scripts (arXiv 2505.16056) into traces."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import FormatError, InvalidArgumentError, MissingFileError
from moerun.recording.data_fingerprint import data_fingerprint
from moerun.recording.interrupts import interrupts_delayed
from moerun.safetensors_file import read_header
from moerun.trace import SequenceRouting, TraceWriter
from moerun.user_files import open_regular, read_at, user_path

_NAME = re.compile(r"(.+)_(\d{2,4})\.safetensors")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Dump:
    """The router logits of one layer for one dataset, on disk.

    Attributes:
        file: the file of the layer.
        name: the tensor, which is the dataset.
        dtype: as safetensors names it.
        shape: (sequences, tokens, experts).
        offset: first byte in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, int, int]
    offset: int

    def sequence(self, index: int) -> NDArray[np.float32]:
        """Return the logits of a sequence, (T, E).

        Raises:
            FormatError: one is not a number.
        """
        _, tokens, experts = self.shape
        size = tokens * experts * np.dtype(_DTYPES[self.dtype]).itemsize
        data = bytearray(size)
        with open_regular(self.file) as opened:
            read_at(opened, self.offset + index * size, data, str(self.file))
        raw = np.frombuffer(data, _DTYPES[self.dtype]).reshape(tokens, experts)
        if self.dtype == "BF16":
            logits = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            logits = raw.astype(np.float32)
        wrong = np.argwhere(np.isnan(logits))
        if len(wrong) != 0:
            token, expert = wrong[0]
            raise FormatError(
                f"{self.file}: tensor {self.name!r}[{index}, {token}, {expert}]: expected a router "
                "logit, found nan"
            )
        return logits


def import_study(
    paths: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    top_k: int,
    model: str | None = None,
    with_logits: bool = False,
    shard_bytes: int = 256 * 2**20,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write a trace of the dumps `{model}_{layer:02d}.safetensors`.

    A tensor of such a file holds the router logits of one dataset, `[sequences, tokens, experts]`;
    its name becomes the domain. The `top_k` largest logits of a token are its experts, of equal
    ones those with the lower ids: right for models whose routers take the largest logits. It is
    written as a whole or, after an error or Ctrl-C, not at all.

    Args:
        paths: the files, or directories that hold them.
        output: the trace, *.safetensors.
        top_k: experts that a token uses.
        model: which model, where there are files of several.
        with_logits: keep the logits in the trace.
        shard_bytes: a file is written when this much is there for it.
        overwrite: remove what is there.
        progress: called with the sequences done and those in all.
        warn: told if numbers of layers are missing between others.

    Returns:
        The files of the trace.

    Raises:
        MissingFileError: there are no such files.
        FileError: a file cannot be read or written.
        FormatError: a file is damaged, or the layers do not fit together.
        InvalidArgumentError: `top_k` is out of range, or the files are of several models.
    """
    check_int("top_k", top_k, 1)
    name, files = _find(paths, model)
    layers = [_open(file) for file in files.values()]
    _check_alike(layers)
    if warn is not None and (missing := sorted({*range(min(files), max(files))} - files.keys())):
        warn(f"no dumps of {_listed(missing)}: right only if the model has no experts there")
    dumps = list(layers[0].values())
    num_experts = dumps[0].shape[2]
    if top_k > num_experts:
        raise InvalidArgumentError(
            f"top_k must be at most the number of experts, {num_experts}, not {top_k}"
        )
    writer = TraceWriter(
        output,
        model=name,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=list(files),
        metadata={
            "engine": "import",
            "phase": "prefill",
            "created_by": f"moerun {_moerun.__version__}",
            "recording": json.dumps({"files": _fingerprint(list(files.values()))}),
        },
        shard_bytes=shard_bytes,
        overwrite=overwrite,
    )
    total = sum(dump.shape[0] for dump in dumps)
    done = 0
    written: list[Path] | None = None
    try:
        for dump in dumps:
            for index in range(dump.shape[0]):
                logits = np.stack([layer[dump.name].sequence(index) for layer in layers])
                # A stable sort of the negated logits: ties go to the lower id.
                ids = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
                routing = SequenceRouting(
                    ids.astype(np.uint16), router_logits=logits if with_logits else None
                )
                with interrupts_delayed():
                    writer.append(routing, dump.name)
                done += 1
                if progress is not None:
                    progress(done, total)
        with interrupts_delayed():
            written = writer.close()
    except BaseException:
        if written is None:
            with interrupts_delayed():
                writer.discard()
            raise
    return written  # a Ctrl-C during the last step came too late


def _listed(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
    return f"layer{'' if len(layers) == 1 else 's'} {shown}"


def _find(
    paths: Iterable[str | os.PathLike[str]], model: str | None
) -> tuple[str, dict[int, Path]]:
    """Return the name of the model and its files, by layer."""
    models: dict[str, dict[int, Path]] = {}
    folders = [user_path(path, "the path of a dump") for path in paths]
    for path in folders:
        if os.path.isdir(path):
            files = sorted(path.iterdir())
        elif os.path.lexists(path):
            files = [path]
            if not _NAME.fullmatch(path.name):
                raise InvalidArgumentError(
                    f"{path}: expected a name such as model_00.safetensors, with the layer's number"
                )
        else:
            raise MissingFileError(f"there is no file or directory {path}")
        for file in files:
            match = _NAME.fullmatch(file.name)
            if match is not None:
                other = models.setdefault(match[1], {}).setdefault(int(match[2]), file)
                if other != file:
                    raise InvalidArgumentError(f"{other} and {file} are the same layer")
    if model is not None and model not in models:
        raise MissingFileError(
            f"there are no files {model}_00.safetensors and so on, "
            + (f"only of {', '.join(sorted(models)[:8])}" if models else "nor of another model")
        )
    if not models:
        where = ", ".join(str(path) for path in folders[:3])
        raise MissingFileError(
            f"there are no router dumps in {where}: expected MODEL_00.safetensors and so on"
        )
    if model is None and len(models) > 1:
        raise InvalidArgumentError(
            f"found dumps of several models, choose one with --model: {', '.join(sorted(models))}"
        )
    name = model or next(iter(models))
    return name, dict(sorted(models[name].items()))


def _open(file: Path) -> dict[str, Dump]:
    """Return the tensors of a layer's file by name, in the order in which they are stored."""
    with open_regular(file) as opened:
        header = read_header(opened, str(file))
    dumps = {}
    for name, place in header.tensors.items():
        if len(place.shape) != 3 or 0 in place.shape or place.dtype not in _DTYPES:
            raise FormatError(
                f"{file}: tensor {name!r}: expected router logits of shape [sequences, tokens, "
                f"experts], found {place.dtype} of shape {list(place.shape)}"
            )
        sequences, tokens, experts = place.shape
        dumps[name] = Dump(file, name, place.dtype, (sequences, tokens, experts), place.offset)
    if not dumps:
        raise FormatError(f"{file} holds no tensors")
    return dumps


def _check_alike(layers: Sequence[dict[str, Dump]]) -> None:
    first = layers[0]
    num_experts = next(iter(first.values())).shape[2]
    for layer in layers:
        file = next(iter(layer.values())).file
        if layer.keys() != first.keys():
            other = next(iter(first.values())).file
            names = sorted(layer.keys() ^ first.keys())
            raise FormatError(f"{file} and {other} differ: only one of them has {names[0]!r}")
        for name, dump in layer.items():
            expected = (*first[name].shape[:2], num_experts)
            if dump.shape != expected:
                raise FormatError(
                    f"{file}: tensor {name!r}: expected the shape {list(expected)} of the other "
                    f"layers and datasets, found {list(dump.shape)}"
                )


def _fingerprint(files: Sequence[Path]) -> str:
    return data_fingerprint(files, files[0].parent)
