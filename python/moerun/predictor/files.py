"""The file of a predictor: what its metadata say, and how it is written.

The native module reads the weights; `read_info` reads what people and evaluations want to know.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import FormatError, MissingFileError
from moerun.predictor.shape import NetShape
from moerun.safetensors_file import read_header, read_tensor
from moerun.user_files import open_regular, user_path
from moerun.whole_file import replace_file

FORMAT = "moerun-predictor"
VERSION = "1"


@dataclass(frozen=True, eq=False)
class PredictorInfo:
    """What a predictor's file says about it.

    Attributes:
        model: name of the model whose routing it predicts.
        model_id: from `moerun.planning.model_id`.
        tokenizer_hash: `moerun.identity.ModelIdentity.tokenizer_hash`.
        vocab_size: token ids go from 0 to below this.
        moe_layers: numbers of the L layers with experts.
        num_experts: of a layer, E.
        top_k: experts that a token uses in a layer.
        shape: sizes of the net.
        training: how it was trained: seed, tokens, domains, losses, recall and so on.
        trained_sequences: sorted hashes of the sequences that it was trained on.
    """

    model: str
    model_id: str
    tokenizer_hash: str
    vocab_size: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    shape: NetShape
    training: dict[str, Any]
    trained_sequences: NDArray[np.int64]

    @property
    def num_outputs(self) -> int:
        """Probabilities for a token: L times E."""
        return len(self.moe_layers) * self.num_experts

    @property
    def num_parameters(self) -> int:
        """Weights of the net."""
        return self.shape.num_parameters(self.vocab_size, self.num_outputs)

    def as_metadata(self) -> dict[str, str]:
        """Return the metadata of its file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "model_id": self.model_id,
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": str(self.vocab_size),
            "moe_layers": json.dumps(list(self.moe_layers)),
            "num_experts": str(self.num_experts),
            "top_k": str(self.top_k),
            **{each.name: str(getattr(self.shape, each.name)) for each in fields(NetShape)},
            "training": json.dumps(self.training, sort_keys=True),
        }


def read_info(path: str | os.PathLike[str]) -> PredictorInfo:
    """Read what a predictor's file says about it, but no weights.

    Raises:
        MissingFileError, FileError: it cannot be read.
        FormatError: it is no predictor, one of another version, or says something wrong.
    """
    file = user_path(path, "the path of a predictor")
    try:
        with open_regular(file) as opened:
            header = read_header(opened, str(file))
            metadata = header.metadata
            if metadata.get("format") != FORMAT:
                raise FormatError(
                    f"{file} is a safetensors file but not a predictor: expected the metadata "
                    f"format = '{FORMAT}', found {_shown(metadata.get('format'))}. "
                    "moe-predictor train writes predictors"
                )
            place = header.tensors.get("trained_sequences")
            if place is None or place.dtype != "I64" or len(place.shape) != 1:
                raise FormatError(
                    f"{file}: expected a tensor trained_sequences, I64 of one dimension"
                )
            trained = read_tensor(opened, place, str(file))
    except MissingFileError:
        raise MissingFileError(
            f"there is no file {file}; moe-predictor train writes predictors"
        ) from None
    return _parsed(metadata, np.sort(trained), file)


def _parsed(metadata: Mapping[str, str], trained: NDArray[np.int64], file: Path) -> PredictorInfo:
    def wrong(key: str, expected: str) -> FormatError:
        return FormatError(
            f"{file}: metadata {key}: expected {expected}, found {_shown(metadata.get(key))}"
        )

    def number(key: str, most: int) -> int:
        text = metadata.get(key, "")
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
            raise wrong(key, f"a number from 1 to {most}")
        return int(text)

    def loaded(key: str) -> Any:
        try:
            return json.loads(metadata.get(key, ""))
        except (ValueError, RecursionError):
            return None

    if metadata.get("version") != VERSION:
        raise wrong("version", f"'{VERSION}' (a newer moerun may read others)")
    layers = loaded("moe_layers")
    if (
        not isinstance(layers, list)
        or not 0 < len(layers) <= 1024
        or any(type(layer) is not int or layer < 0 for layer in layers)
        or layers != sorted(set(layers))
    ):
        raise wrong("moe_layers", "a JSON list of rising layer numbers")
    training = loaded("training")
    if not isinstance(training, dict):
        raise wrong("training", "a JSON object")
    try:
        shape = NetShape(**{each.name: number(each.name, 2**20) for each in fields(NetShape)})
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{file}: metadata: {error}") from None
    num_experts = number("num_experts", 65535)
    return PredictorInfo(
        model=metadata.get("model", "unknown"),
        model_id=metadata.get("model_id", ""),
        tokenizer_hash=metadata.get("tokenizer_hash", ""),
        vocab_size=number("vocab_size", 2**24),
        moe_layers=tuple(layers),
        num_experts=num_experts,
        top_k=number("top_k", num_experts),
        shape=shape,
        training=training,
        trained_sequences=trained,
    )


def write_predictor(
    path: str | os.PathLike[str], info: PredictorInfo, weights: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write a predictor under a temporary name, then give it its own: the same bytes for the same
    weights.

    Args:
        path: the file; one that is there is replaced.
        info: its metadata.
        weights: float32, with the names and shapes of `info.shape.tensors`; matrices are rounded.

    Raises:
        FileError: it cannot be written.
    """
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, shape in info.shape.tensors(info.vocab_size, info.num_outputs).items():
        values = np.ascontiguousarray(weights[name], np.float32)
        assert values.shape == shape, (name, values.shape, shape)
        tensors[name] = ("BF16", bf16_bits(values)) if len(shape) == 2 else ("F32", values)
    tensors["trained_sequences"] = ("I64", np.sort(info.trained_sequences))
    # The library writes metadata in an order that differs from run to run.
    header: dict[str, Any] = {"__metadata__": info.as_metadata()}
    begin = 0
    for name, (dtype, array) in tensors.items():
        end = begin + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    replace_file(user_path(path), len(text).to_bytes(8, "little") + text + data)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return float32 numbers rounded to bf16, ties to even."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def bf16_rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what a file gives back of a matrix."""
    rounded: NDArray[np.float32] = (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)
    return rounded


def sequence_hash(token_ids: NDArray[np.int32]) -> int:
    """Return what tells a sequence of tokens from others, as a signed number of 64 bits."""
    digest = hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return repr(value if len(value) <= 60 else value[:57] + "...")
