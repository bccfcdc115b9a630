"""The metrics as plain loops over their definitions: oracles, slow on purpose.

A sequence is a list of tokens in one layer (or in a pool over all), a token a list of experts.
"""

import math

import numpy as np


def window_counts(sequences, experts, m):
    """How often each of `experts` is active in each window of m tokens, one number a pair."""
    counts = []
    for tokens in sequences:
        for first in range(len(tokens) - m + 1):
            window = tokens[first : first + m]
            counts += [sum(expert in token for token in window) for expert in experts]
    return counts


def srp(counts, m):
    """(srp, threshold, cache ratio, activation rate) of a group's window counts."""
    active = sum(counts)
    best = (0.0, 0, 0.0)
    for threshold in range(m + 1):
        chosen = [f for f in counts if f >= threshold]
        f1 = 2 * sum(chosen) / (m * len(chosen) + active)
        if f1 > best[0]:
            best = (f1, threshold, m * len(chosen) / active)
    return (*best, active / (m * len(counts)))


def hits(tokens, policy, capacity, m):
    """Hits of one cache of `capacity` experts."""
    cache, found, serial = [], 0, 0
    last, count = {}, {}
    flat = [expert for token in tokens for expert in token]
    for t, token in enumerate(tokens):
        there = set(cache)
        found += sum(expert in there for expert in token)
        for slot, expert in enumerate(token):
            if expert not in cache:
                if len(cache) < capacity:
                    found += expert not in there
                else:
                    coming = [token[slot:], *tokens[t + 1 : t + m]]

                    def keep(e, coming=coming, rest=flat[serial:]):
                        if policy == "lru":
                            return (last[e],)
                        if policy == "lfu":
                            return (count[e], last[e])
                        if policy == "sch":
                            return (sum(e in later for later in coming), last[e])
                        return (-(rest.index(e) if e in rest else len(flat) + e),)

                    cache.remove(min(cache, key=keep))
                cache.append(expert)
            last[expert] = serial = serial + 1
            count[expert] = count.get(expert, 0) + 1
    return found


def hit_rates(sequences, num_experts, policy, m):
    """Mean over sequences, at capacity 1 ... num_experts."""
    return np.array(
        [
            np.mean([hits(tokens, policy, c, m) / sum(map(len, tokens)) for tokens in sequences])
            for c in range(1, num_experts + 1)
        ]
    )


def pooled(layers, num_experts):
    """One sequence's tokens of all layers as tokens of one pool."""
    return [
        [layer * num_experts + e for layer, experts in enumerate(rows) for e in experts]
        for rows in zip(*layers, strict=True)
    ]


def independent_srp(rates, m):
    """SRP of a group whose experts are active with these probabilities, whatever came before."""

    def probability(p, f):
        return math.comb(m, f) * p**f * (1 - p) ** (m - f)

    best = 0.0
    for threshold in range(m + 1):
        chosen = [(p, f) for p in rates for f in range(threshold, m + 1)]
        found = sum(f * probability(p, f) for p, f in chosen)
        size = sum(m * probability(p, f) for p, f in chosen)
        active = m * sum(rates)
        best = max(best, 2 * found / (size + active) if active else 0.0)
    return best
