"""Checks the routing of a sequence before it becomes part of a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moerun import _moerun
from moerun.errors import InvalidArgumentError
from moerun.trace.header import TraceHeader
from moerun.trace.routing import NO_PREDICTION, SequenceRouting

_OPTIONAL = (
    "token_ids",
    "expert_weights",
    "router_logits",
    "predicted_ids",
    "prefetch_ids",
    "cache_events",
)


def optional_tensors(routing: SequenceRouting) -> tuple[str, ...]:
    """Return the names of the optional tensors that a sequence has, sorted."""
    return tuple(sorted(name for name in _OPTIONAL if getattr(routing, name) is not None))


def check_sequence(routing: SequenceRouting, header: TraceHeader) -> None:
    """Refuse routing that cannot be that of a sequence of the trace.

    Raises:
        InvalidArgumentError: a shape does not fit, or an id is out of range.
    """
    layers, experts, k = len(header.moe_layers), header.num_experts, header.top_k
    tokens = routing.expert_ids.shape[1] if routing.expert_ids.ndim == 3 else 0
    shapes: dict[str, tuple[NDArray[Any] | None, tuple[int, ...]]] = {
        "expert_ids": (routing.expert_ids, (layers, tokens, k)),
        "token_ids": (routing.token_ids, (tokens,)),
        "expert_weights": (routing.expert_weights, (layers, tokens, k)),
        "router_logits": (routing.router_logits, (layers, tokens, experts)),
        "predicted_ids": (routing.predicted_ids, (tokens,)),
        "prefetch_ids": (routing.prefetch_ids, (layers, tokens, k)),
    }
    for name, (array, shape) in shapes.items():
        if array is not None and (array.shape != shape or tokens == 0):
            raise InvalidArgumentError(
                f"{name}: expected the shape ({', '.join(map(str, shape))}) with at least one "
                f"token, found {array.shape}"
            )
    ids = routing.expert_ids
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= experts:
        raise InvalidArgumentError(
            f"expert_ids: expected integers from 0 to {experts - 1}, found {ids.dtype} from "
            f"{ids.min()} to {ids.max()}"
        )
    guesses = routing.prefetch_ids
    if guesses is not None and ((guesses >= experts) & (guesses != NO_PREDICTION)).any():
        raise InvalidArgumentError(
            f"prefetch_ids: expected experts from 0 to {experts - 1}, or {NO_PREDICTION} for "
            f"none, found up to {guesses.max()}"
        )
    events = routing.cache_events
    if events is not None and (events.ndim != 2 or events.shape[1] != 4):
        raise InvalidArgumentError(
            f"cache_events: expected the shape (events, 4), found {events.shape}"
        )
    _moerun.check_expert_ids(
        np.ascontiguousarray(ids[None], dtype=np.uint16), np.array([tokens], np.int32), experts
    )
