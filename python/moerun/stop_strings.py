"""Ends a text where one of several strings is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
