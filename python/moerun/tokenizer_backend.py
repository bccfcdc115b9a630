"""The tokenizers library with the tokens of all files, and without its panics."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken

from moerun.errors import FormatError
from moerun.guarded_calls import guarded, guarded_closely
from moerun.tokenizer_checks import check_costs, is_steady, steps_of
from moerun.tokenizer_class import rebuilt
from moerun.tokenizer_files import Token, TokenizerFiles, str_of

_Value = TypeVar("_Value")
_LOADING_SECONDS = 60.0
_SECONDS = 10.0
_SECONDS_PER_CHARACTER = 1e-4


class TokenizerBackend:
    """Ids of texts and texts of ids, as transformers has them for the same files.

    Args:
        files: of the tokenizer; tokenizer.json is there.

    Raises:
        FormatError: a file is wrong, or two contradict each other; the message names them.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._where = str(files.path)
        check_costs(files.state, self._where)
        self._is_steady = is_steady(files.state)
        self.library: tokenizers.Tokenizer = guarded_closely(
            lambda: _build(files), self._where, _LOADING_SECONDS
        )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`.

        Raises:
            FormatError: the tokenizer does not work.
        """

        def ids() -> list[int]:
            return self.library.encode(text, add_special_tokens=add_special_tokens).ids

        return self._guarded(ids, len(text))

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`, each of which is at least 0 and below 2**32.

        Raises:
            FormatError: the tokenizer does not work.
        """

        def text() -> str:
            return self.library.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return self._guarded(text, len(token_ids))

    def decoder_steps(self) -> list[dict[str, Any]]:
        """Return the steps of the decoder, as tokenizer.json has them."""
        if self.library.decoder is None:
            return []
        return steps_of({"decoder": json.loads(self.library.decoder.__getstate__())}, "decoder")

    def _guarded(self, call: Callable[[], _Value], size: int) -> _Value:
        if self._is_steady:
            return guarded(call, self._where)
        return guarded_closely(call, self._where, _SECONDS + size * _SECONDS_PER_CHARACTER)


def _build(files: TokenizerFiles) -> tokenizers.Tokenizer:
    where = str(files.path)
    if files.kind.build is not None:
        library = rebuilt(files.kind, files.state, files.config, where)
    elif files.state.get("truncation") is None and files.state.get("padding") is None:
        library = tokenizers.Tokenizer.from_str(files.text or "")
    else:
        # Transformers switches both off for a plain text.
        plain = {**files.state, "truncation": None, "padding": None}
        library = tokenizers.Tokenizer.from_str(json.dumps(plain))
    library.encode_special_tokens = bool(files.config.get("split_special_tokens", False))
    _add_tokens(library, files)
    _check_ids(library, files)
    return library


def _add_tokens(library: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Add the tokens that only the other files have, in the order of transformers."""
    special = files.special_tokens
    new: list[Token] = [token for _, token in sorted(special.added.items())]
    texts = {token.content for token in library.get_added_tokens_decoder().values()}
    texts |= {str_of(token) for token in new}
    for token in [*special.named.values(), *special.extra]:
        # A text and an object are not equal: of one token with two sets of flags, the later decide.
        if str_of(token) not in texts and token not in new:
            new.append(token)
    named = set(special.texts.values())
    adding = []
    for token in new:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif not token.special and token.content in named:
            token.special = True
        adding.append(token)
    if adding:
        library.add_tokens(adding)
    if files.kind.adds_again:
        all_texts = dict.fromkeys([*special.texts.values(), *map(str_of, special.extra)])
        library.add_tokens([AddedToken(text, special=True) for text in all_texts])


def _check_ids(library: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Refuse ids that the files give and the library does not: the model would read others."""
    special = files.special_tokens
    for number, token in special.added.items():
        there = library.token_to_id(token.content)
        if token.content and there != number:
            path = special.file_of[number]
            other = "its vocabulary" if path == files.path else f"the vocabulary of {files.path}"
            raise FormatError(
                f"{path} gives the token {token.content!r} the id {number}, but {other} has "
                f"{there} for it; one of them is of another model"
            )


def type_of_model(files: TokenizerFiles) -> Any:
    """Return the type of the model in tokenizer.json, such as "BPE"; None where it has none."""
    model = files.state.get("model")
    return model.get("type") if isinstance(model, dict) else None
