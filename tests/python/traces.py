"""Small traces for tests: random routing with locality, written by the real writer."""

import numpy as np

from moerun import SequenceRouting, TraceWriter


def random_routing(random, layers, tokens, experts, top_k):
    """Expert ids (L, T, k): neighbouring tokens share most of them."""
    ids = np.empty((layers, tokens, top_k), np.uint16)
    for layer in range(layers):
        order = random.permutation(experts)
        for token in range(tokens):
            if random.random() < 0.2:
                order = random.permutation(experts)
            i, j = random.integers(experts, size=2)
            order[[i, j]] = order[[j, i]]
            ids[layer, token] = order[:top_k]
    return ids


def random_sequence(random, layers, tokens, experts, top_k, vocabulary=12):
    return SequenceRouting(
        random_routing(random, layers, tokens, experts, top_k),
        random.integers(vocabulary, size=tokens).astype(np.int32),
        predicted_ids=random.integers(vocabulary, size=tokens).astype(np.int32),
    )


def write_trace(path, sequences, domains=None, num_experts=8, moe_layers=None, **options):
    layers, _, top_k = sequences[0].expert_ids.shape
    options.setdefault("overwrite", True)
    with TraceWriter(
        path,
        model="random",
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=moe_layers or list(range(layers)),
        **options,
    ) as writer:
        for index, sequence in enumerate(sequences):
            writer.append(sequence, domains[index] if domains else "all")
    return path


def random_trace(path, seed=0, lengths=(30, 40, 25), layers=2, experts=6, top_k=2, **options):
    random = np.random.default_rng(seed)
    sequences = [random_sequence(random, layers, t, experts, top_k) for t in lengths]
    return write_trace(path, sequences, num_experts=experts, **options)
