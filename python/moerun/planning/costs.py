"""What a machine takes for the parts of a token: measured once for each machine and model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from moerun import _moerun
from moerun.arguments import check_int, check_number, check_rate, check_seconds, check_str, shown
from moerun.errors import FormatError, InvalidArgumentError
from moerun.user_files import read_text_bounded

_VERSION = 3  # 2 had a model_id that was made of the sizes of files
_MAX_FILE_BYTES = 16 << 20
_PIECE_BYTES = 2**20  # at most
_READS = {"checkpoint": 3, "record file": 1}  # of a segment, by store
_NUM_NEEDED = 6  # fields; the others have defaults
_NUM_FIRST = 8  # fields of version 1

_TEXTS = (
    "device",
    "model",
    "sizes_id",
    "machine",
    "store",
    "cpu_kernels",
    "moerun_version",
    "measured_at",
)


@dataclass(frozen=True)
class CostModel:
    """Times of a model on a machine, in seconds; L layers with experts.

    Attributes:
        attention_s: (L) a token, from the end of the last expert block to this layer's routing;
            layers without experts in between belong to it.
        moe_s: (L) a token's expert block with every expert resident.
        prompt_s: (L) attention and experts for each token of a prompt, every expert resident.
        head_s: a token, from the end of the last expert block to the next token's first layer.
        link_fixed_s: what moving any piece of a segment takes, however small.
        link_channels: pieces that are under way at once: their fixed times run beside each other,
            their bytes take turns.
        link_bytes_per_s: rate at which experts come from the slow tier.
        device: where this was measured: "cpu" or "cuda".
        model: of what, for people.
        slowdown: so much of its time longer takes what is computed while the link is busy, for
            reading and computing share cores and memory.
        wake_s: so much longer takes a layer that has to wait for segments, besides the waiting:
            threads that slept have to wake up.
        sizes_id: of what; models of the same sizes and types share it
            (`moerun.identity.ModelIdentity.sizes_id`).
        machine: on what; see `moerun.planning.machine_name`.
        store: where experts came from: "checkpoint" or "record file".
        threads: that computed; 0 is not known.
        cpu_kernels: that computed.
        context_tokens: tokens before the ones that were timed; 0 is not known.
        direct_io: whether reads bypassed the page cache; None is not known.
        link_error: how far the measured transfers are from the two numbers above, as a share of
            their time: the median; None is not known.
        link_error_worst: the same, of the worst one.
        moerun_version: that was measured.
        measured_at: the moment, as ISO 8601 has it.

    Made by hand, the first six do.

    Raises:
        InvalidArgumentError: a number is negative or above 10^6, the rate is below 1 or above
            10^18, or the lists differ in length or are empty.
    """

    attention_s: tuple[float, ...]
    moe_s: tuple[float, ...]
    prompt_s: tuple[float, ...]
    head_s: float
    link_fixed_s: float
    link_bytes_per_s: float
    device: str = ""
    model: str = ""
    slowdown: float = 0.0
    wake_s: float = 0.0
    sizes_id: str = ""
    machine: str = ""
    store: str = ""
    threads: int = 0
    cpu_kernels: str = ""
    context_tokens: int = 0
    direct_io: bool | None = None
    link_error: float | None = None
    link_error_worst: float | None = None
    link_channels: int = 1
    moerun_version: str = ""
    measured_at: str = ""

    def __post_init__(self) -> None:
        for name in ("attention_s", "moe_s", "prompt_s"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        for name in ("head_s", "link_fixed_s", "slowdown", "wake_s"):
            object.__setattr__(self, name, check_seconds(name, getattr(self, name)))
        rate = check_rate("link_bytes_per_s", self.link_bytes_per_s)
        object.__setattr__(self, "link_bytes_per_s", rate)
        for name in _TEXTS:
            check_str(name, getattr(self, name))
        check_int("threads", self.threads, 0)
        check_int("context_tokens", self.context_tokens, 0)
        check_int("link_channels", self.link_channels, 1, 1024)
        if self.direct_io not in (None, True, False):
            raise InvalidArgumentError(f"direct_io must be a bool, not {shown(self.direct_io)}")
        for name in ("link_error", "link_error_worst"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_seconds(name, getattr(self, name)))
        lengths = {len(self.attention_s), len(self.moe_s), len(self.prompt_s)}
        if len(lengths) != 1 or lengths == {0}:
            raise InvalidArgumentError(
                "attention_s, moe_s and prompt_s: expected a number for each layer with experts, "
                f"found {len(self.attention_s)}, {len(self.moe_s)} and {len(self.prompt_s)}"
            )

    @property
    def num_layers(self) -> int:
        """Layers with experts, L."""
        return len(self.moe_s)

    @property
    def resident_s(self) -> float:
        """Seconds of a token with every expert resident."""
        return self.head_s + sum(self.attention_s) + sum(self.moe_s)

    def link_of_segments(self, expert_bytes: int) -> tuple[float, float]:
        """Return what moving a segment takes, however small, and the rate besides.

        A segment is read in pieces: from a checkpoint in one or more for each of its three
        matrices, from a record file in one or more in all. Copied to a device, or where the store
        is not known, it is one piece.
        """
        reads = _READS.get(self.store, 0)
        if reads == 0 or self.device != "cpu":
            return self.link_fixed_s, self.link_bytes_per_s
        if expert_bytes <= reads * _PIECE_BYTES:
            return reads * self.link_fixed_s, self.link_bytes_per_s
        # Of large ones there are as many as bytes; the last of a read is half a piece on average.
        byte_s = 1 / self.link_bytes_per_s + self.link_fixed_s / _PIECE_BYTES
        return reads * self.link_fixed_s / 2, 1 / byte_s

    def to_json(self) -> str:
        """Return it as text that `from_json` reads."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "cost model") -> CostModel:
        """Return what `to_json` gave.

        Args:
            text: JSON.
            where: what errors call it, such as the name of the file.

        Raises:
            FormatError: it is not JSON, of another version, lacks a field, has one that is not
                known, or holds a number out of its range.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where} is not JSON: {error}") from None
        version = value.pop("version", None) if isinstance(value, dict) else None
        if isinstance(version, bool) or version not in (1, 2, _VERSION):
            raise FormatError(
                f"{where}: expected a cost model of version 1 to {_VERSION}, found "
                f"{'none' if version is None else shown(version)}"
            )
        if version == 2:
            value.pop("model_id", None)
        known = [field.name for field in fields(cls)][: _NUM_FIRST if version == 1 else None]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise FormatError(
                f"{where}: {unknown[0]!r} is no field of a cost model; they are {', '.join(known)}"
            )
        missing = sorted(set(known[:_NUM_NEEDED]) - set(value))
        if missing:
            raise FormatError(f"{where}: a cost model needs the field {missing[0]!r}")
        try:
            return cls(**value)
        except InvalidArgumentError as error:
            raise FormatError(f"{where}: {error}") from None


def read_costs(path: str | os.PathLike[str]) -> CostModel:
    """Read a file that holds what `CostModel.to_json` gave.

    Raises:
        MissingFileError, FileError: it is not there, no regular file, or cannot be read.
        FormatError: it is no text, too large, or as for `CostModel.from_json`.
    """
    return CostModel.from_json(read_text_bounded(path, _MAX_FILE_BYTES), str(path))


def fit_transfer(
    samples: Iterable[tuple[float, float] | tuple[float, float, float]],
) -> tuple[float, float]:
    """Return the line through measured transfers, (fixed seconds, bytes a second).

    The line seconds = pieces * fixed + bytes / rate with the least sum of squared relative errors,
    fixed not below 0. Give medians: one interrupted transfer pulls the line.

    Args:
        samples: bytes, seconds and, if there are more than one, in how many pieces they were moved;
            pieces of at least two sizes.

    Raises:
        InvalidArgumentError: fewer sizes, a number that is not above 0, or more bytes do not take
            longer.
    """
    checked = []
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or len(sample) not in (2, 3):
            raise InvalidArgumentError(
                "samples: expected bytes, seconds and, if it is not 1, the number of pieces, found "
                f"{shown(sample)}"
            )
        names = ("bytes", "seconds", "pieces")
        numbers = [
            check_number(f"{name} of a sample", number, 0, above_minimum=True)
            for name, number in zip(names, sample, strict=False)
        ]
        checked.append((numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 1.0))
    return _moerun.fit_transfer(checked)


def _seconds(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidArgumentError(f"{name} must be a sequence of seconds, not {shown(values)}")
    return tuple(check_seconds(f"{name}[{i}]", value) for i, value in enumerate(values))
