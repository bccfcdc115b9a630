"""Keeps the sequences of a file that is not full yet safe on the disk.

The journal is a row of records, each of them: bytes of the rest (8), number of its first sequence
in the trace (8), SHA-256 of the rest (32), and the rest: a file of a trace with the sequences
since the record before. Numbers are little-endian. A record that was cut short, by a full disk or
a power cut, ends the journal. Sequences that have reached a full file since are passed over by
their numbers.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from moerun.errors import FileError, FormatError
from moerun.trace.header import TraceHeader
from moerun.trace.reader import TraceShard, open_part
from moerun.trace.shard_file import Labelled, sync_folder, write_sequences
from moerun.user_files import open_regular, read_at

_PREFIX = struct.Struct("<QQ32s")
_HASHED_BYTES = 2**20


class Journal:
    """Appends records to the journal of a recording.

    Args:
        path: the file; begun anew if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None

    def append(self, header: TraceHeader, first: int, sequences: Sequence[Labelled]) -> None:
        """Add a record and wait until it is on the disk.

        Args:
            header: of the trace.
            first: number of the first of `sequences` in the trace.
            sequences: at least one.

        Raises:
            FileError: it cannot be written.
        """
        memory = io.BytesIO()
        write_sequences(memory, header, sequences, "")
        rest = memory.getbuffer()
        prefix = _PREFIX.pack(len(rest), first, hashlib.sha256(rest).digest())
        size = None
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
                sync_folder(self.path.parent)
            size = os.fstat(self._file.fileno()).st_size
            _write(self._file, prefix)
            _write(self._file, rest)
            os.fsync(self._file.fileno())
        except OSError as error:
            if size is not None:  # half a record would hide those that may follow
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise FileError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def cut(self, size: int) -> None:
        """Remove what lies after the first `size` bytes.

        Raises:
            FileError: it cannot be written.
        """
        try:
            if self.path.exists() and self.path.stat().st_size > size:
                os.truncate(self.path, size)
        except OSError as error:
            raise FileError(f"{self.path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_journal(path: Path) -> Iterator[tuple[int, TraceShard, int]]:
    """Yield the records of a journal up to the first that is not whole.

    Yields:
        The number of the first sequence, the sequences, and where the record ends in the file.

    Raises:
        FileError: it cannot be read.
        FormatError: a whole record is no part of a trace.
    """
    where = str(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        begin = 0
        while begin + _PREFIX.size <= size:
            prefix = bytearray(_PREFIX.size)
            read_at(file, begin, prefix, where)
            length, first, digest = _PREFIX.unpack(prefix)
            begin += _PREFIX.size
            if length > size - begin or _digest(file, begin, length, where) != digest:
                return
            if first >= 2**62:
                raise FormatError(f"{where}: a record has the number {first}")
            yield first, open_part(file, path, begin, begin + length), begin + length
            begin += length


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view) != 0:
        count = file.write(view)
        if not count:
            raise OSError(errno.EIO, "the file system takes no more bytes")
        view = view[count:]


def _digest(file: BinaryIO, begin: int, length: int, where: str) -> bytes:
    digest = hashlib.sha256()
    for offset in range(begin, begin + length, _HASHED_BYTES):
        part = bytearray(min(_HASHED_BYTES, begin + length - offset))
        read_at(file, offset, part, where)
        digest.update(part)
    return digest.digest()
