"""Text from tokens as they come, without ever showing half a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerun.tokenizer_backend import TokenizerBackend

# Tokens to the left that decide the text of a token: one, and three bytes of a character before.
_MOST_BEFORE = 4
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Map each character of byte-level BPE to its byte.

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + idx): byte for idx, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL = _byte_level_alphabet()


class Detokenizer:
    """Turns tokens into text one by one; the cost of a token does not depend on those before.

    The texts of all `push` calls and of `finish`, joined, are what `Tokenizer.decode` gives for
    all tokens at once. The only exception is a tokenizer with byte fallback (SentencePiece): where
    a run of byte tokens is not valid UTF-8, `decode` replaces the whole run, while here the valid
    characters of the run, which were already shown, stay.

    Args:
        backend: of the tokenizer.
        skip_special_tokens: leave out tokens such as the one that ends a text.
        after: ids of the tokens to the left, whose text is not given again.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        skip_special_tokens: bool = True,
        after: Sequence[int] = (),
    ) -> None:
        steps = backend.decoder_steps()
        kinds = {step["type"] for step in steps}
        self._backend = backend
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_fallback = "ByteFallback" in kinds
        self._skipped = {
            token_id
            for token_id, token in backend.library.get_added_tokens_decoder().items()
            if skip_special_tokens and token.special
        }
        strips = [step for step in steps if step["type"] == "Strip"]
        self._stripped = strips[0]["content"] if strips else ""
        self._num_to_strip = strips[0]["start"] if strips else 0  # characters that begin a text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._previous: list[int] = []  # at most one token: the left neighbour of the next
        for token_id in self._last_with_text(after):
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while it ends inside a character.

        Raises:
            FormatError: tokenizer.json does not work for this token.
        """
        token = self._token_of(token_id)
        if token is None:
            return ""
        piece = self._bytes_of(token)
        if piece is not None:
            text = self._without_first_spaces(self._utf8.decode(piece))
        else:
            text = self.finish() + self._text_after_previous(token_id)
            self._num_to_strip = 0
        self._previous = [token_id]
        return text

    def finish(self) -> str:
        """Return what is held back: U+FFFD if the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _token_of(self, token_id: int) -> str | None:
        if token_id in self._skipped or not 0 <= token_id < 2**32:
            return None
        return self._backend.library.id_to_token(token_id)

    def _last_with_text(self, token_ids: Sequence[int]) -> list[int]:
        found: list[int] = []
        for token_id in reversed(token_ids):
            if self._token_of(token_id) is not None:
                found.append(token_id)
                if len(found) == _MOST_BEFORE:
                    break
        return found[::-1]

    def _bytes_of(self, token: str) -> bytes | None:
        if self._is_byte_level:
            if all(character in _BYTE_LEVEL for character in token):
                return bytes(_BYTE_LEVEL[character] for character in token)
            return token.encode()
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None

    def _without_first_spaces(self, text: str) -> str:
        while text and self._num_to_strip:
            if not text.startswith(self._stripped):
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text

    def _text_after_previous(self, token_id: int) -> str:
        """Decode a token beside its left neighbour: alone, many decoders drop a leading space."""
        before = self._backend.decode(self._previous, skip_special_tokens=False)
        both = self._backend.decode([*self._previous, token_id], skip_special_tokens=False)
        return both[len(before) :]
