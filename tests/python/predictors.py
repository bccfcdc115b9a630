"""Small predictors for tests: random weights, written by the real writer; and made-up routing."""

import numpy as np
from traces import write_trace

from moerun import SequenceRouting
from moerun.identity import ModelIdentity
from moerun.predictor import NetShape
from moerun.predictor.files import PredictorInfo, write_predictor

SMALL = NetShape(
    embedding_size=32, hidden_size=64, mlp_size=96, num_blocks=2, num_heads=4, window=6
)


def random_weights(shape, vocab_size, num_outputs, seed=0):
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(size) / np.sqrt(size[-1]) + (len(size) == 1)).astype(
            np.float32
        )
        for name, size in shape.tensors(vocab_size, num_outputs).items()
    }


def random_predictor(path, shape=SMALL, vocab_size=50, layers=2, experts=6, top_k=2, seed=0, **own):
    """Write a predictor; return its info and its weights before they were rounded."""
    facts = {
        "model": "random",
        "model_id": "0" * 16,
        "tokenizer_hash": "0" * 64,
        "training": {},
        "trained_sequences": np.zeros(0, np.int64),
        **own,
    }
    info = PredictorInfo(
        vocab_size=vocab_size,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        top_k=top_k,
        shape=shape,
        **facts,
    )
    weights = random_weights(shape, vocab_size, layers * experts, seed)
    write_predictor(path, info, weights)
    return info, weights


def ruled_sequence(random, tokens, layers=8, experts=32, top_k=4, vocab_size=200):
    """Routing that follows from the token and the one before by a rule."""
    ids = random.integers(vocab_size, size=tokens).astype(np.int32)
    before = np.concatenate([[0], ids[:-1]])
    first = (ids[None] * 7 + before[None] % 2 * 5 + np.arange(layers)[:, None] * 3) % experts
    used = (first[:, :, None] + np.arange(top_k) * 3) % experts
    return SequenceRouting(used.astype(np.uint16), ids)


def ruled_trace(path, domains=("a",) * 8, seed=0, tokens=64, **sizes):
    """A trace of the shipped model's sizes, a sequence for each of `domains`."""
    random = np.random.default_rng(seed)
    sequences = [ruled_sequence(random, tokens, **sizes) for _ in domains]
    return write_trace(path, sequences, list(domains), num_experts=32)


def predictor_of_shipped_model(path, **own):
    """Write a random predictor that the model which ships with the package takes."""
    facts = ModelIdentity(None)
    sizes = {"vocab_size": 4096, "layers": 8, "experts": 32, "top_k": 4}
    ids = {"model_id": facts.model_id, "tokenizer_hash": facts.tokenizer_hash}
    random_predictor(path, **sizes, **{**ids, **own})
    return path
