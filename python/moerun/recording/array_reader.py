"""Reads token ids from .npy files, by positions and in bounded pieces."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from moerun.errors import FormatError, MoerunError
from moerun.recording.piece import Piece
from moerun.user_files import read_at

_PIECE_TOKENS = 2**20  # rows up to this length can be sequences
_COLUMN_MAJOR_BYTES = 256 * 2**20


def read_npy(file: BinaryIO, where: str, vocab_size: int) -> Iterator[Piece]:
    """Yield token ids: one dimension is a stream, of two each row is a document.

    Args:
        file: opened by `open_regular`.
        where: how a message names it.
        vocab_size: token ids must be below.

    Raises:
        FileError: the file cannot be read, or became shorter.
        FormatError: it is no array of token ids.
    """
    dtype, shape, is_column_major = _header(file, where)
    if len(shape) not in (1, 2) or not np.issubdtype(dtype, np.integer):
        raise FormatError(
            f"{where}: expected integer token ids of one or two dimensions, found {dtype} of "
            f"shape {shape}"
        )
    begin = file.tell()
    count = math.prod(shape)
    room = os.fstat(file.fileno()).st_size - begin
    if min(shape) < 0 or count * dtype.itemsize > room:
        raise FormatError(
            f"{where} is not a .npy file that can be read: its header describes {dtype} of shape "
            f"{shape}, the file has {room} bytes for it"
        )
    if count == 0:
        raise FormatError(f"{where} is empty: its shape is {shape}")
    rows, length = (1, shape[0]) if len(shape) == 1 else shape
    turned = None
    if len(shape) == 2 and is_column_major:
        turned = _column_major(file, begin, dtype, shape, where)
    at_once = max(1, _PIECE_TOKENS // length)
    for first in range(0, rows, at_once):
        together = min(at_once, rows - first)
        for offset in range(0, length, _PIECE_TOKENS):
            width = min(_PIECE_TOKENS, length - offset)
            if turned is not None:
                block = turned[first : first + together, offset : offset + width]
            else:
                block = np.empty((together, width), dtype)
                place = begin + (first * length + offset) * dtype.itemsize
                read_at(file, place, block.view(np.uint8), where)
            for row, tokens in enumerate(block, start=first):
                _check(tokens, vocab_size, offset, None if len(shape) == 1 else row, where)
                yield Piece(
                    tokens.astype(np.int32),
                    offset + width == length,
                    where,
                    len(shape) == 2 and width == length,
                )


def _header(file: BinaryIO, where: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Return dtype, shape and whether columns are contiguous; the file is at the data then."""
    try:
        version = npy_format.read_magic(file)
        if version == (1, 0):
            shape, is_column_major, dtype = npy_format.read_array_header_1_0(file)
        elif version in ((2, 0), (3, 0)):  # 3.0 differs in names of fields only
            shape, is_column_major, dtype = npy_format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version[0]}.{version[1]} is not known")
    except (MoerunError, OSError):
        raise
    except Exception as error:  # a wrong header ends in many ways
        raise FormatError(f"{where} is not a .npy file that can be read: {error}") from None
    if dtype.hasobject:
        raise FormatError(f"{where} is not a .npy file that can be read: it holds Python objects")
    return dtype, shape, is_column_major


def _column_major(
    file: BinaryIO, begin: int, dtype: np.dtype[Any], shape: tuple[int, ...], where: str
) -> NDArray[Any]:
    size = math.prod(shape) * dtype.itemsize
    if size > _COLUMN_MAJOR_BYTES:
        raise FormatError(
            f"{where}: its {size} bytes are stored column by column, so no row lies together; save "
            "numpy.ascontiguousarray(ids) instead"
        )
    block = np.empty(shape[::-1], dtype)
    read_at(file, begin, block.view(np.uint8), where)
    return block.T


def _check(tokens: NDArray[Any], vocab_size: int, offset: int, row: int | None, where: str) -> None:
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(outside) != 0:
        at = offset + int(outside[0])
        index = f"{at}" if row is None else f"{row}, {at}"
        raise FormatError(
            f"{where}: token id {tokens[outside[0]]} at [{index}] is outside the vocabulary: "
            f"ids go from 0 to {vocab_size - 1}"
        )
