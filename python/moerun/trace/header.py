"""What the metadata of a trace file says, checked; and the names of a trace's files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerun.errors import FileError, FormatError, MissingFileError

FORMAT = "moerun-trace"
VERSION = "1"
MAX_EXPERTS = 65535
SUFFIX = ".safetensors"

_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OWN_KEYS = {"format", "version", "model", "num_experts", "top_k", "moe_layers", "domains"}
_CHAIN_KEYS = {"contents", "previous", "shard_bytes"}


@dataclass(frozen=True)
class TraceHeader:
    """The metadata of one trace file.

    Attributes:
        model: name of the model.
        num_experts: routed experts of a layer.
        top_k: experts that a token uses in a layer.
        moe_layers: numbers of the layers with experts, rising.
        domains: a label for each sequence of this file.
        extra: all other metadata.
        contents: SHA-256 of the tensors; "" if the recorder left it out.
        previous: SHA-256 of the header of the file before; "" in the first file. It ties the
            files of a set together: those of another recording do not fit.
        shard_bytes: size at which the recorder begins a new file, 0 if it is unknown.
    """

    model: str
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    domains: tuple[str, ...]
    extra: dict[str, str]
    contents: str = ""
    previous: str = ""
    shard_bytes: int = 0

    def as_metadata(self) -> dict[str, str]:
        """Return the metadata of a file with this header."""
        chain = {
            "contents": self.contents,
            "previous": self.previous,
            "shard_bytes": str(self.shard_bytes or ""),
        }
        return {
            **self.extra,
            **{key: value for key, value in chain.items() if value},
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "num_experts": str(self.num_experts),
            "top_k": str(self.top_k),
            "moe_layers": json.dumps(list(self.moe_layers)),
            "domains": json.dumps(list(self.domains)),
        }

    @classmethod
    def parse(cls, metadata: Mapping[str, str] | None, file: Path) -> TraceHeader:
        """Return the header that `metadata` of `file` describes.

        Raises:
            FormatError: it is not a trace, one of another version, or says something wrong.
        """
        metadata = metadata or {}
        if metadata.get("format") != FORMAT:
            raise FormatError(
                f"{file} is a safetensors file but not a trace: expected the metadata format = "
                f"'{FORMAT}', found {_found(metadata.get('format'))}. moe-trace record writes "
                "traces; moe-trace import converts router dumps"
            )
        if metadata.get("version") != VERSION:
            raise FormatError(
                f"{file}: expected trace version '{VERSION}', found "
                f"{_found(metadata.get('version'))}; a newer moerun may be able to read it"
            )
        num_experts = _number(metadata, "num_experts", 1, MAX_EXPERTS, file)
        top_k = _number(metadata, "top_k", 1, num_experts, file)
        layers = _json_list(metadata, "moe_layers", int, file)
        if not layers or any(a >= b for a, b in zip([-1, *layers], layers, strict=False)):
            raise FormatError(
                f"{file}: metadata moe_layers: expected rising layer numbers, found "
                f"{_found(metadata['moe_layers'])}"
            )
        return cls(
            model=metadata.get("model", "unknown"),
            num_experts=num_experts,
            top_k=top_k,
            moe_layers=tuple(layers),
            domains=tuple(_json_list(metadata, "domains", str, file)),
            extra={
                key: value
                for key, value in metadata.items()
                if key not in _OWN_KEYS and key not in _CHAIN_KEYS
            },
            contents=_digest(metadata, "contents", file),
            previous=_digest(metadata, "previous", file),
            shard_bytes=_number(metadata, "shard_bytes", 1, 10**18, file)
            if "shard_bytes" in metadata
            else 0,
        )


def shard_path(path: Path, index: int, count: int) -> Path:
    """Return the name of shard `index` (from 1) of `count` of the trace `path`."""
    if count == 1:
        return path
    return path.with_name(f"{stem_of(path)}-{index:05d}-of-{count:05d}{SUFFIX}")


def stem_of(path: Path) -> str:
    """Return the name of a trace without its ending."""
    return path.name.removesuffix(SUFFIX)


def _is_there(path: Path) -> bool:
    return os.path.lexists(path) and not os.path.isdir(path)


def partial_folder(path: Path) -> Path:
    """Return where the shards of a trace are while it is being recorded."""
    return path.with_name(path.name + ".partial")


def shards_on_disk(path: Path) -> list[Path]:
    """Return the files of the trace `path` that exist: itself, or its shards in order."""
    if _is_there(path):
        return [path]
    stem = stem_of(path)
    if not os.path.isdir(path.parent):
        return []
    try:
        names = [(file, _SHARD_NAME.fullmatch(file.name)) for file in path.parent.iterdir()]
    except OSError as error:
        raise FileError(f"{path.parent} cannot be read: {error.strerror}") from error
    return sorted(file for file, match in names if match and match[1] == stem)


def find_files(path: Path) -> list[Path]:
    """Return the files of a trace, given as a file, a shard, the name of a set, or a folder.

    Raises:
        MissingFileError: there is no trace, or a shard of it is missing.
        FileError: there are several.
    """
    if os.path.isdir(path):
        return _files_in(path)
    match = _SHARD_NAME.fullmatch(path.name)
    base = path.with_name(match[1] + SUFFIX) if match else path
    if not match and _is_there(path):
        return [path]  # what is no regular file is named when it is opened
    shards = [file for file in shards_on_disk(base) if file != base]
    if not shards:
        if os.path.isdir(partial_folder(base)):
            raise MissingFileError(
                f"{base} is an unfinished recording: finish it with moe-trace record --resume"
            )
        raise MissingFileError(f"there is no trace {path}")
    counts = {_shard_numbers(file)[1] for file in shards}
    if len(counts) != 1:
        raise FileError(
            f"{base}: found shards of several sets, of {_list(sorted(counts))} files; remove those "
            "that do not belong together"
        )
    count = counts.pop()
    there = {_shard_numbers(file)[0] for file in shards}
    missing = [index for index in range(1, count + 1) if index not in there]
    if missing or len(there) != count:
        hint = ""
        if os.path.isdir(partial_folder(base)):
            hint = "; an unfinished recording is there: finish it with moe-trace record --resume"
        raise MissingFileError(
            f"{base}: expected {count} shards, missing "
            f"{_list([shard_path(base, index, count).name for index in missing[:5]])}{hint}"
        )
    return shards


def _files_in(folder: Path) -> list[Path]:
    bases: set[Path] = set()
    for file in folder.glob("*" + SUFFIX):
        match = _SHARD_NAME.fullmatch(file.name)
        bases.add(file.with_name(match[1] + SUFFIX) if match else file)
    if not bases:
        raise MissingFileError(f"{folder} holds no trace: no *{SUFFIX} file is in it")
    if len(bases) > 1:
        names = sorted(base.name for base in bases)
        raise FileError(f"{folder} holds several traces, name one of them: {_list(names[:8])}")
    base = bases.pop()
    return find_files(base)


def _shard_numbers(file: Path) -> tuple[int, int]:
    match = _SHARD_NAME.fullmatch(file.name)
    assert match is not None
    return int(match[2]), int(match[3])


def _list(items: Sequence[Any]) -> str:
    return ", ".join(str(item) for item in items)


def _found(value: str | None) -> str:
    if value is None:
        return "none"
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _number(metadata: Mapping[str, str], key: str, least: int, most: int, file: Path) -> int:
    text = metadata.get(key)
    if text is None or not re.fullmatch(r"[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise FormatError(
            f"{file}: metadata {key}: expected a number from {least} to {most}, found "
            f"{_found(text)}"
        )
    return int(text)


def _digest(metadata: Mapping[str, str], key: str, file: Path) -> str:
    text = metadata.get(key, "")
    if text and not _DIGEST.fullmatch(text):
        raise FormatError(
            f"{file}: metadata {key}: expected 64 hexadecimal digits, found {_found(text)}"
        )
    return text


def _is_plain(item: Any, kind: type) -> bool:
    # JSON can hold half a character, which no file and no terminal can.
    if type(item) is str and any("\ud800" <= char <= "\udfff" for char in item):
        return False
    return type(item) is kind


def _json_list(metadata: Mapping[str, str], key: str, kind: type, file: Path) -> list[Any]:
    text = metadata.get(key)
    try:
        value = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or any(not _is_plain(item, kind) for item in value):
        name = {int: "numbers", str: "texts"}[kind]
        raise FormatError(
            f"{file}: metadata {key}: expected a JSON list of {name}, found {_found(text)}"
        )
    return value
