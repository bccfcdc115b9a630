"""Records with moerun's own runtime."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import InvalidArgumentError, MissingFileError
from moerun.identity import parts_of_recording
from moerun.model import Model
from moerun.recording.documents import separator_token
from moerun.recording.engine import Stack, TraceOptions, no_tokenizer
from moerun.tokenizer import Tokenizer
from moerun.trace import SequenceRouting


class NativeEngine:
    """A loaded `moerun.Model`; the experts that it uses do not depend on budget or threads.

    Args:
        model: the model; with `cache_events`, they are recorded too while it decodes.
        model_name: what the traces call it.
    """

    name = "native"

    def __init__(self, model: Model, model_name: str) -> None:
        self.model_name = model_name
        self._model = model
        config = model.config
        self.vocab_size: int = config["vocab_size"]
        num_experts = int(config["num_experts"])
        layers = tuple(model.moe_layers)
        total_bytes = int(model.stats()["cache"]["total_expert_bytes"])
        self.stacks = [
            Stack(
                name=None,
                num_experts=num_experts,
                top_k=int(config["top_k"]),
                moe_layers=layers,
                expert_bytes=total_bytes // (num_experts * len(layers)),
            )
        ]
        self.settings: dict[str, Any] = {
            "device": model.device,
            "model": parts_of_recording(model.path),
        }
        if model._logs_events:  # experts do not depend on the cache, its events do
            self.settings["cache"] = _cache_settings(model)

    def check_length(self, tokens: int) -> None:
        """Refuse sequences that are longer than the model was loaded for."""
        if tokens > self._model.context_length:
            raise InvalidArgumentError(
                f"a sequence of {tokens} tokens is longer than {self.model_name} was loaded for: "
                f"context_length is {self._model.context_length}"
            )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def trace(
        self, token_ids: NDArray[np.int32], options: TraceOptions, seed: int
    ) -> list[SequenceRouting]:
        """Return the routing of one sequence, as the only element of a list."""
        routing = self._model.trace(
            token_ids,
            generate=options.generate,
            temperature=options.temperature,
            seed=seed,
            with_weights=options.with_weights,
            with_logits=options.with_logits,
            with_predictions=options.with_predictions,
            with_prefetch=options.with_prefetch,
        )
        return [routing]

    def notes(self) -> list[str]:
        """Return nothing: what this engine records is what the model used."""
        return []

    @cached_property
    def separator(self) -> int | None:
        """The token between two documents, None for none; see `separator_token`."""
        model_ids = list(self._model.config["eos_token_ids"])
        return separator_token(self._model.path, self.encode, model_ids, self.vocab_size)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            return self._model.tokenizer
        except MissingFileError as error:
            raise MissingFileError(no_tokenizer(error)) from None


def _cache_settings(model: Model) -> dict[str, Any]:
    """Return what the cache was set up with: a budget or a plan shows in slots and split."""
    cache = model.stats()["cache"]
    return {
        "budget_bytes": cache["budget_bytes"],
        "policy": cache["policy"],
        "prefetch": cache["prefetch"],
        "slots": [layer["slots"] for layer in cache["layers"]],
        "split": [layer["split"] for layer in cache["layers"]],
    }
