"""The loop that trains the net: steps, the held-out loss, and when to stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from moerun.predictor.files import bf16_rounded
from moerun.predictor.net import PathNet
from moerun.predictor.sequences import RoutedSequence
from moerun.predictor.shape import NetShape
from moerun.predictor.training import TrainingProgress

_PIECE = 256  # tokens; longer sequences are cut
_PIECES_A_STEP = 16
_WARM_UP = 0.05  # of all steps
_LAST_RATE = 0.05  # of the highest
_WEIGHT_DECAY = 0.05
_DROPOUT = 0.1
_SMOOTHING = 0.05  # of the loss that is shown


@dataclass(frozen=True)
class Fit:
    """The weights with the best held-out loss, matrices rounded as they are stored."""

    weights: dict[str, NDArray[np.float32]]
    steps: int
    epochs: int
    validation_loss: float
    recall: float
    stopped_early: bool


@dataclass(frozen=True)
class _Piece:
    """Up to `_PIECE` tokens of a sequence, padded to that many."""

    tokens: NDArray[np.int64]  # (T)
    experts: NDArray[np.int64]  # (T, L, k); padding uses expert 0
    length: int


def fit(
    learned: Sequence[RoutedSequence],
    checked: Sequence[RoutedSequence],
    shape: NetShape,
    *,
    vocab_size: int,
    num_experts: int,
    seed: int,
    epochs: int,
    max_steps: int | None,
    patience: int,
    learning_rate: float,
    threads: int,
    progress: Callable[[TrainingProgress], None],
) -> Fit:
    """Train a net on some sequences until others get no better."""
    pieces, held_out = _pieces(learned), _pieces(checked)
    layers = learned[0].expert_ids.shape[0]
    steps_an_epoch = -(-len(pieces) // _PIECES_A_STEP)
    steps = steps_an_epoch * epochs
    if max_steps is not None:
        steps = min(steps, max_steps)
    random = np.random.default_rng(seed)
    with _repeatable(seed, threads):
        net = PathNet(shape, vocab_size, layers * num_experts, _DROPOUT)
        _start_from_frequencies(net, pieces, num_experts)
        optimizer = torch.optim.AdamW(_groups(net), lr=learning_rate, betas=(0.9, 0.98))
        best: tuple[float, float, dict[str, NDArray[np.float32]]] | None = None
        loss_shown: float | None = None
        step = epoch = without_gain = 0
        while step < steps and without_gain < patience:
            order = random.permutation(len(pieces))
            for first in range(0, len(order), _PIECES_A_STEP):
                batch = [pieces[i] for i in order[first : first + _PIECES_A_STEP]]
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * _rate(step, steps)
                loss = _step(net, optimizer, batch, num_experts)
                step += 1
                loss_shown = (
                    loss if loss_shown is None else loss_shown + _SMOOTHING * (loss - loss_shown)
                )
                progress(_progress(step, steps, epoch, loss_shown, best))
                if step == steps:
                    break
            epoch += 1
            found = _measured(net, held_out, num_experts)
            if best is None or found[0] < best[0]:
                best, without_gain = found, 0
            else:
                without_gain += 1
            progress(_progress(step, steps, epoch, loss_shown, best))
    assert best is not None
    return Fit(best[2], step, epoch, best[0], best[1], step < steps)


@contextlib.contextmanager
def _repeatable(seed: int, threads: int) -> Iterator[None]:
    """Make what runs in the block depend on the seed alone; leave PyTorch as it was."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])


def _pieces(sequences: Sequence[RoutedSequence]) -> list[_Piece]:
    found = []
    for sequence in sequences:
        for first in range(0, sequence.num_tokens, _PIECE):
            ids = sequence.token_ids[first : first + _PIECE]
            experts = sequence.expert_ids[:, first : first + _PIECE].transpose(1, 0, 2)
            tokens = np.zeros(_PIECE, np.int64)
            routed = np.zeros((_PIECE, *experts.shape[1:]), np.int64)
            tokens[: len(ids)], routed[: len(ids)] = ids, experts
            found.append(_Piece(tokens, routed, len(ids)))
    return found


def _arrays(
    batch: Sequence[_Piece], num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids (B, T), used experts (B, T, L * E) as 0 or 1, and tokens that count."""
    longest = max(piece.length for piece in batch)
    tokens = torch.from_numpy(np.stack([piece.tokens[:longest] for piece in batch]))
    experts = torch.from_numpy(np.stack([piece.experts[:longest] for piece in batch]))
    used = torch.zeros(*experts.shape[:3], num_experts).scatter_(3, experts, 1.0)
    lengths = torch.tensor([piece.length for piece in batch])
    return tokens, used.flatten(2), torch.arange(longest)[None, :] < lengths[:, None]


def _step(
    net: PathNet, optimizer: torch.optim.Optimizer, batch: Sequence[_Piece], num_experts: int
) -> float:
    tokens, used, counts = _arrays(batch, num_experts)
    net.train()
    logits = net(tokens)
    loss = functional.binary_cross_entropy_with_logits(logits[counts], used[counts])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _measured(
    net: PathNet, held_out: Sequence[_Piece], num_experts: int
) -> tuple[float, float, dict[str, NDArray[np.float32]]]:
    """Return loss and recall of the weights as they would be stored, and those weights."""
    own = net.weights()
    stored = {
        name: bf16_rounded(each) if each.ndim == 2 else each.copy() for name, each in own.items()
    }
    net.load(stored)
    net.eval()
    loss, hits, num_used, num_tokens = 0.0, 0, 0, 0
    with torch.no_grad():
        for first in range(0, len(held_out), _PIECES_A_STEP):
            batch = held_out[first : first + _PIECES_A_STEP]
            tokens, used, counts = _arrays(batch, num_experts)
            logits, used = net(tokens)[counts], used[counts]
            outputs = functional.binary_cross_entropy_with_logits(logits, used, reduction="none")
            loss += float(outputs.mean(dim=1).sum(dtype=torch.float64))
            num_tokens += len(logits)
            top_k = batch[0].experts.shape[2]
            by_layer = (len(logits), -1, num_experts)
            named = logits.view(by_layer).topk(top_k, dim=2).indices
            hits += int(used.view(by_layer).gather(2, named).sum(dtype=torch.float64))
            num_used += int(used.sum(dtype=torch.float64))
    net.load(own)
    return loss / num_tokens, hits / num_used, stored


def _start_from_frequencies(net: PathNet, pieces: Sequence[_Piece], num_experts: int) -> None:
    """Let the biases say how often each expert is used, and the head nothing yet."""
    layers = pieces[0].experts.shape[1]
    counts = np.zeros((layers, num_experts))
    tokens = 0
    for piece in pieces:
        tokens += piece.length
        for layer in range(layers):
            ids = piece.experts[: piece.length, layer].ravel()
            counts[layer] += np.bincount(ids, minlength=num_experts)
    rates = ((counts + 0.5) / (tokens + 1)).ravel()
    with torch.no_grad():
        net.head.bias.copy_(torch.from_numpy(np.log(rates / (1 - rates))).float())
        torch.nn.init.normal_(net.head.weight, std=0.02)


def _groups(net: PathNet) -> list[dict[str, Any]]:
    """Matrices are held small, norms and biases are not."""
    matrices = [each for each in net.parameters() if each.ndim == 2]
    vectors = [each for each in net.parameters() if each.ndim != 2]
    return [
        {"params": matrices, "weight_decay": _WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _rate(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: a rise, then half a cosine."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def _progress(
    step: int,
    steps: int,
    epoch: int,
    loss: float | None,
    best: tuple[float, float, dict[str, NDArray[np.float32]]] | None,
) -> TrainingProgress:
    measured = (None, None) if best is None else best[:2]
    return TrainingProgress(step, steps, epoch, loss, *measured)
