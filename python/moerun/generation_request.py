"""What a caller asks of one text, checked and in the form that the runtime takes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moerun.arguments import check_int, check_number, check_token_ids, shown
from moerun.errors import InvalidArgumentError
from moerun.stop_strings import StopStrings

if TYPE_CHECKING:
    from moerun.model import Model

MAX_SEED = 2**64 - 1
_MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, how to go on with it, and when to end.

    Attributes:
        prompt: (T)
        native: what the runtime wants to know, by keyword.
        sampling: temperature, top_k, top_p, min_p and repetition_penalty.
        seed: given, or drawn.
        reason_of_token: why a text ends with one of these tokens.
        stop_strings: watches for those of `stop`; None: there are none.
        reason_at_limit: why a text ends that nothing else has ended.
    """

    prompt: NDArray[np.int64]
    native: dict[str, Any]
    sampling: dict[str, float]
    seed: int
    reason_of_token: dict[int, str]
    stop_strings: StopStrings | None
    reason_at_limit: str


def request_of(
    model: Model,
    token_ids: Iterable[int] | NDArray[Any],
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: int | str | Sequence[int | str] | None = None,
    ignore_eos: bool = False,
) -> GenerationRequest:
    """Check the arguments of `Model.generate`, and raise what it says.

    Arguments that are None are those of the model's generation_config.json.
    """
    config = model.config
    context_length = model.context_length
    prompt = check_prompt(
        token_ids,
        config["vocab_size"],
        context_length,
        context_length - 1,
        "leave room to continue",
    )
    room = context_length - len(prompt)
    wanted: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
    }
    if any(value is None for value in wanted.values()):
        wanted = model.generation_defaults.merged(wanted)
    max_new_tokens = wanted["max_new_tokens"]
    if max_new_tokens is not None:
        max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
    is_limited = max_new_tokens is not None and max_new_tokens <= room
    seed = draw_seed() if seed is None else check_int("seed", seed, 0, MAX_SEED)
    if not isinstance(ignore_eos, bool):
        raise InvalidArgumentError(f"ignore_eos must be a bool, not {shown(ignore_eos)}")
    stop_ids, strings = _check_stop(wanted["stop"], config["vocab_size"])
    eos_ids = [] if ignore_eos else list(config["eos_token_ids"])
    sampling = {
        "temperature": check_number("temperature", wanted["temperature"], 0),
        "top_k": check_int("top_k", wanted["top_k"], 0, _MAX_TOP_K),
        "top_p": check_number("top_p", wanted["top_p"], 0, 1, above_minimum=True),
        "min_p": check_number("min_p", wanted["min_p"], 0, 1),
        "repetition_penalty": check_number(
            "repetition_penalty", wanted["repetition_penalty"], 0, above_minimum=True
        ),
    }
    return GenerationRequest(
        prompt,
        {
            "max_new_tokens": max_new_tokens if is_limited and max_new_tokens else room,
            **sampling,
            "seed": seed,
            "stop_token_ids": [*eos_ids, *stop_ids],
        },
        sampling,
        seed,
        dict.fromkeys(eos_ids, "eos") | dict.fromkeys(stop_ids, "stop"),
        StopStrings(strings, model.tokenizer.stream(skip_special_tokens=False, after=prompt))
        if strings
        else None,
        "length" if is_limited else "context",
    )


def draw_seed() -> int:
    """Return a seed that nobody can foretell."""
    return secrets.randbits(32)


def check_prompt(
    token_ids: Any,
    vocab_size: int,
    context_length: int,
    max_tokens: int,
    purpose: str = "be computed",
) -> NDArray[np.int64]:
    """Return ids of at least one and at most `max_tokens` tokens as an array (T)."""
    ids = check_token_ids(token_ids, vocab_size)
    if len(ids) > max_tokens:
        raise InvalidArgumentError(
            f"the prompt has {len(ids)} tokens; to {purpose}, it may have at most {max_tokens} "
            f"in a context of {context_length}. Shorten it, or load the model with a "
            f"larger context_length if it allows one"
        )
    return ids


def _check_stop(stop: Any, vocab_size: int) -> tuple[list[int], list[str]]:
    """Split `stop` into token ids and strings."""
    if stop is None:
        return [], []
    items = stop if isinstance(stop, (list, tuple, set, frozenset)) else [stop]
    strings = [item for item in items if isinstance(item, str)]
    if "" in strings:
        raise InvalidArgumentError("stop holds an empty string, which would end every text")
    return [
        check_int("a token id in stop", item, 0, vocab_size - 1)
        for item in items
        if not isinstance(item, str)
    ], strings
