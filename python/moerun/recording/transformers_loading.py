"""Loads a Hugging Face model for recording: with its weights, or with random ones."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from moerun.errors import (
    FileError,
    FormatError,
    InvalidArgumentError,
    MissingFileError,
    MoerunError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from moerun.hub import check_repository, default_model
from moerun.recording.engine import no_tokenizer
from moerun.recording.host_memory import available_memory_bytes
from moerun.tokenizer import Tokenizer
from moerun.user_files import user_path

# How configs call the number of layers, those of encoder and decoder too.
_NUM_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(model: str | os.PathLike[str] | None) -> str:
    """Return what transformers loads: a directory, a configuration file, or a repository id.

    Raises:
        MissingFileError: there is no such file, and it is no repository id.
    """
    if model is None:
        return str(default_model())
    name = os.fspath(model)
    path = user_path(name)
    if path.exists():
        return str(path)
    if isinstance(model, str) and _REPO_ID.fullmatch(name):
        check_repository(name)  # transformers would ask for a misspelt name again and again
        return name
    raise MissingFileError(
        f"there is no directory or file {name}. A model is a directory with config.json, with "
        "--random-init also a configuration file alone, or a Hugging Face repository id"
    )


def local_files(source: str) -> Path | None:
    """Return where the files of a loaded model are, None if that cannot be told."""
    path = Path(source)
    if not path.exists():
        config = huggingface_hub.try_to_load_from_cache(source, "config.json")
        return Path(config).parent if isinstance(config, str) else None
    return path


def device_of(name: str) -> torch.device:
    """Return the device called "cpu", "cuda", or "auto" for the best one.

    Raises:
        InvalidArgumentError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("torch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def load_config(source: str, *, num_layers: int | None, trust_remote_code: bool) -> Any:
    """Return the model's configuration, with fewer layers if that is wanted.

    Raises:
        MissingFileError: there is none.
        FormatError: it cannot be understood.
        UnsupportedModelError: transformers does not know the model.
    """
    with _explaining(f"the configuration of {source}"):
        values = dict(transformers.PretrainedConfig.get_config_dict(source)[0])
        if not values:
            raise MissingFileError(f"{source} has no config.json")
        model_type = values.get("model_type")
        if trust_remote_code and "AutoConfig" in (values.get("auto_map") or {}):
            kind = type(transformers.AutoConfig.from_pretrained(source, trust_remote_code=True))
        elif isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
            kind = transformers.CONFIG_MAPPING[model_type]
        else:
            raise UnsupportedModelError(_unknown(source, model_type, values))
        config = kind.from_dict(values if num_layers is None else _with_layers(values, num_layers))
        path = Path(source)  # where code of the model is looked for
        config.name_or_path = str(path.parent) if path.is_file() else source
        return config


def _unknown(source: str, model_type: Any, values: dict[str, Any]) -> str:
    found = f"{source}: transformers {transformers.__version__} does not know the model type "
    found += repr(model_type)
    if values.get("auto_map"):
        return (
            f"{found}; the model brings its own code, which --trust-remote-code runs if the "
            "*.py files of the model are there"
        )
    return f"{found}; a newer transformers may know it"


def _with_layers(values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return a configuration with its first layers only."""
    reduced = dict(values)
    totals = {values[name] for name in _NUM_LAYERS if isinstance(values.get(name), int)}
    for name in _NUM_LAYERS:
        if isinstance(values.get(name), int):
            reduced[name] = min(num_layers, values[name])
    for name, value in values.items():
        if isinstance(value, list) and len(value) in totals:
            reduced[name] = value[:num_layers]
        elif isinstance(value, dict) and name.endswith("_config"):
            reduced[name] = _with_layers(value, num_layers)
    # Switch says how many layers have experts; every second one, say, is to stay so.
    for side, name in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        sparse = values.get(f"num_sparse_{side}_layers")
        total = values.get(name, values.get("num_layers"))
        if isinstance(sparse, int) and isinstance(total, int) and sparse > 0:
            step = max(1, total // sparse)
            reduced[f"num_sparse_{side}_layers"] = max(1, reduced.get(name, num_layers) // step)
    return reduced


def load_model(
    source: str,
    config: Any,
    *,
    random_init: bool,
    seed: int,
    dtype: str,
    device: torch.device,
    trust_remote_code: bool,
) -> nn.Module:
    """Return the model, ready to run.

    Raises:
        OutOfMemoryError: it does not fit in free memory.
        UnsupportedModelError: transformers has no language model for this configuration.
        FileError: its weights cannot be read.
    """
    kind = _auto_class(source, config, trust_remote_code)
    wanted = _DTYPES.get(dtype) or getattr(config, "dtype", None) or torch.float32
    with _explaining(f"the model {source}"):
        _check_memory(source, kind, config, wanted, device, trust_remote_code)
        if random_init:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = kind.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
        else:
            model = kind.from_pretrained(
                source, config=config, dtype=wanted, trust_remote_code=trust_remote_code
            )
        loaded: nn.Module = model.to(device).eval()
        return loaded


def _auto_class(source: str, config: Any, trust_remote_code: bool) -> Any:
    kinds: list[Any] = [
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForImageTextToText,
    ]
    if getattr(config, "is_encoder_decoder", False):
        kinds = kinds[1:]
    remote = getattr(config, "auto_map", None) or {}
    for kind in kinds:
        if type(config) in kind._model_mapping or (trust_remote_code and kind.__name__ in remote):
            return kind
    raise UnsupportedModelError(
        f"{source}: transformers {transformers.__version__} has no language model for the model "
        f"type {config.model_type!r}"
    )


def _check_memory(
    source: str, kind: Any, config: Any, dtype: Any, device: torch.device, trust: bool
) -> None:
    """Refuse what does not fit; the sizes come from a model without memory."""
    with torch.device("meta"):
        empty = kind.from_config(config, dtype=dtype, trust_remote_code=trust)
    needed = sum(t.numel() * t.element_size() for t in empty.state_dict().values())
    if device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory_bytes()
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{source} needs {needed / 2**30:.1f} GiB for its weights in {str(dtype)[6:]}, and "
            f"{free / 2**30:.1f} GiB are free; --random-init --layers N makes it smaller, and "
            "--engine native runs models that do not fit"
        )


@contextlib.contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turn the exceptions of transformers into ours, one sentence each."""
    try:
        yield
    except MoerunError:
        raise
    except MemoryError:
        raise OutOfMemoryError(f"not enough memory for {what}") from None
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"not enough memory for {what}: {_first_line(error)}") from error
    except OSError as error:
        raise FileError(f"{what} cannot be loaded: {_first_line(error)}") from error
    except ImportError as error:
        raise UnsupportedModelError(
            f"{what} needs a package or a version of transformers that is not here: "
            f"{_first_line(error)}"
        ) from error
    except Exception as error:  # wrong values of a config end in many ways, and in remote code
        raise FormatError(
            f"{what} cannot be used by transformers {transformers.__version__}: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class HubTokenizer:
    """The tokenizer of a model, loaded when it is first used.

    tokenizer.json is read as everywhere in moerun, anything else by transformers.
    """

    def __init__(self, source: str, trust_remote_code: bool) -> None:
        self._source = source
        self._trust_remote_code = trust_remote_code

    @property
    def folder(self) -> Path | None:
        """Where its files are, None if that cannot be told."""
        path = local_files(self._source)
        return path.parent if path is not None and path.is_file() else path

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` without special tokens.

        Raises:
            MissingFileError: the model has no tokenizer.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Any:
        path = Path(self._source)
        folder = path.parent if path.is_file() else path
        if (folder / "tokenizer.json").is_file():
            return Tokenizer(folder)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                str(folder) if path.exists() else self._source,
                trust_remote_code=self._trust_remote_code,
            )
        except Exception as error:  # of many classes
            raise MissingFileError(
                no_tokenizer(f"{self._source} has no tokenizer that can be loaded")
            ) from error
