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


def write_trace(
    path, sequences, domains=None, num_experts=8, moe_layers=None, model="random", **options
):
    layers, _, top_k = sequences[0].expert_ids.shape
    options.setdefault("overwrite", True)
    with TraceWriter(
        path,
        model=model,
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


def independent_routing(random, rates, tokens, top_k):
    """Expert ids (T, k) of tokens without memory: expert e is used with probability rates[e].

    Systematic sampling: points at distance 1 on a line of the rates in a random order.
    """
    rates = np.asarray(rates, float)
    ids = np.empty((tokens, top_k), np.uint16)
    for token in range(tokens):
        order = random.permutation(len(rates))
        ends = np.cumsum(rates[order])
        ids[token] = order[
            np.searchsorted(ends, random.random() + np.arange(top_k)).clip(max=len(rates) - 1)
        ]
    return ids


def even_routing(random, layers, tokens, experts, top_k):
    """Expert ids (L, T, k): every set of k experts is as likely as any other, at every token."""
    drawn = random.random((layers, tokens, experts)).argsort(axis=-1)
    return drawn[..., :top_k].astype(np.uint16)


def chance_trace(path, experts, top_k, lengths=(2100,), layers=1, seed=0, rates=None, **options):
    """A trace of tokens that draw their experts without memory, evenly or by rates (E)."""
    random = np.random.default_rng(seed)
    sequences = []
    for tokens in lengths:
        if rates is None:
            ids = even_routing(random, layers, tokens, experts, top_k)
        else:
            ids = np.stack(
                [independent_routing(random, rates, tokens, top_k) for _ in range(layers)]
            )
        sequences.append(SequenceRouting(ids))
    return write_trace(path, sequences, num_experts=experts, **options)


def local_trace(path, seed=0, lengths=(700, 700, 700), layers=2, experts=12, top_k=3, **options):
    """A trace with locality, long enough for a verdict."""
    random = np.random.default_rng(seed)
    sequences = [
        SequenceRouting(random_routing(random, layers, t, experts, top_k)) for t in lengths
    ]
    return write_trace(path, sequences, num_experts=experts, **options)
