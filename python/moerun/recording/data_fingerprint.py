"""Tells data files apart by what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from moerun.user_files import open_regular, read_at

_SAMPLE_BYTES = 64 * 2**10
_MOST_SAMPLES = 256  # of a file
_ALL_SAMPLES = 4096


def data_fingerprint(files: Sequence[Path], root: Path) -> str:
    """Return a short hash of names, sizes and contents; of large files, of samples of them.

    A copy of the data has the same hash, wherever and whenever it was made.

    Args:
        files: in their order.
        root: names are paths from here.

    Raises:
        FileError: a file cannot be read.
    """
    digest = hashlib.sha256()
    num_samples = max(2, min(_MOST_SAMPLES, _ALL_SAMPLES // max(1, len(files))))
    for file in files:
        with open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(os.fsencode(os.path.relpath(file, root)) + b"\0%d\0" % size)
            for offset, length in _samples(size, num_samples):
                part = bytearray(length)
                read_at(opened, offset, part, str(file))
                digest.update(part)
    return digest.hexdigest()[:32]


def _samples(size: int, count: int) -> Iterable[tuple[int, int]]:
    """Return offsets and lengths: all of a small file; begin, end and places between of others."""
    if size <= count * _SAMPLE_BYTES:
        return [(0, size)]
    last = size - _SAMPLE_BYTES
    return [(last * index // (count - 1), _SAMPLE_BYTES) for index in range(count)]
