"""Simple ways to guess a token's experts, which a predictor has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moerun.predictor.sequences import RoutedSequence, activity

BASELINES = ("previous_token", "previous_layer", "most_used", "next_layer_router")


class Frequencies:
    """How often experts are used, and which go with which of the layer before.

    Args:
        sequences: to learn from.
        num_layers: L.
        num_experts: E.
    """

    def __init__(
        self, sequences: Sequence[RoutedSequence], num_layers: int, num_experts: int
    ) -> None:
        used = np.zeros((num_layers, num_experts))
        pairs = np.zeros((num_layers - 1, num_experts, num_experts))
        for sequence in sequences:
            active = activity(sequence.expert_ids, num_experts).astype(np.float32)
            used += active.sum(axis=1)
            pairs += np.matmul(active[:-1].transpose(0, 2, 1), active[1:])
        self.used = used
        self.conditional = pairs / np.maximum(1, used[:-1, :, None])


def likeliest(scores: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """Return where the `count` highest scores of the last axis are; of equals the lower id."""
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    result = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(result, chosen, True, axis=-1)
    return result


def guesses(
    sequence: RoutedSequence, used: NDArray[np.bool_], learned: Frequencies | None
) -> dict[str, NDArray[np.bool_]]:
    """Return what each baseline names of a sequence: (L, T, E) bool by its name.

    A baseline that knows nothing about a token or a layer names nothing there; one that knows
    nothing at all is left out.

    Args:
        sequence: whose tokens' experts are to be guessed.
        used: (L, T, E), the true ones.
        learned: from other sequences.
    """
    top_k = sequence.expert_ids.shape[2]
    layers, tokens, experts = used.shape
    named = {"previous_token": np.zeros_like(used)}
    named["previous_token"][:, 1:] = used[:, :-1]
    if learned is not None:
        weights = learned.conditional.astype(np.float32)
        named["previous_layer"] = np.zeros_like(used)
        scores = np.matmul(used[:-1].astype(np.float32), weights)
        named["previous_layer"][1:] = likeliest(scores, top_k)
        most = likeliest(learned.used, top_k)
        named["most_used"] = np.broadcast_to(most[:, None], (layers, tokens, experts))
    if sequence.prefetch_ids is not None:
        named["next_layer_router"] = activity(sequence.prefetch_ids, experts)
    return named
