"""From what a router returned to the experts that every token used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moerun.errors import UnsupportedModelError
from moerun.recording.routers import Observation


@dataclass(frozen=True)
class Choice:
    """The experts of the N tokens of one router call.

    Attributes:
        expert_ids: (N, k) by falling score, ties to the lower id.
        weights: (N, k) of the experts, None if the model does not show them.
        logits: (N, E), None if the model does not show them.
        num_dropped: choices that the model did not compute because an expert had too many tokens;
            their weight is 0.
        is_guess: whether the ids are only the k largest logits: right if the model takes the
            experts with the largest logits, or any rising function of each; wrong if it adds a
            bias, or limits groups.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor | None
    logits: torch.Tensor | None
    num_dropped: int = 0
    is_guess: bool = False

    def last(self) -> Choice:
        """Return the choice of the last token."""
        weights = None if self.weights is None else self.weights[-1:]
        logits = None if self.logits is None else self.logits[-1:]
        return Choice(self.expert_ids[-1:], weights, logits)


def read_choice(observation: Observation, num_experts: int, top_k: int | None) -> Choice:
    """Return which experts the tokens of a router call used.

    In this order, the first that is there counts: integer ids that the experts were given or the
    router returned; a table of weights or marks, tokens by experts, with zeros for the experts
    that are not used; what torch.topk chose out of all experts; the largest logits.

    Args:
        observation: what was seen.
        num_experts: routed experts, E.
        top_k: experts that a token uses, None if not known yet.

    Raises:
        UnsupportedModelError: nothing that was seen says which experts were used.
    """
    outputs = _tensors(observation.outputs)
    given = _tensors(observation.choice)
    logits = _logits(observation, num_experts)
    tables = [
        tensor
        for tensor in [*given, *outputs]
        if tensor.shape[-1] == num_experts
        and not _is_logits(tensor, observation)
        and _marks_few(tensor)
    ]
    selections = [
        (_flat(scores), _flat(indices))
        for scores, indices in observation.selections
        if scores.ndim > 1 and scores.shape[-1] == num_experts
    ]
    ids = next((t for t in [*given, *outputs] if _are_ids(t, num_experts, tables)), None)
    if ids is not None:
        weights = _weights_of(ids, [*given, *outputs])
        return _sorted(ids, weights, logits, _scores_of(ids, selections))
    if tables:
        return _from_table(tables, outputs, logits, top_k)
    if selections:
        ids = selections[-1][1]
        return _sorted(ids, _weights_of(ids, [*given, *outputs]), logits, selections[-1][0])
    if logits is None or top_k is None:
        raise UnsupportedModelError(
            f"the module {observation.router.path} looks like a router, but what it returns does "
            "not say which experts it chose: neither expert ids, nor weights, nor logits with a "
            "known top_k"
        )
    return _sorted(logits.topk(top_k).indices, None, logits, logits, is_guess=True)


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return the tensors with a row for each token, as (N, ...)."""
    return [_flat(v) for v in values if isinstance(v, torch.Tensor) and v.ndim > 1]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _logits(observation: Observation, num_experts: int) -> torch.Tensor | None:
    index = observation.router.logits_index
    outputs = observation.outputs if index is None else observation.outputs[index : index + 1]
    for tensor in _tensors(outputs):
        is_table = tensor.is_floating_point() and tensor.shape[-1] == num_experts
        if is_table and (index is not None or not _marks_few(tensor)):
            return _from_probabilities(tensor.float())
    return None


def _is_logits(tensor: torch.Tensor, observation: Observation) -> bool:
    index = observation.router.logits_index
    if index is None or index >= len(observation.outputs):
        return False
    declared = observation.outputs[index]
    return isinstance(declared, torch.Tensor) and declared.data_ptr() == tensor.data_ptr()


def _from_probabilities(tensor: torch.Tensor) -> torch.Tensor:
    """Return logits: some routers return their softmax, whose logarithm differs by a constant."""
    sums = tensor.sum(dim=-1)
    if bool((tensor >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
        return tensor.clamp_min(1e-30).log()
    return tensor


def _marks_few(tensor: torch.Tensor) -> bool:
    """Whether a table (N, E) is zero but for the experts in use."""
    if tensor.dtype == torch.bool:
        return True
    used = (tensor != 0).sum(dim=-1)
    return bool((tensor >= 0).all()) and bool((used < tensor.shape[-1]).all())


def _are_ids(tensor: torch.Tensor, num_experts: int, tables: list[torch.Tensor]) -> bool:
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.shape[-1] > num_experts:
        return False
    return not any(tensor.data_ptr() == table.data_ptr() for table in tables)


def _weights_of(ids: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor | None:
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.shape == ids.shape:
            return tensor
    return None


def _scores_of(
    ids: torch.Tensor, selections: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor | None:
    """Return the scores (N, E) out of which torch.topk chose `ids`."""
    for scores, indices in reversed(selections):
        if indices.shape == ids.shape and torch.equal(
            indices.sort(dim=-1).values, ids.sort(dim=-1).values.to(indices.dtype)
        ):
            return scores
    return None


def _from_table(
    tables: list[torch.Tensor],
    outputs: list[torch.Tensor],
    logits: torch.Tensor | None,
    top_k: int | None,
) -> Choice:
    """Read ids and weights off a table with zeros; a token may have fewer than k entries there."""
    # Weights say more than marks: NLLB marks only the first of its two experts.
    table = next((t for t in tables if t.is_floating_point()), tables[0]).float()
    used = (table != 0).sum(dim=-1)
    k = top_k or max(1, int(used.max()))
    if int(used.max()) > k:
        raise UnsupportedModelError(
            f"a token uses {int(used.max())} experts of a layer, expected {k} for every token"
        )
    scale = next((t for t in outputs if t.is_floating_point() and t.shape[-1] == 1), None)
    weights = table if scale is None else table * scale
    # Entries first; a choice that was dropped is what the router would have taken next.
    order = table.double()
    if logits is not None:
        order = order * 1e6 + logits.double().softmax(dim=-1)
    ids = order.topk(k).indices
    dropped = int((k - used).clamp_min(0).sum())
    choice = _sorted(ids, weights.gather(1, ids), logits, order)
    return Choice(choice.expert_ids, choice.weights, logits, dropped)


def _sorted(
    ids: torch.Tensor,
    weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    scores: torch.Tensor | None,
    is_guess: bool = False,
) -> Choice:
    """Order the experts of every token by falling score, ties to the lower id."""
    ids, order = ids.long().sort(dim=-1)
    if weights is not None:
        weights = weights.float().gather(1, order)
    if scores is not None:
        by = scores.gather(1, ids)
    elif weights is not None:
        by = weights
    elif logits is not None:
        by = logits.gather(1, ids)
    else:
        return Choice(ids, None, None)
    order = by.double().sort(dim=-1, descending=True, stable=True).indices
    return Choice(
        ids.gather(1, order),
        None if weights is None else weights.gather(1, order),
        logits,
        is_guess=is_guess,
    )
