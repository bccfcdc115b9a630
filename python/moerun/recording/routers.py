"""Finds the routers of a Hugging Face model and watches them at work.

transformers names the router modules of most families itself (`_can_record_outputs`); the others,
and models with code of their own, are found by their shape: a router or gate beside the experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moerun.errors import UnsupportedModelError

_ROUTER_NAMES = {"gate", "router", "wg", "gating", "gate_network", "routing"}
_NOT_A_ROUTER = re.compile(r"shared|act|residual|forget", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOPK = (torch.topk, torch.Tensor.topk)


@dataclass(frozen=True)
class Router:
    """A router module and what surrounds it.

    Attributes:
        path: name of the module in the model.
        module: what turns hidden states into a choice of experts.
        block: the module that holds it, with the experts.
        experts: the module that gets the choice, None where the block calls experts one by one.
        logits_index: which of the router's outputs are the logits, None if nobody says.
    """

    path: str
    module: nn.Module
    block: nn.Module
    experts: nn.Module | None
    logits_index: int | None

    @property
    def stack(self) -> str | None:
        """ "encoder" or "decoder" by its path, None for neither."""
        return next((p for p in self.path.split(".") if p in ("encoder", "decoder")), None)

    @property
    def layer(self) -> int:
        """Number of its layer in the stack: the first number in its path."""
        numbers = [int(part) for part in self.path.split(".") if part.isdigit()]
        if not numbers:
            raise UnsupportedModelError(
                f"the router {self.path} has no layer number in its name, which this engine needs"
            )
        return numbers[0]

    def expert_bytes(self, num_experts: int) -> int:
        """Return the bytes of one expert."""
        experts = self.block._modules.get("experts")
        if experts is not None:
            tensors = list(experts.parameters())
        else:
            own = set(self.module.parameters())
            every = (p for p in self.block.parameters() if p not in own)
            tensors = [p for p in every if p.ndim > 1 and p.shape[0] == num_experts]
        total = sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)
        return total // num_experts


@dataclass
class Observation:
    """What one call of a router showed.

    Attributes:
        router: the router.
        outputs: what it returned.
        choice: what the experts module got beside the hidden states.
        selections: the calls of torch.topk from its start to the end of its block: input, indices.
    """

    router: Router
    outputs: tuple[Any, ...] = ()
    choice: tuple[Any, ...] = ()
    selections: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)


def find_routers(model: nn.Module) -> list[Router]:
    """Return what may be a router, in the order of the model's modules; attention has none."""
    modules = dict(model.named_modules())
    found: dict[str, int | None] = dict.fromkeys(_beside_experts(modules))
    for path, module in modules.items():
        index = _declared_index(modules.values(), path, module)
        inner = (name for name in found if name.startswith(path + "."))
        if index is not None and next(inner, None) is None:
            found[path] = index
    routers = []
    for path in modules:  # in their order
        if path not in found or _ATTENTION.search(path):
            continue
        parent = path.rpartition(".")[0]
        block = modules[parent]
        experts = block._modules.get("experts")
        if isinstance(experts, nn.ModuleList):
            experts = None
        routers.append(Router(path, modules[path], block, experts, found[path]))
    return routers


def _beside_experts(modules: dict[str, nn.Module]) -> Iterator[str]:
    for path, module in modules.items():
        children = module._modules
        if children.get("experts") is None:
            continue
        for name, child in children.items():
            kind = type(child).__name__
            if name == "experts" or child is None or _NOT_A_ROUTER.search(name):
                continue
            if name in _ROUTER_NAMES or re.search(r"Router|TopK|Gate$|Gating$", kind):
                yield f"{path}.{name}".lstrip(".")


def _declared_index(modules: Iterable[nn.Module], path: str, module: nn.Module) -> int | None:
    """Return which output of `module` is the router logits, if a model of transformers says so."""
    for owner in modules:
        declared = getattr(type(owner), "_can_record_outputs", None)
        if not isinstance(declared, dict) or "router_logits" not in declared:
            continue
        recorders = declared["router_logits"]
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            target = getattr(recorder, "target_class", recorder)
            layer_name = getattr(recorder, "layer_name", None)
            if not isinstance(target, type) or not isinstance(module, target):
                continue
            if layer_name is None or layer_name in path:
                return int(getattr(recorder, "index", 0))
    return None


class Watch(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
    """Writes down what routers do while a model runs inside `with watch:`.

    Args:
        routers: those to watch.

    Attributes:
        observations: one for each call of a router, in order; emptied by `clear`.
    """

    def __init__(self, routers: Iterable[Router]) -> None:
        super().__init__()
        self.observations: list[Observation] = []
        self._open: Observation | None = None
        self._hooks: list[Any] = []
        for router in routers:
            self._attach(router)

    def clear(self) -> list[Observation]:
        """Return the observations and forget them."""
        observations, self.observations = self.observations, []
        self._open = None
        return observations

    def close(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _attach(self, router: Router) -> None:
        def begin(module: nn.Module, args: Any) -> None:
            self._open = Observation(router)
            self.observations.append(self._open)

        def returned(module: nn.Module, args: Any, output: Any) -> None:
            if self._open is not None:
                self._open.outputs = output if isinstance(output, tuple) else (output,)

        def given(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._open is not None:
                self._open.choice = (*args[1:], *kwargs.values())

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self._open = None

        self._hooks.append(router.module.register_forward_pre_hook(begin))
        self._hooks.append(router.module.register_forward_hook(returned))
        if router.experts is not None:
            self._hooks.append(router.experts.register_forward_pre_hook(given, with_kwargs=True))
        self._hooks.append(router.block.register_forward_hook(end))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._open is not None and func in _TOPK:
            scores = args[0] if args else (kwargs or {})["input"]
            self._open.selections.append((scores, result[1]))
        return result


def num_experts_of(observation: Observation) -> int | None:
    """Return E as far as the router's logits or its modules say it."""
    router = observation.router
    if router.logits_index is not None and router.logits_index < len(observation.outputs):
        logits = observation.outputs[router.logits_index]
        if isinstance(logits, torch.Tensor) and logits.is_floating_point() and logits.ndim > 1:
            return int(logits.shape[-1])
    experts = router.block._modules.get("experts")
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    for module in (router.module, experts, router.block):
        for name in _NUM_EXPERTS:
            value = getattr(module, name, None)
            if isinstance(value, int):
                return value
    if isinstance(router.module, nn.Linear):
        return int(router.module.out_features)
    return None
