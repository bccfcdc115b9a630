"""Where the results of moe-run --batch go: a file that grows beside the one there is in the end."""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from moerun.errors import FileError, FormatError
from moerun.whole_file import replace_file
from moerun_tools.batch_file import BadLine, BatchLine
from moerun_tools.output_file import check_target
from moerun_tools.report import json_line

_FORMAT = "moerun-batch"
_FORMAT_VERSION = 1


@dataclass
class BatchOutput:
    """Results, one after the other in a partial file, and in order when all are there.

    A context manager from `open` on: the partial file is locked until its end.

    Attributes:
        path: the file that will be there in the end.
        run: fingerprint of what makes the results.
        seed: of the first line; None until one is known.
        done: results by the number of their line.
    """

    path: Path
    run: str
    seed: int | None
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    _file: IO[bytes] | None = None

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
        check_target(self.path, inputs)
        check_target(self.partial_path, inputs)
        if self.partial_path.exists() and self.partial_path.stat().st_size:
            if not (resume or overwrite):
                raise FileError(
                    f"{self.partial_path} holds results of a run that did not end; --resume goes "
                    "on with it, --overwrite begins anew"
                )
            self._read_partial(resume)
        elif self.path.exists() and not overwrite:
            hint = "; there is no run to go on with" if resume else ""
            raise FileError(f"{self.path} is there already{hint}; --overwrite replaces it")

    def open(self, resume: bool) -> None:
        """Begin, or with `resume` go on with what is there.

        Raises:
            FileError: it cannot be written, or another run writes it.
            FormatError: as `check`.
        """
        try:
            self._file = self.partial_path.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if resume and self._file.tell():
                self._file.truncate(self._read_partial(is_needed=True))
                return
            self._file.truncate(0)
            self.done = {}
        except BlockingIOError:
            raise FileError(f"another run is writing {self.partial_path}") from None
        except OSError as error:
            raise self._cannot_write(error) from error
        header = {"format": _FORMAT, "version": _FORMAT_VERSION, "run": self.run}
        self._write({**header, "seed": self.seed})

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, which has the number of its `line`."""
        self._write(result)
        self.done[result["line"]] = result

    def finish(self) -> None:
        """Write the file with all results, in the order of the lines."""
        ordered = (json_line(self.done[number]) for number in sorted(self.done))
        replace_file(self.path, "".join(ordered).encode())
        os.unlink(self.partial_path)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json_line(value).encode())
            self._file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> FileError:
        return FileError(f"cannot write {self.partial_path}: {error.strerror}")

    def _read_partial(self, is_needed: bool) -> int:
        """Take over what is there, and return its size; the last line may be half written.

        Args:
            is_needed: it has to be of the same run.
        """
        where = self.partial_path
        try:
            first, *lines = where.read_bytes().split(b"\n")
        except OSError as error:
            raise FileError(f"{where} cannot be read: {error.strerror}") from None
        header = _object(first)
        if header.get("format") != _FORMAT or header.get("version") != _FORMAT_VERSION:
            raise FormatError(f"{where} is not what moe-run --batch leaves; remove it")
        if not is_needed:
            return 0
        if header.get("run") != self.run:
            raise FormatError(
                f"{where} is of other prompts, another model or other options of generation; give "
                "the same ones to go on, or --overwrite to begin anew"
            )
        self.seed = header.get("seed") if self.seed is None else self.seed
        results = [_object(line) for line in lines[:-1]]
        self.done = {
            result["line"]: result for result in results if isinstance(result.get("line"), int)
        }
        return sum(len(line) + 1 for line in (first, *lines[:-1]))


def _object(line: bytes) -> dict[str, Any]:
    """Return the object of a line; an empty one for a line that is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def results_in_order(
    lines: deque[BatchLine | BadLine], done: dict[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield results as far as all before them are there, and take them out of `done`."""
    while lines and lines[0].number in done:
        yield done.pop(lines.popleft().number)
