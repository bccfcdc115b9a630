"""Which model, and which machine: the one notion of "the same" for everything that is stored.

Plans, predictors, stored plans, recordings and batches that go on compare parts of an identity.
Each part is made of what is in the files. Where they lie, what time they have, and which shard
holds a tensor do not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from moerun import _moerun
from moerun.arguments import check_int
from moerun.errors import FileError, FormatError, MissingFileError
from moerun.hub import resolve_model
from moerun.user_files import open_regular, read_at, read_bounded

# Times depend on these of config.json, and on the headers of the weights.
_SIZES = (
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
)
# Fields that change no token: who wrote the file, and in which type (the tensors decide).
_NO_FACTS = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_TOKENIZER = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
# Read where there is no tokenizer.json.
_VOCABULARIES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_FIELD = "chat_template"  # of tokenizer_config.json
# Not whatever else is there: a trace may be written beside the weights.
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")

_MAX_FILE_BYTES = 1 << 30
_SAMPLE_BYTES = 64 << 10
_NUM_SAMPLES = 64  # of a file of weights that is no safetensors file
_NO_TOKENIZER = "0" * 64

# Size, times and place of the files that a fingerprint was made of, and the fingerprint.
_Stamp = tuple[int, ...] | None
_fingerprints: dict[str, tuple[dict[bytes, _Stamp], tuple[str, str]]] = {}


class ModelIdentity:
    """Facts that tell a model from others; every part is computed when it is first asked for.

    Args:
        model: as for `moerun.Model.load`.

    Attributes:
        directory: that holds the model.
        name: of that directory, for people.

    Raises:
        MissingFileError, FileError, FormatError, UnsupportedModelError: as `moerun.Model.load`,
            also from the properties.
    """

    def __init__(self, model: str | os.PathLike[str] | None) -> None:
        self.directory = resolve_model(model)
        self.name = name_of(self.directory)

    @cached_property
    def config_hash(self) -> str:
        """Of config.json: 64 hexadecimal digits."""
        return _json_hash(self.directory / "config.json")

    @cached_property
    def weights_hash(self) -> str:
        """Of all tensors: their names, types, shapes and samples of their bytes; 16 digits."""
        return _fingerprint(self.directory)[1]

    @cached_property
    def tokenizer_hash(self) -> str:
        """Of the files that say what a token id means: 64 digits, zeros where there are none."""
        return _tokenizer_hash(self.directory)

    @cached_property
    def template_hash(self) -> str:
        """Of the chat templates: 64 digits."""
        return _template_hash(self.directory)

    @cached_property
    def generation_hash(self) -> str:
        """Of generation_config.json: 64 digits."""
        return _json_hash(self.directory / "generation_config.json", is_optional=True)

    @cached_property
    def model_id(self) -> str:
        """16 digits for config and weights: two models that share them route alike."""
        return _digest(self.config_hash.encode(), self.weights_hash.encode())[:16]

    @cached_property
    def sizes_id(self) -> str:
        """16 digits for sizes and types: two models that share them take the same times."""
        facts = {name: self._config[name] for name in _SIZES}
        headers = _fingerprint(self.directory)[0]
        return _digest(json.dumps(facts, sort_keys=True).encode(), headers.encode())[:16]

    @property
    def all_parts(self) -> dict[str, str]:
        """Every part by name: two models that share all of them write the same texts."""
        return {
            "config": self.config_hash,
            "weights": self.weights_hash,
            "tokenizer": self.tokenizer_hash,
            "chat template": self.template_hash,
            "generation config": self.generation_hash,
        }

    @property
    def vocab_size(self) -> int:
        """Token ids are below."""
        return check_int("vocab_size", self._config["vocab_size"], 1)

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return int(self._config["num_moe_layers"])

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return int(self._config["num_experts"])

    @property
    def top_k(self) -> int:
        """Experts that a token uses in a layer."""
        return int(self._config["top_k"])

    @property
    def expected(self) -> dict[str, Any]:
        """Facts that the native module compares a predictor with."""
        names = ("model_id", "tokenizer_hash", "vocab_size", "num_experts", "top_k")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def _config(self) -> dict[str, Any]:
        return _moerun.model_config(os.fsencode(self.directory))


def model_id(path: str | os.PathLike[str] | None = None) -> str:
    """Return 16 hexadecimal digits that two models share if one's routing is the other's.

    They are made of config.json and of samples of all weights (`ModelIdentity.model_id`).

    Args:
        path: as for `moerun.Model.load`.

    Raises:
        MissingFileError, FileError, FormatError: as `moerun.Model.load`.
    """
    return ModelIdentity(path).model_id


def name_of(directory: Path) -> str:
    """Return the name of a directory as any file can hold it: U+FFFD for what is not UTF-8."""
    return os.fsencode(directory.name).decode("utf-8", "replace")


def parts_of_recording(files: Path | None, *, with_weights: bool = True) -> dict[str, str]:
    """Return the parts of an identity on which the routing of a text depends, by name.

    Other than for `ModelIdentity`, any model will do that transformers can load.

    Args:
        files: the model's directory, or a configuration file alone; None: no files are known.
        with_weights: False if they are not used.

    Raises:
        FileError, FormatError: a file cannot be read, or is damaged.
    """
    if files is None:
        return {}
    if files.is_file():
        return {"config": _json_hash(files)[:16]}
    parts = {"config": _json_hash(files / "config.json")[:16]}
    if with_weights:
        parts["weights"] = _weights_of_any(files)
    return parts | {"tokenizer": _tokenizer_hash(files)[:16]}


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


def _fingerprint(directory: Path) -> tuple[str, str]:
    """Return the hashes of all headers and of all weights; computed once while no file changes."""
    key = os.path.realpath(directory)
    if (known := _fingerprints.get(key)) is not None and known[0] == _stamps(known[0]):
        return known[1]
    headers, contents, files = _moerun.checkpoint_fingerprint(os.fsencode(directory))
    # These two decide which other files are read.
    entries = [os.fsencode(directory / f"model.safetensors{end}") for end in ("", ".index.json")]
    _fingerprints[key] = _stamps([*files, *entries]), (headers, contents)
    return headers, contents


def _stamps(files: Iterable[bytes]) -> dict[bytes, _Stamp]:
    return {file: _stamp(file) for file in files}


def _stamp(file: bytes) -> _Stamp:
    try:
        found = os.stat(file)
    except OSError:
        return None
    # The change time cannot be set: it differs also where someone restored the other one.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _weights_of_any(directory: Path) -> str:
    """Return a hash of the weights: of tensors, or else of files that only transformers reads."""
    try:
        return _fingerprint(directory)[1]
    except (MissingFileError, FormatError):
        files = sorted(file for file in directory.iterdir() if _WEIGHTS.fullmatch(file.name))
        return _digest(*map(_sampled, files))[:16]


def _sampled(path: Path) -> bytes:
    digest = hashlib.sha256(path.name.encode("utf-8", "surrogateescape"))
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        for place in range(_NUM_SAMPLES):
            start = max(0, size - _SAMPLE_BYTES) * place // (_NUM_SAMPLES - 1)
            sample = bytearray(min(_SAMPLE_BYTES, size))
            read_at(file, start, sample, str(path))
            digest.update(sample)
    return digest.digest()


def _tokenizer_hash(directory: Path) -> str:
    found = _contents(directory, _TOKENIZER)
    if "tokenizer.json" not in found:
        found |= _contents(directory, _VOCABULARIES)
    if not found:
        return _NO_TOKENIZER
    config = _without(_bytes_of(directory / "tokenizer_config.json"), _NO_FACTS | {_TEMPLATE_FIELD})
    named = (part for name, data in found.items() for part in (name.encode(), data))
    return _digest(config, *named)


def _template_hash(directory: Path) -> str:
    more = sorted(f"additional_chat_templates/{file.name}" for file in _templates(directory))
    found = _contents(directory, (*_TEMPLATES, *more))
    config = _only(_bytes_of(directory / "tokenizer_config.json"), _TEMPLATE_FIELD)
    named = (part for name, data in found.items() for part in (os.fsencode(name), data))
    return _digest(config, *named)


def _templates(directory: Path) -> list[Path]:
    try:
        return list((directory / "additional_chat_templates").glob("*.jinja"))
    except OSError as error:
        raise FileError(f"cannot read the folder {directory}: {error.strerror}") from error


def _json_hash(path: Path, *, is_optional: bool = False) -> str:
    data = _bytes_of(path) if is_optional else read_bounded(path, _MAX_FILE_BYTES)
    return _digest(_without(data, _NO_FACTS))


def _without(data: bytes, fields: frozenset[str]) -> bytes:
    return _parsed(data, lambda value: {k: v for k, v in value.items() if k not in fields})


def _only(data: bytes, field: str) -> bytes:
    return _parsed(data, lambda value: {field: value.get(field)})


def _parsed(data: bytes, choose: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """Return what was chosen of a JSON object, in one form; all of what is none."""
    try:
        value = json.loads(data)
        if isinstance(value, dict):
            return json.dumps(choose(value), sort_keys=True).encode()
    except (ValueError, RecursionError):
        pass
    return data


def _contents(directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    found = {name: _bytes_of(directory / name) for name in names}
    return {name: data for name, data in found.items() if data}


def _bytes_of(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_FILE_BYTES)
    except MissingFileError:
        return b""


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
