"""Which model and which machine a measurement is of."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path

from moerun import _moerun
from moerun.errors import FileError
from moerun.hub import resolve_model

# What routing and times depend on, of config.json.
_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_moe_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "top_k",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "vocab_size",
    "dtype",
)

_SMALL_FILE_BYTES = 64 << 20
_SAMPLE_BYTES = 64 << 10
_NUM_SAMPLES = 64  # of a file of weights


def model_id(path: str | os.PathLike[str] | None = None) -> str:
    """Return 16 hexadecimal digits that two models share if their routing and times may be mixed.

    They are made of what config.json says about sizes and types, and of the names and sizes of the
    weights' files. Where the model lies does not matter; no weights are read.

    Args:
        path: as for `moerun.Model.load`.

    Raises:
        MissingFileError, FileError, FormatError, UnsupportedModelError: as `moerun.Model.load`.
    """
    directory = resolve_model(path)
    config = _moerun.model_config(str(directory))
    try:
        files = sorted((file.name, file.stat().st_size) for file in directory.glob("*.safetensors"))
    except OSError as error:
        raise FileError(f"cannot read the folder {directory}: {error.strerror}") from error
    facts = {"config": {name: config[name] for name in _FIELDS}, "files": files}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def contents_of(path: str | os.PathLike[str] | None = None) -> str:
    """Return 16 hexadecimal digits that differ for models which write other texts.

    They are made of all small files of the model (tokenizer, templates, config.json), and of the
    headers and some places of the weights: reading all of those would take too long.

    Args:
        path: as for `moerun.Model.load`.

    Raises:
        MissingFileError: there is no such model.
        FileError: a file cannot be read.
    """
    directory = resolve_model(path)
    found = hashlib.sha256()
    try:
        for file in sorted(each for each in directory.iterdir() if each.is_file()):
            size = file.stat().st_size
            found.update(f"{file.name}\0{size}\0".encode())
            if file.suffix != ".safetensors" and size <= _SMALL_FILE_BYTES:
                found.update(file.read_bytes())
            elif file.suffix == ".safetensors":
                with file.open("rb") as weights:
                    found.update(weights.read(_SAMPLE_BYTES))
                    for place in range(1, _NUM_SAMPLES + 1):
                        weights.seek(max(0, size * place // _NUM_SAMPLES - _SAMPLE_BYTES))
                        found.update(weights.read(_SAMPLE_BYTES))
    except OSError as error:
        raise FileError(f"cannot read the files of {directory}: {error.strerror}") from error
    return found.hexdigest()[:16]


def machine_name() -> str:
    """Return what of this machine times depend on: its processor, usable cores, and GPUs."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                name = " ".join(value.split())
                break
    except OSError:
        pass  # not Linux
    cores = _moerun.num_usable_cpus()
    gpus = [device["name"] for device in _moerun.build_info()["cuda"]["devices"]]
    return ", ".join([name, f"{cores} core{'' if cores == 1 else 's'}", *gpus])
