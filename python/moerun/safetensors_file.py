"""Safetensors files read by positions and written the same way every time.

The safetensors package maps files into memory, where a file that becomes shorter kills the
process, and writes metadata in an order that differs from run to run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moerun.errors import FormatError, InvalidArgumentError, OutOfMemoryError
from moerun.user_files import read_at

MAX_HEADER_BYTES = 32 * 2**20
_LENGTH_BYTES = 8
_BITS = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "BF16": 16, "C64": 64}
# Dtypes that numpy has, as both call them.
NUMPY_DTYPES = {
    **{f"U{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
_BITS |= {name: int(name[1:]) for name in NUMPY_DTYPES}
_NAMES = {np.dtype(code): name for name, code in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor is in a file.

    Attributes:
        dtype: as safetensors names it.
        shape: sizes of its axes.
        offset: first byte, from the beginning of the file.
        num_bytes: bytes of the whole tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file, checked against the size of the file.

    Attributes:
        metadata: texts by name.
        tensors: places by name, in the order in which they are stored.
        digest: SHA-256 of the header.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorPlace]
    digest: str


def read_header(
    file: BinaryIO, where: str, *, begin: int = 0, end: int | None = None
) -> SafetensorsHeader:
    """Read and check the header of an open file.

    Args:
        file: opened by `open_regular`.
        where: how a message names it.
        begin: offset of a safetensors file within the file.
        end: offset of its end; None for the end of the file.

    Raises:
        FormatError: it is no safetensors file, or its header does not fit the file.
        FileError: it cannot be read.
    """

    def wrong(reason: str) -> FormatError:
        return FormatError(f"{where} is not a safetensors file: {reason}")

    text = _header_text(file, where, begin, end)
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is not JSON: {str(error)[:80]}") from None
    if not isinstance(values, dict):
        raise wrong("its header is not a JSON object")
    metadata = values.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise wrong("its metadata are not texts by name")
    first = begin + _LENGTH_BYTES + len(text)
    data_bytes = (_size(file) if end is None else end) - first
    places: list[tuple[int, str, TensorPlace]] = []
    for name, entry in values.items():
        place = _place_of(entry, first)
        if place is None:
            raise wrong(f"the entry of the tensor {name[:60]!r} is not valid")
        places.append((place.offset - first, name, place))
    # Of tensors that begin at one place, all but the last are empty.
    places.sort(key=lambda item: (item[0], item[2].num_bytes))
    next_byte = 0
    for offset, name, place in places:
        if offset != next_byte:
            raise wrong(
                f"the tensor {name[:60]!r} begins at byte {offset} of the data, expected "
                f"{next_byte}"
            )
        next_byte += place.num_bytes
    if next_byte != data_bytes:
        raise wrong(f"its header describes {next_byte} bytes of data, the file has {data_bytes}")
    return SafetensorsHeader(
        metadata, {name: place for _, name, place in places}, hashlib.sha256(text).hexdigest()
    )


def header_digest(file: BinaryIO, where: str, begin: int = 0) -> str:
    """Return the `digest` that `read_header` gives, of a header that may have changed since.

    Args:
        file: opened by `open_regular`.
        where: how a message names it.
        begin: offset of the safetensors file within the file.

    Raises:
        FormatError: it is no safetensors file any more.
        FileError: it cannot be read.
    """
    return hashlib.sha256(_header_text(file, where, begin, None)).hexdigest()


def read_tensor(file: BinaryIO, place: TensorPlace, where: str) -> NDArray[Any]:
    """Return a tensor, read into memory of its own.

    Raises:
        InvalidArgumentError: numpy has no such dtype.
        OutOfMemoryError: there is not enough memory for it.
        FileError: the file cannot be read, or became shorter.
    """
    if place.dtype not in NUMPY_DTYPES:
        raise InvalidArgumentError(f"{where}: numpy has no dtype for a tensor of {place.dtype}")
    try:
        array: NDArray[Any] = np.empty(place.shape, NUMPY_DTYPES[place.dtype])
    except MemoryError:
        raise OutOfMemoryError(
            f"{where}: not enough memory for a tensor of {place.num_bytes} bytes"
        ) from None
    if place.num_bytes != 0:
        read_at(file, place.offset, array.reshape(-1).view(np.uint8), where)
    return array


def data_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of what `write_tensors` stores after the header."""
    digest = hashlib.sha256()
    for _, array in _stored(tensors):
        digest.update(_bytes_of(array))
    return digest.hexdigest()


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> str:
    """Write a safetensors file: the same bytes for the same tensors and metadata.

    Args:
        file: open for writing, at the position where it is to begin.
        tensors: arrays by name; names and metadata in any order.
        metadata: texts by name.

    Returns:
        The digest of the header.

    Raises:
        FormatError: there is more metadata than a reader takes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name, array in _stored(tensors):
        end = begin + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            f"the metadata take {len(text)} bytes, a file may have {MAX_HEADER_BYTES}"
        )
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for _, array in _stored(tensors):
        file.write(_bytes_of(array))
    return hashlib.sha256(text).hexdigest()


def _stored(tensors: Mapping[str, NDArray[Any]]) -> Iterable[tuple[str, NDArray[Any]]]:
    """Yield tensors in their order in a file: large items first, so that all are aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        array = tensors[name]
        yield name, np.ascontiguousarray(array, array.dtype.newbyteorder("<"))


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _header_text(file: BinaryIO, where: str, begin: int, end: int | None) -> bytes:
    room = (_size(file) if end is None else end) - begin - _LENGTH_BYTES
    if room < 2:
        raise FormatError(f"{where} is not a safetensors file: it has {room + 8} bytes")
    length = bytearray(_LENGTH_BYTES)
    read_at(file, begin, length, where)
    size = int.from_bytes(length, "little")
    if size > min(room, MAX_HEADER_BYTES):
        raise FormatError(
            f"{where} is not a safetensors file: its header would have {size} bytes, expected at "
            f"most {min(room, MAX_HEADER_BYTES)}"
        )
    text = bytearray(size)
    read_at(file, begin + _LENGTH_BYTES, text, where)
    if not text.startswith(b"{"):
        raise FormatError(f"{where} is not a safetensors file: its header is not a JSON object")
    return bytes(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice")
    return values


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _place_of(entry: Any, first: int) -> TensorPlace | None:
    """Return the place that an entry of a header describes, None if it describes none."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return None
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or len(sizes) > 64 or not all(map(_is_size, sizes)):
            return None
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return None
    num_bytes = math.prod(shape) * _BITS[dtype] // 8
    if num_bytes != offsets[1] - offsets[0]:
        return None
    return TensorPlace(dtype, tuple(shape), first + offsets[0], num_bytes)
