"""Synthetic routing whose locality is stated: favourites that last, topics that pass, reuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import moerun


@dataclass(frozen=True)
class Source:
    """How a layer routes. With every number 0, all experts are equally likely at every token.

    An expert is drawn with a chance of (1 + a)^-skew * (1 + b)^-topic_skew, where a is its place
    in the layer's order of favourites and b its place in that of the current topic; both orders
    are random.

    Attributes:
        skew: Zipf exponent of the popularity, which is the same from the first token to the last.
        topic_skew: Zipf exponent of what the current topic prefers.
        topic_tokens: mean length of a topic, in tokens; lengths are geometric. 0: one topic a
            sequence. A new sequence has a new topic in any case, and the layers of one change
            theirs at the same tokens, as a text does.
        stay: chance that an active expert is active at the next token too, whatever its popularity.
    """

    skew: float = 0.0
    topic_skew: float = 0.0
    topic_tokens: int = 0
    stay: float = 0.0


def synthetic_routing(
    sources: Sequence[Source], sequences: int, tokens: int, experts: int, top_k: int, seed: int
) -> NDArray[np.uint16]:
    """Expert ids (sequences, layers, tokens, top_k) of one source for each layer."""
    random = np.random.default_rng(seed)
    layers = len(sources)

    def column(name: str) -> NDArray[np.float64]:
        values = [getattr(source, name) for source in sources]
        return np.array(values, np.float64)[None, :, None]

    def zipf(shape: tuple[int, ...], exponent: NDArray[np.float64]) -> NDArray[np.float64]:
        places = random.random((*shape, experts)).argsort(axis=-1)
        return -exponent * np.log1p(places)

    favourites = zipf((1, layers), column("skew"))
    topics = zipf((sequences, layers), column("topic_skew"))
    lengths = column("topic_tokens")
    switch_chance = np.where(lengths > 0, 1 / np.maximum(lengths, 1), 0)
    stay = column("stay")
    ids = np.empty((sequences, layers, tokens, top_k), np.uint16)
    active = None
    for token in range(tokens):
        is_new_topic = random.random((sequences, 1, 1)) < switch_chance
        if token and is_new_topic.any():
            topics = np.where(is_new_topic, zipf((sequences, layers), column("topic_skew")), topics)
        drawn = favourites + topics + random.gumbel(size=topics.shape)
        if active is not None:  # those that stay come first, the others are drawn
            before = np.take_along_axis(drawn, active, axis=-1)
            stays = random.random(active.shape) < stay
            np.put_along_axis(drawn, active, np.where(stays, np.inf, before), axis=-1)
        active = np.argsort(-drawn, axis=-1)[..., :top_k]
        order = random.random(active.shape).argsort(axis=-1)
        ids[:, :, token] = np.take_along_axis(active, order, axis=-1)
    return ids


def write_trace(
    path: Path,
    ids: NDArray[np.uint16],
    experts: int,
    predicted: NDArray[np.uint16] | None = None,
    moe_layers: Sequence[int] | None = None,
) -> moerun.Trace:
    """Write ids (sequences, layers, tokens, top_k) as one file, and open it.

    Args:
        predicted: of the same shape, what the prefetcher would be told.
        moe_layers: numbers of the layers; None for 0, 1, 2 ...
    """
    with moerun.TraceWriter(
        path,
        model="synthetic",
        num_experts=experts,
        top_k=ids.shape[3],
        moe_layers=range(ids.shape[1]) if moe_layers is None else moe_layers,
    ) as writer:
        for number, sequence in enumerate(ids):
            guesses = None if predicted is None else predicted[number]
            writer.append(moerun.SequenceRouting(sequence, prefetch_ids=guesses), "synthetic")
    return moerun.Trace.open(path)
