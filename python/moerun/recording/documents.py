"""The token that stands between the documents of a recording, by one rule for both engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moerun.errors import MissingFileError
from moerun.json_text import read_json_object


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
    except MissingFileError:
        orders = [own]
    else:
        names = _special_tokens(folder) if folder is not None else {}
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


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of `eos_token` and `bos_token` that the tokenizer's files name.

    As in transformers, special_tokens_map.json counts only beside a tokenizer_config.json without
    `added_tokens_decoder`, and first then.
    """
    found: dict[str, str] = {}
    config = _read_object(folder / "tokenizer_config.json")
    files = [config]
    if config.get("added_tokens_decoder") is None:
        files.append(_read_object(folder / "special_tokens_map.json"))
    for values in files:
        for key in ("eos_token", "bos_token"):
            value = values.get(key)
            if isinstance(value, dict):  # as transformers writes tokens with their properties
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def _read_object(file: Path) -> dict[str, Any]:
    if not os.path.lexists(file):
        return {}
    try:
        return read_json_object(file)
    except MissingFileError:  # a link to nothing
        return {}
