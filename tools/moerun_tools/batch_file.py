"""The files of moe-run --batch: prompts, one a line, and what became of each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.whole_file import replace_file
from moerun_tools.report import json_line

# What a line may say of its own text, in place of the command line.
GENERATION_FIELDS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
)
_FORMAT = "moerun-batch"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class BatchLine:
    """One prompt.

    Attributes:
        number: of its line in the file, from 1.
        prompt: the text.
        id: what the line calls itself; None: nothing.
        generation: those of GENERATION_FIELDS that the line has.
    """

    number: int
    prompt: str
    id: Any
    generation: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that is no prompt, and why."""

    number: int
    error: str


@dataclass
class BatchInput:
    """The lines of a file of prompts.

    Attributes:
        lines: in their order; lines without text are passed over.
        ignored: names of fields that mean nothing here.
        fingerprint: of the bytes.
    """

    lines: list[BatchLine | BadLine]
    ignored: list[str]
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> BatchInput:
        """Read a file of JSON lines, each a text or an object with a text `prompt`.

        Raises:
            MissingFileError: there is no such file.
            FileError: it cannot be read.
            InvalidArgumentError: it has no line.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MissingFileError(f"the batch file {path} does not exist") from None
        except OSError as error:
            raise FileError(f"the batch file {path} cannot be read: {error.strerror}") from None
        lines: list[BatchLine | BadLine] = []
        ignored: dict[str, None] = {}
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                lines.append(_parse(number, line, ignored))
            except FormatError as error:
                lines.append(BadLine(number, str(error)))
        if not lines:
            raise InvalidArgumentError(
                f"the batch file {path} is empty; it needs a line for each prompt, such as "
                '{"prompt": "import os"}'
            )
        return cls(lines, list(ignored), hashlib.sha256(data).hexdigest())


def _parse(number: int, line: bytes, ignored: dict[str, None]) -> BatchLine:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8: byte 0x{line[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise FormatError(
            "expected a text, or an object with a text `prompt`, found "
            f"{'null' if value is None else type(value).__name__}"
        )
    prompt = value.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        found = "none" if "prompt" not in value else json.dumps(prompt)[:40]
        raise FormatError(f"`prompt`: expected a text that is not empty, found {found}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise FormatError("`prompt` is not valid Unicode: it has a lone surrogate") from None
    known = ("prompt", "id", *GENERATION_FIELDS)
    ignored.update(dict.fromkeys(name for name in value if name not in known))
    generation = {name: value[name] for name in GENERATION_FIELDS if name in value}
    return BatchLine(number, prompt, value.get("id"), generation)


@dataclass
class BatchOutput:
    """Where the results go: one after the other beside the file, and in order when all are there.

    Attributes:
        path: the file that will be there in the end.
        done: results by the number of their line.
    """

    path: Path
    fingerprint: str
    done: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def partial_path(self) -> Path:
        """What holds the results until all are there."""
        return self.path.with_name(self.path.name + ".partial")

    def check(self, resume: bool, overwrite: bool) -> None:
        """Find out whether results that are there may be replaced, or gone on with.

        Raises:
            FileError: they may not; or they cannot be read.
            FormatError: with `resume`, they are of other prompts, options or another model.
        """
        has_partial = self.partial_path.exists()
        if has_partial and not (resume or overwrite):
            raise FileError(
                f"{self.partial_path} holds results of a run that did not end; --resume goes on "
                "with it, --overwrite begins anew"
            )
        if self.path.exists() and not overwrite and not (resume and has_partial):
            raise FileError(f"{self.path} is there already; --overwrite replaces it")
        if resume and has_partial:
            self._read_partial()

    def open(self, resume: bool) -> None:
        """Begin; with `resume`, with what `check` has found.

        Raises:
            FileError: nothing can be written there.
        """
        if not resume:
            self.done = {}
        header = {"format": _FORMAT, "version": _FORMAT_VERSION, "run": self.fingerprint}
        lines = [json_line(header), *(json_line(result) for result in self.done.values())]
        replace_file(self.partial_path, "".join(lines).encode())

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, which has the number of its `line`."""
        try:
            with self.partial_path.open("ab") as file:
                file.write(json_line(result).encode())
        except OSError as error:
            raise FileError(f"cannot write {self.partial_path}: {error.strerror}") from error
        self.done[result["line"]] = result

    def finish(self) -> None:
        """Write the file with all results, in the order of the lines."""
        ordered = (json_line(self.done[number]) for number in sorted(self.done))
        replace_file(self.path, "".join(ordered).encode())
        os.unlink(self.partial_path)

    def _read_partial(self) -> None:
        where = self.partial_path
        try:
            complete, _, _ = where.read_bytes().rpartition(b"\n")  # the last may be half written
        except OSError as error:
            raise FileError(f"{where} cannot be read: {error.strerror}") from None
        try:
            header, *results = [json.loads(line) for line in complete.split(b"\n")]
            is_ours = header["format"] == _FORMAT and header["version"] == _FORMAT_VERSION
            self.done = {int(result["line"]): result for result in results}
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise FormatError(f"{where} is not what moe-run --batch leaves; remove it")
        if header["run"] != self.fingerprint:
            raise FormatError(
                f"{where} is of other prompts, another model or other options of generation; give "
                "the same ones to go on, or --overwrite to begin anew"
            )


def results_in_order(
    lines: list[BatchLine | BadLine], done: dict[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield results as far as all before them are there, and take them out of `done`."""
    while lines and lines[0].number in done:
        yield done.pop(lines.pop(0).number)
