"""Puts what the routers of a stack of layers chose together to the routing of a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moerun.errors import InvalidArgumentError, UnsupportedModelError
from moerun.recording.engine import Stack, TraceOptions
from moerun.recording.routers import Observation, Router, num_experts_of
from moerun.recording.routing_choice import Choice, read_choice
from moerun.trace import SequenceRouting


class StackReader:
    """Reads the routers of one stack, which must all have the same sizes.

    Args:
        name: "encoder" or "decoder", None for the only stack of a model.
        routers: the routers of the stack, one a layer.
        probe: what they did for some tokens.
        top_k: what the configuration says about it, used where the routers do not show it.

    Attributes:
        stack: sizes and layers.
        routers: the routers by layer.
        guesses: paths of routers whose ids are only the largest logits.
        num_dropped: choices so far that the model did not compute.

    Raises:
        UnsupportedModelError: the routers cannot be understood, or differ in their sizes.
    """

    def __init__(
        self,
        name: str | None,
        routers: Iterable[Router],
        probe: Sequence[Observation],
        top_k: int | None,
    ) -> None:
        self.routers = sorted(routers, key=lambda router: router.layer)
        layers = tuple(router.layer for router in self.routers)
        if len(set(layers)) != len(layers):
            paths = ", ".join(router.path for router in self.routers[:4])
            raise UnsupportedModelError(f"found several routers in one layer: {paths}")
        sizes: dict[tuple[int, int], str] = {}
        expert_bytes = []
        self.guesses: list[str] = []
        self.num_dropped = 0
        for router in self.routers:
            observation = next(o for o in probe if o.router is router)
            num_experts = num_experts_of(observation)
            if num_experts is None:
                raise UnsupportedModelError(
                    f"the number of experts that the router {router.path} chooses from is unknown"
                )
            choice = read_choice(observation, num_experts, top_k)
            if choice.is_guess:
                self.guesses.append(router.path)
            sizes.setdefault((num_experts, choice.expert_ids.shape[1]), router.path)
            expert_bytes.append(router.expert_bytes(num_experts))
        if len(sizes) != 1:
            found = "; ".join(f"{k} of {e} at {path}" for (e, k), path in list(sizes.items())[:4])
            raise UnsupportedModelError(
                f"a trace holds one number of experts and one top_k for all layers, found {found}"
            )
        ((num_experts, k),) = sizes
        self.stack = Stack(name, num_experts, k, layers, sum(expert_bytes) // len(expert_bytes))

    def read(self, observations: Iterable[Observation]) -> list[list[Choice]]:
        """Return for each layer what its router chose, call by call."""
        number = {id(router): index for index, router in enumerate(self.routers)}
        choices: list[list[Choice]] = [[] for _ in self.routers]
        for observation in observations:
            index = number.get(id(observation.router))
            if index is not None:
                choice = read_choice(observation, self.stack.num_experts, self.stack.top_k)
                choices[index].append(choice)
                self.num_dropped += choice.num_dropped
        return choices

    def routing(
        self,
        choices: list[list[Choice]],
        token_ids: NDArray[np.int32],
        predicted_ids: NDArray[np.int32] | None,
        options: TraceOptions,
    ) -> SequenceRouting:
        """Return the routing of a sequence.

        Raises:
            UnsupportedModelError: a router did not see every token once.
            InvalidArgumentError: weights or logits are asked for, and the routers show none.
        """
        size = (len(token_ids), self.stack.top_k)
        ids = []
        for router, calls in zip(self.routers, choices, strict=True):
            layer = [choice.expert_ids for choice in calls]
            found = tuple(torch.cat(layer).shape) if layer else (0, 0)
            if found != size:
                raise UnsupportedModelError(
                    f"the router {router.path} chose {found[1]} experts for {found[0]} tokens, "
                    f"expected {size[1]} for {size[0]}"
                )
            ids.append(torch.cat(layer).to(torch.int32).cpu().numpy().astype(np.uint16))
        return SequenceRouting(
            expert_ids=np.stack(ids),
            token_ids=np.asarray(token_ids, np.int32),
            expert_weights=self._optional(choices, "weights") if options.with_weights else None,
            router_logits=self._optional(choices, "logits") if options.with_logits else None,
            predicted_ids=predicted_ids,
        )

    def _optional(self, choices: list[list[Choice]], name: str) -> NDArray[np.float32]:
        layers = []
        for router, calls in zip(self.routers, choices, strict=True):
            tensors = [getattr(choice, name) for choice in calls]
            if any(tensor is None for tensor in tensors):
                raise InvalidArgumentError(
                    f"the router {router.path} does not show its {name}; leave out --{name}"
                )
            layers.append(torch.cat(tensors).float().cpu().numpy())
        return np.stack(layers)
