"""One running generation: an iterator of token ids that knows why it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerun import _moerun
    from moerun.generation_request import GenerationRequest


class Generation(Iterator[int]):
    """Iterator of the tokens that a model generates; made by `Model.generate`.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        sampling: temperature, top_k, top_p, min_p and repetition_penalty that are used.
        seed: what the random numbers of the sampler start from.
        finish_reason: None while it runs; then "eos" (the model ended the text), "stop" (a stop
            token or string), "length" (max_new_tokens) or "context" (the context is full).
    """

    def __init__(
        self, native: _moerun.Generation, request: GenerationRequest, *, at_end: Callable[[], None]
    ) -> None:
        self.prompt_tokens = native.prompt_tokens
        self.sampling = request.sampling
        self.seed = request.seed
        self.finish_reason: str | None = None
        self._native: _moerun.Generation | None = native
        self._reason_of_token = request.reason_of_token
        self._stop_strings = request.stop_strings
        self._reason_at_end = request.reason_at_limit
        self._at_end: Callable[[], None] | None = at_end

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> int:
        if self._native is None:
            at_end, self._at_end = self._at_end, None
            if at_end is not None:  # not before: the last token has been handed out
                at_end()
            raise StopIteration
        try:
            token_id = next(self._native)
        except StopIteration:
            self._finish(self._reason_at_end)
            return next(self)
        reason = self._reason_of_token.get(token_id)
        if reason is not None:
            self._reason_at_end = reason
        elif self._stop_strings is not None and self._stop_strings.push(token_id):
            self._finish("stop")
        return token_id

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._native = None
