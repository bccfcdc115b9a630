"""Changes single weights of a model directory in place."""

import json
import struct
from pathlib import Path

import numpy as np

# How a number that is none looks in each type.
_BITS = {
    "F32": {"nan": b"\x00\x00\xc0\x7f", "inf": b"\x00\x00\x80\x7f"},
    "BF16": {"nan": b"\xc0\x7f", "inf": b"\x80\x7f"},
    "F16": {"nan": b"\x00\x7e", "inf": b"\x00\x7c"},
}


def header_of(file: Path) -> tuple[dict, int]:
    """The tensors of a safetensors file, and where their data begins."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        tensors = json.loads(opened.read(length))
    tensors.pop("__metadata__", None)
    return tensors, 8 + length


def tensors_of(directory: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors."""
    return {
        name: info["shape"]
        for file in sorted(Path(directory).glob("*.safetensors"))
        for name, info in header_of(file)[0].items()
    }


class Damage:
    """Puts one element of a tensor to "nan" or "inf", and its old bytes back afterwards."""

    def __init__(self, directory: Path, tensor: str, element: int, kind: str) -> None:
        for file in Path(directory).glob("*.safetensors"):
            tensors, begin = header_of(file)
            if tensor in tensors:
                break
        else:
            raise KeyError(tensor)
        info = tensors[tensor]
        assert not file.is_symlink(), "the file of another model would change"
        self._file = file
        self._bytes = _BITS[info["dtype"]][kind]
        assert element < np.prod(info["shape"])
        self._offset = begin + info["data_offsets"][0] + element * len(self._bytes)

    def _swap(self, new: bytes) -> bytes:
        with self._file.open("r+b") as opened:
            opened.seek(self._offset)
            old = opened.read(len(new))
            opened.seek(self._offset)
            opened.write(new)
        return old

    def __enter__(self) -> None:
        self._old = self._swap(self._bytes)

    def __exit__(self, *_: object) -> None:
        self._swap(self._old)
