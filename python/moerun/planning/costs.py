"""What a machine takes for the parts of a token: measured once for each machine and model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from moerun import _moerun
from moerun.arguments import check_number, check_str, shown
from moerun.errors import FormatError, InvalidArgumentError

_VERSION = 1


@dataclass(frozen=True)
class CostModel:
    """Times of a model on a machine, in seconds; L layers with experts.

    Attributes:
        attention_s: (L) a token, from the end of the last expert block to this layer's routing;
            layers without experts in between belong to it.
        moe_s: (L) a token's expert block with every expert resident.
        prompt_s: (L) attention and experts for each token of a prompt, every expert resident.
        head_s: a token, from the end of the last expert block to the next token's first layer.
        link_fixed_s: what moving any segment takes, however small.
        link_bytes_per_s: rate at which experts come from the slow tier.
        device: where this was measured, for people.
        model: of what, for people.

    Raises:
        InvalidArgumentError: a number is negative or not finite, the rate is 0, or the lists
            differ in length or are empty.
    """

    attention_s: tuple[float, ...]
    moe_s: tuple[float, ...]
    prompt_s: tuple[float, ...]
    head_s: float
    link_fixed_s: float
    link_bytes_per_s: float
    device: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("attention_s", "moe_s", "prompt_s"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        for name in ("head_s", "link_fixed_s"):
            object.__setattr__(self, name, check_number(name, getattr(self, name), 0))
        rate = check_number("link_bytes_per_s", self.link_bytes_per_s, 0, above_minimum=True)
        object.__setattr__(self, "link_bytes_per_s", rate)
        check_str("device", self.device)
        check_str("model", self.model)
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
        if not isinstance(value, dict) or value.pop("version", None) != _VERSION:
            raise FormatError(f"{where}: expected a cost model of version {_VERSION}")
        known = [field.name for field in fields(cls)]
        wrong = [*(set(value) - set(known)), *(set(known[:6]) - set(value))]
        if wrong:
            raise FormatError(f"{where}: expected the fields {', '.join(known)}; see {wrong[0]!r}")
        try:
            return cls(**value)
        except InvalidArgumentError as error:
            raise FormatError(f"{where}: {error}") from None


def fit_transfer(samples: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the line through measured transfers, (fixed seconds, bytes a second).

    The line seconds = fixed + bytes / rate with the least sum of squared relative errors, fixed
    not below 0. Give medians: one interrupted transfer pulls the line.

    Args:
        samples: pairs of bytes and seconds, of at least two sizes.

    Raises:
        InvalidArgumentError: fewer sizes, a number that is not above 0, or more bytes do not take
            longer.
    """
    pairs = []
    for sample in samples:
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise InvalidArgumentError(
                f"samples: expected pairs of bytes and seconds, found {shown(sample)}"
            )
        pairs.append(
            (
                check_number("bytes of a sample", sample[0], 0, above_minimum=True),
                check_number("seconds of a sample", sample[1], 0, above_minimum=True),
            )
        )
    return _moerun.fit_transfer(pairs)


def _seconds(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidArgumentError(f"{name} must be a sequence of seconds, not {shown(values)}")
    return tuple(check_number(f"{name}[{i}]", value, 0) for i, value in enumerate(values))
