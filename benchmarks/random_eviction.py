"""A cache that evicts at random: no policy of moerun, but what policies are held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def random_hits(
    expert_ids: NDArray[np.integer], num_experts: int, slots: int, caches: int, seed: int
) -> NDArray[np.int64]:
    """Hits of `caches` independent caches on one sequence: (caches, layers).

    The rules are those of docs/cache.md: all experts of a token are looked up first; then the
    missing ones take, in the router's order, a free slot or that of a victim, which is no expert of
    the token; without a victim they get none. The victim is any of the others with equal chance.

    Args:
        expert_ids: (layers, tokens, top_k), all different within a token.
    """
    random = np.random.default_rng(seed)
    layers, tokens, top_k = expert_ids.shape
    hits = np.zeros(caches * layers, np.int64)
    held = np.zeros((caches * layers, num_experts), bool)
    for token in range(tokens):
        active = np.tile(expert_ids[:, token].astype(np.int64), (caches, 1))
        is_missing = ~np.take_along_axis(held, active, axis=1)
        missing = is_missing.sum(axis=1)
        hits += top_k - missing
        if not missing.any():
            continue
        candidates = held.copy()
        np.put_along_axis(candidates, active, False, axis=1)
        free = slots - held.sum(axis=1)
        taken = np.minimum(missing, free + candidates.sum(axis=1))
        # Victims one after the other are a random subset: those with the lowest random keys.
        keys = np.where(candidates, random.random(held.shape), 2.0)
        places = keys.argsort(axis=1).argsort(axis=1)
        held &= places >= np.maximum(taken - free, 0)[:, None]
        gets_slot = is_missing & (is_missing.cumsum(axis=1) <= taken[:, None])
        there = np.take_along_axis(held, active, axis=1)
        np.put_along_axis(held, active, there | gets_slot, axis=1)
    return hits.reshape(caches, layers)
