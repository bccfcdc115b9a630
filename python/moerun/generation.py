"""One running generation: an iterator of token ids that knows why it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerun import _moerun
    from moerun.detokenizer import Detokenizer


class StopStrings:
    """Watches text that grows for the first of several strings to be complete."""

    def __init__(self, strings: Sequence[str], detokenizer: Detokenizer) -> None:
        self._strings = list(strings)
        self._detokenizer = detokenizer
        self._num_kept = max(len(string) for string in strings) - 1
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Tell whether the text of `token_id` completes one of the strings."""
        text = self._tail + self._detokenizer.push(token_id)
        self._tail = text[-self._num_kept :] if self._num_kept else ""
        return any(string in text for string in self._strings)


class Generation(Iterator[int]):
    """Iterator of the tokens that a model generates; made by `Model.generate`.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        seed: what the random numbers of the sampler start from.
        finish_reason: None while it runs; then "eos" (the model ended the text), "stop" (a stop
            token or string), "length" (max_new_tokens) or "context" (the context is full).
    """

    def __init__(
        self,
        native: _moerun.Generation,
        *,
        seed: int,
        eos_token_ids: Sequence[int],
        stop_token_ids: Sequence[int],
        stop_strings: StopStrings | None,
        reason_at_limit: str,
        at_end: Callable[[], None],
    ) -> None:
        self.prompt_tokens = native.prompt_tokens
        self.seed = seed
        self.finish_reason: str | None = None
        self._native: _moerun.Generation | None = native
        self._reason_of_token = dict.fromkeys(eos_token_ids, "eos")
        self._reason_of_token.update(dict.fromkeys(stop_token_ids, "stop"))
        self._stop_strings = stop_strings
        self._reason_at_end = reason_at_limit
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
