"""Checks of arguments, with messages that name the argument, what it was and what it may be."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun.errors import InvalidArgumentError

_MAX_SECONDS = 1e6  # as the native module
_MAX_BYTES_PER_S = 1e18


def shown(value: Any) -> str:
    """Return how a message names a value: its representation, cut when long, and its type."""
    try:
        text = repr(value)
    except Exception:  # such as an int of more than 4,300 digits
        text = "a value that cannot be shown"
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def check_str(name: str, value: Any) -> str:
    """Return `value`, which must be a str that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be a str, not {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{name} is not valid Unicode: character {error.start} is a lone surrogate"
        ) from None
    return value


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Return `value` as an int; bools and floats are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidArgumentError(f"{name} must be an int, not {shown(value)}")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        limit = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise InvalidArgumentError(f"{name} must be {limit}, not {number}")
    return number


def check_number(
    name: str,
    value: Any,
    minimum: float,
    maximum: float = math.inf,
    *,
    above_minimum: bool = False,
) -> float:
    """Return `value` as a finite float within the limits, or above the lower one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidArgumentError(f"{name} must be a number, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    too_small = number <= minimum if above_minimum else number < minimum
    if not math.isfinite(number) or too_small or number > maximum:
        limit = f"{'above' if above_minimum else 'at least'} {minimum:g}"
        if maximum != math.inf:
            limit += f" and at most {maximum:g}"
        raise InvalidArgumentError(f"{name} must be {limit}, not {number:g}")
    return number


def check_seconds(name: str, value: Any) -> float:
    """Return `value` as a time that a part of a pass can take: from 0 to 10^6 seconds."""
    return check_number(name, value, 0, _MAX_SECONDS)


def check_rate(name: str, value: Any) -> float:
    """Return `value` as bytes a second, from 1 to 10^18: below, times are no numbers any more."""
    return check_number(name, value, 1, _MAX_BYTES_PER_S)


def check_token_ids(token_ids: Any, vocab_size: int) -> NDArray[np.int64]:
    """Return `token_ids` as an array of shape (T), T >= 1, every id below `vocab_size`."""
    ids = _integer_array(token_ids)
    if ids.ndim != 1:
        raise InvalidArgumentError(f"token_ids must have one dimension, (T), not shape {ids.shape}")
    if ids.size == 0:
        raise InvalidArgumentError("token_ids is empty; at least one token is needed")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise InvalidArgumentError(
            f"token id {ids[position]} at position {position} is outside the vocabulary: ids go "
            f"from 0 to {vocab_size - 1}"
        )
    return ids.astype(np.int64)


def _integer_array(token_ids: Any) -> NDArray[Any]:
    if isinstance(token_ids, (str, bytes)):
        raise InvalidArgumentError(
            "token_ids must be integers, not text; model.tokenizer.encode(text) gives them"
        )
    if hasattr(token_ids, "__array__"):
        array = np.asarray(token_ids)
        if not np.issubdtype(array.dtype, np.integer):
            raise InvalidArgumentError(f"token_ids must be integers, not {array.dtype}")
        return array
    if not isinstance(token_ids, Iterable):
        raise InvalidArgumentError(f"token_ids must be a sequence, not {shown(token_ids)}")
    values = list(token_ids)
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InvalidArgumentError(
                f"token_ids must be integers; position {position} holds {shown(value)}"
            )
    return np.array([int(value) for value in values], dtype=object)
