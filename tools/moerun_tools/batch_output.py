"""Where the results of moe-run --batch go: a file that grows beside the one there is in the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from moerun.errors import FileError, FormatError, MissingFileError
from moerun.user_files import read_bounded
from moerun.whole_file import replace_file
from moerun_tools.batch_file import BadLine, BatchLine
from moerun_tools.output_file import check_target
from moerun_tools.report import json_line

_FORMAT = "moerun-batch"
_FORMAT_VERSION = 2  # 1 had one hash for all that a run depends on
# What every partial file of this version begins with.
_BEGINNING = f'{{"format": "{_FORMAT}", "version": {_FORMAT_VERSION}, '.encode()
_MAX_BYTES = 1 << 34
_MAX_SEED = 2**64 - 1


@dataclass
class BatchOutput:
    """Results, one after the other in a partial file, and in order when all are there.

    A context manager from `open` on: the partial file is locked until its end.

    Attributes:
        path: the file that will be there in the end.
        run: what makes the results, a fingerprint of each part by its name.
        seed: of the first line; None until one is known.
        numbers: of the lines that have results.
        done: results by the number of their line.
    """

    path: Path
    run: dict[str, str]
    seed: int | None
    numbers: frozenset[int]
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    _file: int | None = None
    _size: int = 0

    @property
    def partial_path(self) -> Path:
        """What holds the results until all are there."""
        return self.path.with_name(self.path.name + ".partial")

    def check(self, inputs: list[str], resume: bool, overwrite: bool) -> None:
        """Find out before the work whether results can be written, and may replace what is there.

        Args:
            inputs: files that must not be replaced.
            resume: results of another run are gone on with.
            overwrite: they are replaced.

        Raises:
            FileError: they cannot, or may not.
            FormatError: what is in the partial file is something else; or with `resume` results of
                other prompts, options or another model.
        """
        for each in (self.path, self.partial_path):
            _check_name(each)
            check_target(each, inputs)
        there = self._partial_bytes()
        self._check_replaced(there, resume, overwrite)
        if _has_begun(there):
            self._take_over(there, resume)

    def _check_replaced(self, there: bytes, resume: bool, overwrite: bool) -> None:
        if _has_begun(there):
            if not (resume or overwrite):
                raise FileError(
                    f"{self.partial_path} holds results of a run that did not end; --resume goes "
                    "on with it, --overwrite begins anew"
                )
        elif self.path.exists() and not overwrite:
            hint = "; there is no run to go on with" if resume else ""
            raise FileError(f"{self.path} is there already{hint}; --overwrite replaces it")

    def open(self, resume: bool, overwrite: bool = False) -> None:
        """Begin, or with `resume` go on with what is there.

        Raises:
            FileError: it cannot be written, another run writes it, or one has ended since `check`.
            FormatError: as `check`.
        """
        try:
            self._file = os.open(self.partial_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = self._partial_bytes()
            self._check_replaced(there, resume, overwrite)  # another run may have ended meanwhile
            goes_on = resume and _has_begun(there)
            self._size = self._take_over(there, is_needed=True) if goes_on else 0
            os.ftruncate(self._file, self._size)
        except BlockingIOError:
            raise FileError(f"another run is writing {self.partial_path}") from None
        except FileError:
            raise
        except OSError as error:
            raise self._cannot_write(error) from error
        if not goes_on:
            self.done = {}
            header = {"format": _FORMAT, "version": _FORMAT_VERSION, "run": self.run}
            self._write({**header, "seed": self.seed})

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, which has the number of its `line`."""
        self._write(result)
        self.done[result["line"]] = result

    def finish(self) -> None:
        """Write the file with all results, in the order of the lines."""
        ordered = (line_bytes(self.done[number]) for number in sorted(self.done))
        replace_file(self.path, b"".join(ordered))
        try:
            os.unlink(self.partial_path)
        except OSError as error:
            raise FileError(f"cannot remove {self.partial_path}: {error.strerror}") from error

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            handle, self._file = self._file, None
            os.close(handle)

    def _write(self, value: dict[str, Any]) -> None:
        """Append a line as a whole, or nothing of it."""
        assert self._file is not None
        data = line_bytes(value)
        try:
            write_at(self._file, data, self._size)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise self._cannot_write(error) from error
        self._size += len(data)

    def _cannot_write(self, error: OSError) -> FileError:
        return FileError(f"cannot write {self.partial_path}: {error.strerror}")

    def _partial_bytes(self) -> bytes:
        try:
            return read_bounded(self.partial_path, _MAX_BYTES)
        except MissingFileError:
            return b""

    def _take_over(self, there: bytes, is_needed: bool) -> int:
        """Take over results, and return their bytes; the last line may be half written.

        Args:
            there: what is in the partial file, which has begun.
            is_needed: it has to be of the same run.
        """
        where = self.partial_path
        first, *lines = there.split(b"\n")
        header = _object(first)
        if header.get("format") != _FORMAT:
            raise FormatError(f"{where} is not what moe-run --batch leaves; remove it")
        if not is_needed:
            return 0
        if header.get("version") != _FORMAT_VERSION:
            raise FormatError(f"{where} is of another version of moe-run; --overwrite begins anew")
        run, seed = header.get("run"), header.get("seed")
        if not isinstance(run, dict) or type(seed) is not int or not 0 <= seed <= _MAX_SEED:
            raise FormatError(f"{where} is damaged: its first line; --overwrite begins anew")
        if others := [name for name, value in self.run.items() if run.get(name) != value]:
            raise FormatError(
                f"{where} is of another run: with other {', '.join(others)}; give the same to go "
                "on, or --overwrite to begin anew"
            )
        self.seed = seed if self.seed is None else self.seed
        results = [_object(line) for line in lines[:-1]]
        self.done = {each["line"]: each for each in results if self._is_result(each)}
        return sum(len(line) + 1 for line in (first, *lines[:-1]))

    def _is_result(self, value: dict[str, Any]) -> bool:
        """Return whether it can be a line of this run; others are computed again."""
        number = value.get("line")
        has_text = any(isinstance(value.get(name), str) for name in ("text", "error"))
        return type(number) is int and number in self.numbers and has_text


def line_bytes(value: dict[str, Any]) -> bytes:
    """Return one JSON object as a line; half a surrogate pair, which UTF-8 cannot say, escaped."""
    return json_line(value).encode("utf-8", "backslashreplace")


def write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of `data`, however much of it the system takes at once.

    Raises:
        OSError: the system takes no more.
    """
    while data:
        count = os.pwrite(file, data, offset)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[count:], offset + count


def _check_name(path: Path) -> None:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from None


def _has_begun(there: bytes) -> bool:
    """Return whether a partial file has its first line, or is not one of ours.

    A disk that is full, or a power cut, can leave a part of that line or zeros.
    """
    if b"\n" in there:
        return True
    data = there.rstrip(b"\0")
    return not (_BEGINNING.startswith(data) or data.startswith(_BEGINNING))


def _object(line: bytes) -> dict[str, Any]:
    """Return the object of a line; an empty one for a line that is none."""
    try:
        value = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _no_number(name: str) -> Any:
    raise ValueError(name)


def results_in_order(
    lines: deque[BatchLine | BadLine], done: dict[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield results as far as all before them are there, and take them out of `done`."""
    while lines and lines[0].number in done:
        yield done.pop(lines.popleft().number)
