"""Checks that a model computes the experts that its router chose.

Not every version of every model does: transformers 5.23 runs only the experts 0 and 1 of NLLB-MoE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from moerun.recording.routers import Router
from moerun.recording.routing_choice import Choice


class ExpertCalls:
    """Counts the tokens that each expert computes, where every expert is a module of its own."""

    def __init__(self, routers: Iterable[Router]) -> None:
        self._routers = [r for r in routers if _experts_of(r)]
        self._tokens = {id(r): np.zeros(len(_experts_of(r)), np.int64) for r in self._routers}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        hooks = []
        for router in self._routers:
            for index, expert in enumerate(_experts_of(router)):
                hooks.append(expert.register_forward_pre_hook(self._counter(router, index)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def differ(self, router: Router, choices: list[Choice]) -> bool:
        """Whether the experts behind `router` computed other tokens than it chose them for."""
        counted = self._tokens.get(id(router))
        if counted is None or any(choice.num_dropped for choice in choices):
            return False
        chosen = np.zeros_like(counted)
        num_tokens = 0
        for choice in choices:
            ids = choice.expert_ids.flatten().cpu().numpy()
            if ids.max() >= len(chosen):  # experts without weights, which no module stands for
                return False
            chosen += np.bincount(ids, minlength=len(chosen))
            num_tokens += len(choice.expert_ids)
        runs_all = bool((counted == num_tokens).all())  # and weighs what was not chosen with 0
        return not runs_all and bool(counted.any()) and not np.array_equal(counted, chosen)

    def _counter(self, router: Router, index: int) -> Any:
        def count(module: nn.Module, args: Any) -> None:
            if args:
                self._tokens[id(router)][index] += args[0].numel() // args[0].shape[-1]

        return count


def _experts_of(router: Router) -> list[nn.Module]:
    """Return the experts in order if each is a module, else nothing."""
    experts = router.block._modules.get("experts")
    if isinstance(experts, nn.ModuleList):
        return list(experts)
    if isinstance(experts, nn.ModuleDict):
        # Other modules may stand beside them, such as a dropout.
        named = {name: module for name, module in experts.items() if name[-1:].isdigit()}
        return [named[name] for name in sorted(named, key=lambda n: int(n.rpartition("_")[2]))]
    return []
