"""The token that stands between the documents of a recording, by one rule for both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moerun.errors import MoerunError
from moerun.tokenizer_files import TokenizerFiles


def separator_token(
    folder: Path | None,
    encode: Callable[[str], list[int]],
    model_ids: Iterable[Any],
    vocab_size: int,
) -> int | None:
    """Return the token between documents, None if nothing stands there.

    It is the `eos_token` of the tokenizer's files; without one, the model's own token that ends a
    text; without that, the tokenizer's `bos_token`. What a post-processor of the tokenizer would
    add to a text does not count. A token that the model has no row for is passed over. Where no
    tokenizer can be loaded, the model's own token counts alone: the data are token ids then.

    Args:
        folder: of the model, with the tokenizer's files; None if that is not known.
        encode: turns text into token ids, without special tokens.
        model_ids: the token that ends a text, as the model's configuration names it: ids, lists
            of ids or None, the first that fits counts.
        vocab_size: token ids of the model are below.

    Raises:
        FileError, FormatError: a file that names the tokenizer's tokens cannot be read.
    """
    own = _flat(model_ids)
    try:
        encode("x")
    except MoerunError:
        orders = [own]
    else:
        names = TokenizerFiles(folder).special_tokens.texts if folder is not None else {}
        orders = [
            _ids_of(names.get("eos_token"), encode),
            own,
            _ids_of(names.get("bos_token"), encode),
        ]
    for candidates in orders:
        for token in candidates:
            if type(token) is int and 0 <= token < vocab_size:
                return token
    return None


def _ids_of(text: str | None, encode: Callable[[str], list[int]]) -> list[int]:
    """Return the id of a special token; nothing if the tokenizer does not know it as one."""
    ids = encode(text) if text else []
    return ids if len(ids) == 1 else []


def _flat(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += value if isinstance(value, list | tuple) else [value]
    return found
