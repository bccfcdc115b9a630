"""Reasons why the routing in a trace says nothing of a trained model at work."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from moerun.trace import Trace

# At 2,000 tokens SRP(16) of independent routing strays from its expectation by up to 0.7 points
# (one layer, 4 to 256 experts, 40 draws of each shape); in fewer, it nears the margin of a verdict.
LEAST_TOKENS = 2000
_LEAST_PREDICTIONS = 500


def objections(trace: Trace) -> list[str]:
    """Return sentences on why there can be no verdict from a trace; none if nothing objects."""
    recording = _recording(trace)
    found = []
    if "(random weights)" in trace.model or recording.get("random_init") is True:
        found.append("The weights are random, and so is the routing.")
    if _has_random_tokens(recording):
        found.append("The tokens are random: the model was made for text.")
    if not found and (sentence := _blind_predictions(trace)):
        found.append(sentence)
    if trace.num_tokens < LEAST_TOKENS:
        found.append(
            f"The trace is short: it has {trace.num_tokens:,} tokens, and a verdict needs "
            f"{LEAST_TOKENS:,}."
        )
    return found


def _recording(trace: Trace) -> dict[str, Any]:
    """The settings that moe-trace record wrote; empty where there are none."""
    try:
        value = json.loads(trace.metadata.get("recording", "{}"))
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}


def _has_random_tokens(recording: dict[str, Any]) -> bool:
    """Whether a domain is of random tokens: its fingerprint is a seed, that of text is a hash."""
    data = recording.get("data")
    found = data.get("random") if isinstance(data, dict) else None
    return isinstance(found, str) and found.startswith("seed ")


def _blind_predictions(trace: Trace) -> str | None:
    """Say that the model predicts worse than the one token that follows most often.

    A trained model is right several times as often (the shipped one: 45 % against 3 %), one with
    random weights hardly ever. Tokens that the model chose itself tell nothing.
    """
    if not {"token_ids", "predicted_ids"} <= trace.tensors:
        return None
    if trace.metadata.get("phase", "prefill") != "prefill":
        return None
    right = 0
    following = []
    for shard in trace.shards():
        tokens, predicted = shard.tensor("token_ids"), shard.tensor("predicted_ids")
        for row, guesses, length in zip(tokens, predicted, shard.lengths, strict=True):
            right += int((guesses[: length - 1] == row[1:length]).sum()) if length else 0
            following.append(row[1:length])
    after = np.concatenate(following)
    if len(after) < _LEAST_PREDICTIONS:
        return None
    most = int(np.unique(after, return_counts=True)[1].max())
    if right >= most:
        return None
    return (
        f"The model predicts {right / len(after):.1%} of the next tokens, fewer than the most "
        f"frequent token alone would ({most / len(after):.1%}): its weights or the tokens look "
        "random."
    )
