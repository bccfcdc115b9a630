"""What layers take, from the times of tokens whose experts were chosen to tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SWEEP, _IDLE, _BUSY, _MIXED = range(4)
_MOST_SWEEP = 32  # tokens
_NUM_IDLE = 24
_NUM_BUSY = 12
_NUM_MIXED = 20


@dataclass(frozen=True)
class Routing:
    """Experts for T tokens in L layers, and what prefetch is told of them.

    First come tokens that bring the first experts of each layer into its slots; then some that use
    only these, with an idle link; the same while the link moves guesses that nobody uses; and last
    some that use others as well, so that computing has to wait.

    Attributes:
        phases: (T) which of these a token belongs to.
        expert_ids: (T, L, k).
        predicted_ids: (T, L, k).
    """

    phases: NDArray[np.int64]
    expert_ids: NDArray[np.int32]
    predicted_ids: NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """Tokens, T."""
        return len(self.phases)

    @property
    def first_mixed(self) -> int:
        """Number of the first token that uses others as well."""
        return int((self.phases != _MIXED).sum())

    @classmethod
    def make(cls, slots: Sequence[int], config: dict[str, Any]) -> Routing:
        """Return it for a cache with so many slots in each layer."""
        num_experts, top_k = config["num_experts"], config["top_k"]
        numbers = np.random.default_rng(0)
        sweep = min(_MOST_SWEEP, -(-max(slots) // top_k))
        phases = np.repeat(
            [_SWEEP, _IDLE, _BUSY, _MIXED], [sweep, _NUM_IDLE, _NUM_BUSY, _NUM_MIXED]
        )
        shape = (len(phases), len(slots), top_k)
        used = np.empty(shape, dtype=np.int32)
        predicted = np.empty(shape, dtype=np.int32)
        for layer, count in enumerate(slots):
            # A layer with fewer slots than a token uses experts always has to wait.
            held = max(count, top_k)
            for token, phase in enumerate(phases):
                if phase == _SWEEP:
                    used[token, layer] = (token * top_k + np.arange(top_k)) % held
                else:
                    used[token, layer] = numbers.permutation(held)[:top_k]
                if phase == _MIXED:
                    # Half of them are any, so that about as many are missing as of real texts.
                    kept = used[token, layer, : top_k // 2]
                    others = np.setdiff1d(np.arange(num_experts), kept)
                    used[token, layer, top_k // 2 :] = numbers.permutation(others)[
                        : top_k - top_k // 2
                    ]
                resident = used[token, layer] if phase == _IDLE else np.arange(top_k)
                absent = held + numbers.permutation(num_experts - held)[:top_k]
                guesses = absent if phase == _BUSY and len(absent) == top_k else resident
                predicted[token, layer] = guesses
        return cls(phases, used, predicted)


def layer_costs(times: dict[str, NDArray[Any]], routing: Routing) -> dict[str, Any]:
    """Return the fields of a `CostModel` that are about computing.

    Args:
        times: what the native `layer_times` returns after texts with `routing`.
        routing: of each of these texts.
    """
    rows = np.arange(len(times["token_s"]))
    phases = routing.phases[rows % routing.num_tokens]
    computing = times["attention_s"] + times["moe_s"]
    waits = times["waited_s"] > 0
    free = (~waits).all(axis=1)
    idle = free & (phases == _IDLE)
    if not idle.any():
        idle = np.ones(len(rows), dtype=bool)  # too few slots: it never goes without waiting
    attention = np.median(times["attention_s"][idle], axis=0)
    moe = np.median(times["moe_s"][idle], axis=0)
    base = attention.sum() + moe.sum()

    slowdown = 0.0
    busy = free & (phases == _BUSY)
    if busy.any() and base > 0:
        slowdown = max(0.0, float(np.median(computing[busy].sum(axis=1)) / base - 1))
    wake = 0.0
    mixed = (phases == _MIXED) & ~free
    if mixed.any() and free.any():
        # While it waits for some experts, the link is busy as it computes the others.
        slowed = np.where(waits, moe * slowdown, 0).sum(axis=1)
        longer = computing.sum(axis=1) - base - slowed
        wake = max(0.0, float(np.median(longer[mixed] / waits[mixed].sum(axis=1))))

    everything = computing.sum(axis=1) + times["waited_s"].sum(axis=1)
    head = (times["token_s"] - everything)[idle & np.isfinite(times["token_s"])]
    prompts = times["prompt_attention_s"] + times["prompt_moe_s"]
    prompt = (prompts / np.maximum(times["prompt_tokens"], 1)[:, None]).min(axis=0)
    return {
        "attention_s": _seconds(attention),
        "moe_s": _seconds(moe),
        "prompt_s": _seconds(prompt),  # of the quickest one: the first also takes memory
        "head_s": max(0.0, float(np.median(head))) if len(head) else 0.0,
        "slowdown": slowdown,
        "wake_s": wake,
    }


def _seconds(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(each) for each in np.maximum(values, 0))
