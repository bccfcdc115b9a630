"""What a model writes after a prompt, as tokens and as text that grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moerun import Model


class Answer:
    """Iterator of pieces of text; keeps the tokens and the text so far, also when interrupted."""

    def __init__(self, model: Model, prompt_token_ids: Sequence[int], **options: Any) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self._generation = model.generate(prompt_token_ids, **options)
        self._prompt_token_ids = prompt_token_ids
        self._tokenizer = model.tokenizer
        self._detokenizer = model.tokenizer.stream(after=prompt_token_ids)

    def __iter__(self) -> Iterator[str]:
        for token_id in self._generation:
            self.token_ids.append(token_id)
            yield self._grow(self._detokenizer.push(token_id))
        yield self._grow(self._detokenizer.finish())

    @property
    def message(self) -> str:
        """The answer as a chat template wants it: with special tokens, but not the last one.

        Markers such as those around a reasoning may be special tokens, and templates look for
        them. They write the token that ends a turn themselves.
        """
        is_ended = self._generation.finish_reason == "eos"
        token_ids = self.token_ids[:-1] if is_ended else self.token_ids
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=False, after=self._prompt_token_ids
        )

    def _grow(self, piece: str) -> str:
        self.text += piece
        return piece
