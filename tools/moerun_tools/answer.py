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
        self._detokenizer = model.tokenizer.stream()

    def __iter__(self) -> Iterator[str]:
        for token_id in self._generation:
            self.token_ids.append(token_id)
            yield self._grow(self._detokenizer.push(token_id))
        yield self._grow(self._detokenizer.finish())

    def _grow(self, piece: str) -> str:
        self.text += piece
        return piece
