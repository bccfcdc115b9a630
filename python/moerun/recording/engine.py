"""What a recording needs of a model, whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moerun.trace import SequenceRouting


@dataclass(frozen=True)
class Stack:
    """A run of layers whose routing becomes one trace.

    Attributes:
        name: "encoder" or "decoder", None for a model that has only one stack.
        num_experts: routed experts of a layer.
        top_k: experts that a token uses in a layer.
        moe_layers: numbers of the layers with experts, rising.
        expert_bytes: bytes of one routed expert, mean over layers.
    """

    name: str | None
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    expert_bytes: int


@dataclass(frozen=True)
class TraceOptions:
    """What is recorded of a sequence; the arguments of `moerun.Model.trace`."""

    generate: int = 0
    temperature: float = 0.0
    with_weights: bool = False
    with_logits: bool = False
    with_predictions: bool = True
    with_prefetch: bool = False


class Engine(Protocol):
    """Runs a model over sequences and says which experts their tokens used."""

    @property
    def name(self) -> str:
        """The engine: "native" or "transformers"."""

    @property
    def model_name(self) -> str:
        """What the traces call the model."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below."""

    @property
    def separator(self) -> int | None:
        """The token between two documents, None for none; see `separator_token`."""

    @property
    def stacks(self) -> Sequence[Stack]:
        """What `trace` records: one stack, or encoder and decoder."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """How the engine was set up, as far as routing depends on it; goes into the trace."""

    def check_length(self, tokens: int) -> None:
        """Refuse sequences that are longer than the model allows, before any is made.

        Raises:
            InvalidArgumentError: `tokens` are too many.
        """

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` without special tokens.

        Raises:
            MissingFileError: the model has no tokenizer.
        """

    def trace(
        self, token_ids: NDArray[np.int32], options: TraceOptions, seed: int
    ) -> list[SequenceRouting]:
        """Return the routing of one sequence, for each stack; `seed` is for sampling."""

    def notes(self) -> list[str]:
        """Return what a reader of the traces so far should know about them."""


def no_tokenizer(error: object) -> str:
    """Return what to do without a tokenizer, after why there is none."""
    return f"{error}. Without one, give token ids as --data NAME=FILE.npy, or use --random-tokens"
