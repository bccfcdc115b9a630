"""Packs the documents of a domain into sequences of tokens, all of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from moerun.errors import FormatError, InvalidArgumentError
from moerun.recording.data import DataSource

Encode = Callable[[str], list[int]]
Sequences = Iterator[NDArray[np.int32]]


def sequences_of(
    source: DataSource,
    encode: Encode,
    *,
    vocab_size: int,
    separator: int | None,
    length: int,
    samples: int,
) -> Sequences:
    """Return up to `samples` sequences of exactly `length` tokens, read as they are asked for.

    Documents stand one after the other, with a separator between them; what is left
    at the end is dropped. Rows of token ids that have this length are sequences as they are. The
    first sequence is made here and now.

    Args:
        source: the documents.
        encode: turns text into token ids, without special tokens.
        vocab_size: token ids must be below.
        separator: token between documents, None for none.
        length: tokens of a sequence.
        samples: most sequences.

    Raises:
        InvalidArgumentError: there is less than one sequence.
        FileError: a file cannot be read.
        FormatError: a file is empty or wrong, or a token id is outside the vocabulary.
    """
    packed = _pack(source, encode, vocab_size, separator, length)
    first = next(packed)  # raises when there is none
    return chain([first], islice(packed, samples - 1))


def _pack(
    source: DataSource, encode: Encode, vocab_size: int, separator: int | None, length: int
) -> Sequences:
    waiting: list[NDArray[np.int32]] = []
    num_waiting = 0
    has_sequence = False
    for tokens, is_row in _tokens(source, encode, vocab_size, separator, length):
        if is_row:
            has_sequence = True
            yield tokens
            continue
        waiting.append(tokens)
        num_waiting += len(tokens)
        if num_waiting < length:
            continue
        joined = np.concatenate(waiting)
        first = 0
        while num_waiting - first >= length:
            has_sequence = True
            yield joined[first : first + length].copy()
            first += length
        waiting, num_waiting = [joined[first:]], num_waiting - first
    if not has_sequence:
        raise InvalidArgumentError(
            f"the domain {source.domain!r} has only {num_waiting} tokens, less than one sequence "
            f"of {length}: give more text or lower --length"
        )


def _tokens(
    source: DataSource, encode: Encode, vocab_size: int, separator: int | None, length: int
) -> Iterator[tuple[NDArray[np.int32], bool]]:
    """Yield the tokens of all documents, piece by piece, and whether they are a sequence."""
    document_has_tokens = False
    for piece in source.pieces(vocab_size):
        if isinstance(piece.content, str):
            try:
                ids = np.array(encode(piece.content) if piece.content else [], np.int32)
            except (InvalidArgumentError, OverflowError) as error:
                raise FormatError(f"{piece.where}: {error}") from None
            if len(ids) != 0 and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise InvalidArgumentError(
                    f"the tokenizer gave the token id {ids.max()} for {piece.where}, but the model "
                    f"has only {vocab_size} tokens; is it the model's own tokenizer?"
                )
        else:
            ids = np.asarray(piece.content, np.int32)
            if piece.is_row and len(ids) == length:
                yield ids, True
                continue
        document_has_tokens = document_has_tokens or len(ids) != 0
        if len(ids) != 0:
            yield ids, False
        if piece.ends_document:
            if document_has_tokens and separator is not None:
                yield np.array([separator], np.int32), False
            document_has_tokens = False
