"""The part of a model that makes tokens of a prompt; known before the weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerun import Tokenizer, _moerun
from moerun.errors import FormatError, InvalidArgumentError
from moerun_tools.units import as_binary

# Texts this small are tokenised at once, whatever the context.
_ALWAYS_BYTES = 1 << 16


@dataclass(frozen=True)
class PromptModel:
    """What a prompt has to suit.

    Attributes:
        path: the directory of the model.
        tokenizer: of the model.
        config: what config.json says.
        context_length: most tokens of prompt and answer together.
    """

    path: Path
    tokenizer: Tokenizer
    config: dict[str, Any]
    context_length: int

    @classmethod
    def of(cls, directory: Path, context_length: int | None) -> PromptModel:
        """Read the configuration and the tokenizer of a model.

        Raises:
            MissingFileError: the model has no tokenizer.json, or no config.json.
            FileError, FormatError, UnsupportedModelError: as `Model.load`.
        """
        config = _moerun.model_config(os.fsencode(directory))
        length = config["max_position_embeddings"]
        if context_length is not None:
            length = min(length, context_length)
        return cls(directory, Tokenizer(directory), config, length)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a prompt that fits in the context.

        Raises:
            InvalidArgumentError: it has too many tokens, or none.
            FormatError: the tokenizer gives tokens that the model does not know.
        """
        size = len(text.encode())
        if size > _ALWAYS_BYTES:
            most = self.context_length * self.tokenizer.longest_token_bytes
            if size > most:
                raise InvalidArgumentError(
                    f"the prompt has {as_binary(size)} of text, and not even tokens of the largest "
                    f"size put more than {as_binary(most)} into a context of "
                    f"{self.context_length} tokens. Shorten it, or give a larger --context-length "
                    "if the model allows one"
                )
        token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidArgumentError("the prompt is empty: the tokenizer makes no tokens of it")
        vocab_size = self.config["vocab_size"]
        if (largest := max(token_ids)) >= vocab_size:
            raise FormatError(
                f"{self.path / 'tokenizer.json'} has {self.tokenizer.vocab_size} tokens, but "
                f"{self.path / 'config.json'} says vocab_size {vocab_size}: the prompt has token "
                f"{largest}, which the model does not know. The tokenizer is of another model, or "
                "tokens were added to it and the model was not resized"
            )
        if len(token_ids) >= self.context_length:
            raise InvalidArgumentError(
                f"the prompt has {len(token_ids)} tokens; to leave room to continue, it may have "
                f"at most {self.context_length - 1} in a context of {self.context_length}. "
                "Shorten it, or give a larger --context-length if the model allows one"
            )
        return token_ids
