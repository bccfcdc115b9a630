"""Recorded routing of one sequence, as it is before it goes into a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What a row of `cache_events` ends with; the order of the runtime's own list.
CACHE_EVENT_KINDS = (
    "hit",
    "top_hit",
    "miss",
    "insert",
    "evict",
    "prefetch",
    "prefetch_useful",
    "prefetch_late",
    "prefetch_wasted",
)
# In `prefetch_ids`, where nothing was predicted: no expert has this number.
NO_PREDICTION = 65535


@dataclass(frozen=True)
class SequenceRouting:
    """Which experts the tokens of one sequence used; L layers with experts, T tokens, top-k k.

    Attributes:
        expert_ids: (L, T, k) uint16, by falling router score.
        token_ids: (T) int32, or None where they are not known.
        expert_weights: (L, T, k) float32, what the experts' outputs were multiplied with.
        router_logits: (L, T, E) float32.
        predicted_ids: (T) int32, the likeliest next token after each.
        cache_events: (N, 4) int32: token of the sequence, layer of the model, expert, index into
            `CACHE_EVENT_KINDS`; in the order in which they happened.
        prefetch_ids: (L, T, k) uint16, the experts that the layer's router named before the layer
            was reached, the likeliest first; `NO_PREDICTION` for none.
    """

    expert_ids: NDArray[np.uint16]
    token_ids: NDArray[np.int32] | None = None
    expert_weights: NDArray[np.float32] | None = None
    router_logits: NDArray[np.float32] | None = None
    predicted_ids: NDArray[np.int32] | None = None
    cache_events: NDArray[np.int32] | None = None
    prefetch_ids: NDArray[np.uint16] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.expert_ids.shape[1])
