"""Where the tokens of a recording come from: a name for each domain, and its documents."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moerun.errors import FileError, FormatError, MissingFileError
from moerun.recording.data_fingerprint import data_fingerprint
from moerun.recording.piece import Piece
from moerun.recording.readers import check_readable, read_pieces
from moerun.user_files import user_path

Warn = Callable[[str], None]

_NO_SOURCE_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


class DataSource(Protocol):
    """The documents of one domain."""

    @property
    def domain(self) -> str:
        """The label of its sequences."""

    def pieces(self, vocab_size: int) -> Iterator[Piece]:
        """Yield the documents, in pieces, from the beginning."""

    def fingerprint(self) -> str:
        """Return what changes when the data change."""


class FileData:
    """A domain whose documents are in files.

    Args:
        domain: its name.
        files: read in this order.
        root: names of files are told apart by their path from here.
        text_field: name of the text in JSON, CSV, TSV and parquet files.
        skip_bad: leave out files that are empty, cannot be read or hold no known data.
        warn: told about each file that is left out.
    """

    def __init__(
        self,
        domain: str,
        files: Sequence[Path],
        root: Path,
        *,
        text_field: str = "text",
        skip_bad: bool = False,
        warn: Warn | None = None,
    ) -> None:
        self.domain = domain
        self.files = list(files)
        self._root = root
        self._text_field = text_field
        self._skipping = _Skipping(skip_bad, warn)

    @classmethod
    def open(
        cls,
        domain: str,
        path: str | os.PathLike[str],
        *,
        seed: int = 0,
        text_field: str = "text",
        skip_bad: bool = False,
        warn: Warn | None = None,
    ) -> FileData:
        """Find the files of a domain: one, or all below a directory that are not hidden.

        Those of a directory are shuffled, so that few sequences are not all from its first files.
        All are looked at here, so that a bad one is known before hours of work.

        Raises:
            InvalidArgumentError: `path` is no path.
            MissingFileError: there is no such file or directory.
            FileError: a file cannot be read, or the directory holds none.
            FormatError: a file is empty, or of a format that is not read.
        """
        root = user_path(path, f"the path of the domain {domain!r}")
        if os.path.isdir(root):
            files = _files_below(root, _Skipping(skip_bad, warn))
            if not files:
                raise FileError(f"the directory {root} of the domain {domain!r} holds no files")
            random.Random(seed).shuffle(files)
        else:
            if not os.path.lexists(root):
                raise MissingFileError(f"there is no file or directory {root} (domain {domain!r})")
            files, root = [root], root.parent
        data = cls(domain, [], root, text_field=text_field, skip_bad=skip_bad, warn=warn)
        for file in files:
            with data._skipping:
                check_readable(file, text_field)
                data.files.append(file)
        if not data.files:
            raise FileError(f"no file of the domain {domain!r} can be used: {path}")
        return data

    def pieces(self, vocab_size: int) -> Iterator[Piece]:
        """Yield the documents, in pieces, from the beginning."""
        for file in self.files:
            is_open = False
            with self._skipping:
                for piece in read_pieces(file, self._text_field, vocab_size):
                    is_open = not piece.ends_document
                    yield piece
            if is_open:  # the rest of the file was skipped
                yield Piece("", True, str(file))

    def fingerprint(self) -> str:
        """Return a hash of the names and contents of the files; samples of large ones."""
        return data_fingerprint(self.files, self._root)


class _Skipping:
    """A block that a bad file ends, quietly if that is wanted."""

    def __init__(self, skip_bad: bool, warn: Warn | None) -> None:
        self._skip_bad = skip_bad
        self._warn = warn or (lambda message: None)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not self._skip_bad or not isinstance(error, FileError | FormatError):
            return False
        self._warn(f"skipped: {error}")
        return True


class TextData:
    """A domain whose documents are in memory."""

    def __init__(self, domain: str, texts: Iterable[str]) -> None:
        self.domain = domain
        self._texts = list(texts)

    def pieces(self, vocab_size: int) -> Iterator[Piece]:
        """Yield the documents, in pieces, from the beginning."""
        for index, text in enumerate(self._texts):
            yield Piece(text, True, f"text {index} of the domain {self.domain!r}")

    def fingerprint(self) -> str:
        """Return a hash of the texts."""
        digest = hashlib.sha256()
        for text in self._texts:
            digest.update(text.encode(errors="replace") + b"\0")
        return digest.hexdigest()[:32]


class RandomTokens:
    """A domain of token ids that are all equally likely."""

    domain = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def pieces(self, vocab_size: int) -> Iterator[Piece]:
        """Yield token ids without end."""
        generator = np.random.default_rng(self._seed)
        while True:
            ids = generator.integers(0, vocab_size, 4096, dtype=np.int32)
            yield Piece(ids, False, "random token ids")

    def fingerprint(self) -> str:
        """Return what the ids depend on."""
        return f"seed {self._seed}"


def default_data(seed: int = 0) -> list[DataSource]:
    """Return data that every Python installation has, for a first look without any other.

    The domain `python` is the sources of the standard library, `english` the texts of its manual
    that `help()` shows.

    Raises:
        MissingFileError: this Python has neither.
    """
    sources: list[DataSource] = []
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _files_below(root, _Skipping(True, None))
    files = [file for file in files if file.suffix == ".py" and _is_source(file, root)]
    if files:
        random.Random(seed).shuffle(files)
        sources.append(FileData("python", files, root, skip_bad=True))
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        if topics:
            sources.append(TextData("english", topics.values()))
    if not sources:
        raise MissingFileError(
            f"this Python has no library sources in {root} and no pydoc_data, so there is no text "
            "to begin with: name some with --data NAME=FILE_OR_DIR"
        )
    return sources


def _is_source(file: Path, root: Path) -> bool:
    folders = file.relative_to(root).parts[:-1]
    return not any(name in _NO_SOURCE_FOLDERS or name == "__pycache__" for name in folders)


def _files_below(root: Path, skipping: _Skipping) -> list[Path]:
    """Return the files below a folder that are not hidden, sorted by their path."""

    def fail(error: OSError) -> None:
        with skipping:
            raise FileError(f"the directory {error.filename} cannot be read: {error.strerror}")

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if _is_file(file))


def _is_file(file: Path) -> bool:
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return True  # a message names it when it is to be read
