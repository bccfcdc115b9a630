"""Text to token ids and back, with the tokenizer.json of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers

from moerun.chat import ChatTemplate
from moerun.detokenizer import Detokenizer
from moerun.errors import FormatError, InvalidArgumentError, MissingFileError


class Tokenizer:
    """The tokenizer of a model.

    Args:
        directory: the model's directory.

    Raises:
        MissingFileError: there is no tokenizer.json in the directory.
        FormatError: tokenizer.json cannot be understood.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise MissingFileError(
                f"{self.directory} has no tokenizer.json, so text cannot be turned into tokens. "
                "A model that only has another tokenizer file can be converted with transformers: "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own for this
            raise FormatError(f"{path} is not a tokenizer that can be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included; a model's table may be larger."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def longest_token_bytes(self) -> int:
        """Most bytes of text that one token stands for, or a little more."""
        return max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=1)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, None where it has none.

        Raises:
            FormatError: the template, or the file that holds it, cannot be understood.
        """
        return ChatTemplate.from_directory(self.directory)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        Args:
            text: any text; "" gives no tokens but those that the model always adds.
            add_special_tokens: also add what the model expects around every text, such as a
                token that begins it. Leave it out for text that a chat template made.
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"the text is not valid Unicode: character {error.start} is a lone surrogate"
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
            token_ids: ids; those outside the vocabulary have no text.
            skip_special_tokens: leave out tokens such as the one that ends a text.
        """
        ids = [int(token_id) for token_id in token_ids]
        if ids and min(ids) < 0:
            raise InvalidArgumentError(f"a token id is at least 0, not {min(ids)}")
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a `Detokenizer`, which gives the text of tokens one by one."""
        return Detokenizer(self._tokenizer, skip_special_tokens)

    def __repr__(self) -> str:
        return f"<moerun.Tokenizer {self.directory} vocab_size={self.vocab_size}>"
