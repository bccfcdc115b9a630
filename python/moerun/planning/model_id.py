"""Which model a measurement or a trace is of."""

from __future__ import annotations

import hashlib
import json
import os

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
