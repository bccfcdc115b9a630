"""Trains a predictor from traces. What needs PyTorch is imported when it is called."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moerun import __version__
from moerun.arguments import check_int, check_number, shown
from moerun.errors import InvalidArgumentError, UnsupportedModelError
from moerun.identity import ModelIdentity
from moerun.metrics.groups import num_threads
from moerun.predictor.files import PredictorInfo, write_predictor
from moerun.predictor.sequences import (
    RoutedSequence,
    RoutingSizes,
    Traces,
    check_sizes,
    opened_traces,
    read_sequences,
    sizes_of,
)
from moerun.predictor.shape import NetShape, default_shape
from moerun.user_files import user_path

if TYPE_CHECKING:
    from moerun.predictor.optimizer import Fit

EPOCHS = 12
PATIENCE = 3
HELD_OUT = 0.1


@dataclass(frozen=True)
class TrainingProgress:
    """How far training is.

    Attributes:
        step: steps done.
        steps: steps in all, if it does not stop early.
        epoch: passes over the sequences done.
        loss: mean binary cross entropy of the last steps, None before the first.
        validation_loss: of the held-out sequences, when last measured; None before.
        recall: of the held-out sequences' experts, by as many named as a token uses.
    """

    step: int
    steps: int
    epoch: int
    loss: float | None
    validation_loss: float | None
    recall: float | None


@dataclass(frozen=True)
class TrainingResult:
    """What came of training.

    Attributes:
        path: the file.
        info: what it says about itself; `info.training` has losses and recall.
        seconds: that it took.
        stopped_early: the held-out sequences got no better any more.
    """

    path: Path
    info: PredictorInfo
    seconds: float
    stopped_early: bool


def train(
    traces: Traces,
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    domains: Sequence[str] | None = None,
    shape: NetShape | None = None,
    seed: int = 0,
    epochs: int = EPOCHS,
    max_steps: int | None = None,
    held_out: float = HELD_OUT,
    patience: int = PATIENCE,
    learning_rate: float = 2e-3,
    threads: int | None = None,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Train a predictor and write it; Ctrl-C, or an exception in `progress`, leaves no file.

    The same traces, arguments, machine, PyTorch and number of threads give the same bytes.

    Args:
        traces: one or several of the model, with token ids.
        output: the file; one that is there is replaced.
        model: whose traces these are, as for `moerun.Model.load`: its small files say what the
            predictor is for.
        domains: learn from these only; None for all.
        shape: sizes of the net; None for `default_shape`.
        seed: of the first weights, the held-out sequences and the order.
        epochs: passes over the sequences, at most.
        max_steps: steps, at most; None for what the epochs need.
        held_out: share of each domain's sequences that is not learned from but tells when to stop.
        patience: epochs without a better held-out loss before training ends.
        learning_rate: at its highest.
        threads: number of CPU threads; None for one a core.
        progress: called after every step and every measurement.

    Raises:
        UnsupportedModelError: PyTorch is not installed.
        InvalidArgumentError: an argument is out of its range, or the traces are not of the model.
        FormatError, FileError: a trace cannot be read or holds wrong ids, or the file cannot be
            written.
    """
    fit = _imported()
    workers = num_threads(threads)
    opened = opened_traces(traces)
    facts = ModelIdentity(model)
    sizes = sizes_of(opened[0])
    if len(sizes.moe_layers) == facts.num_moe_layers:
        model_sizes = RoutingSizes(sizes.moe_layers, facts.num_experts, facts.top_k)
    else:
        layers = tuple(range(facts.num_moe_layers))
        model_sizes = RoutingSizes(layers, facts.num_experts, facts.top_k)
    check_sizes(opened, model_sizes, f"the model {facts.directory} (-m names another)")
    known = list(dict.fromkeys(domain for trace in opened for domain in trace.domains))
    chosen = known if domains is None else list(dict.fromkeys(domains))
    if unknown := [domain for domain in chosen if domain not in known]:
        raise InvalidArgumentError(
            f"domains: expected some of {', '.join(known)}, found {unknown[0]!r}"
        )
    seed = check_int("seed", seed, 0, 2**63 - 1)
    share = check_number("held_out", held_out, 0, 0.9, above_minimum=True)
    if shape is not None and not isinstance(shape, NetShape):
        raise InvalidArgumentError(f"shape must be a NetShape, not {shown(shape)}")

    sequences = [each for each in read_sequences(opened, facts.vocab_size) if each.domain in chosen]
    learned, checked = split(sequences, share, seed)
    outputs = len(sizes.moe_layers) * sizes.num_experts
    sizes_of_net = default_shape(facts.vocab_size, outputs) if shape is None else shape
    started = time.perf_counter()
    done = fit(
        learned,
        checked,
        sizes_of_net,
        vocab_size=facts.vocab_size,
        num_experts=sizes.num_experts,
        seed=seed,
        epochs=check_int("epochs", epochs, 1, 10_000),
        max_steps=None if max_steps is None else check_int("max_steps", max_steps, 1, 10**9),
        patience=check_int("patience", patience, 1, 10_000),
        learning_rate=check_number("learning_rate", learning_rate, 0, 1, above_minimum=True),
        threads=workers,
        progress=progress or (lambda _: None),
    )
    info = PredictorInfo(
        model=facts.name,
        model_id=facts.model_id,
        tokenizer_hash=facts.tokenizer_hash,
        vocab_size=facts.vocab_size,
        moe_layers=sizes.moe_layers,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        shape=sizes_of_net,
        training={
            "created_by": f"moerun {__version__}",
            "seed": seed,
            "steps": done.steps,
            "epochs": done.epochs,
            "sequences": len(learned),
            "tokens": sum(each.num_tokens for each in learned),
            "held_out_sequences": len(checked),
            "held_out_tokens": sum(each.num_tokens for each in checked),
            "domains": chosen,
            "validation_loss": round(done.validation_loss, 6),
            "recall": round(done.recall, 6),
        },
        trained_sequences=np.array(sorted({each.hash for each in learned}), np.int64),
    )
    write_predictor(output, info, done.weights)
    seconds = time.perf_counter() - started
    return TrainingResult(user_path(output), info, seconds, done.stopped_early)


def split(
    sequences: Sequence[RoutedSequence], share: float, seed: int
) -> tuple[list[RoutedSequence], list[RoutedSequence]]:
    """Divide sequences in those to learn from and those held out, the same share of each domain.

    Raises:
        InvalidArgumentError: there are too few for both.
    """
    random = np.random.default_rng(seed)
    is_held_out = np.zeros(len(sequences), np.bool_)
    for domain in dict.fromkeys(each.domain for each in sequences):
        members = np.array([i for i, each in enumerate(sequences) if each.domain == domain])
        count = min(len(members) - 1, max(1, round(share * len(members))))
        is_held_out[random.permutation(members)[:count]] = True
    learned = [each for each, out in zip(sequences, is_held_out, strict=True) if not out]
    hashes = {each.hash for each in learned}
    checked = [
        each
        for each, out in zip(sequences, is_held_out, strict=True)
        if out and each.hash not in hashes
    ]
    if not learned or not checked:
        raise InvalidArgumentError(
            f"traces: expected at least two different sequences of a domain, one of which is held "
            f"out, found {len(sequences)} in all; record more with moe-trace record"
        )
    return learned, checked


def _imported() -> Callable[..., Fit]:
    try:
        from moerun.predictor.optimizer import fit
    except ImportError as error:
        raise UnsupportedModelError(
            f"training a predictor needs PyTorch, and it cannot be imported: {error}. Install it "
            "with: pip install 'moerun[predictor]'"
        ) from error
    return fit
