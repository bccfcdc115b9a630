"""How well a predictor names the experts of a batch, beside simpler ways to guess."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moerun.arguments import check_int, shown
from moerun.errors import InvalidArgumentError
from moerun.predictor.baselines import BASELINES, Frequencies, guesses, likeliest
from moerun.predictor.inference import PathPredictor
from moerun.predictor.sequences import (
    RoutedSequence,
    RoutingSizes,
    Traces,
    activity,
    check_sizes,
    opened_traces,
    read_sequences,
)

BATCH_SIZES = (1, 4, 16)
_BINS = 20  # of the calibration
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.int64)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation has found.

    Attributes:
        recall: columns `batch_size`, `domain` (null: batches of all domains mixed), `layer` (null:
            all layers), `predictor`, `recall`, `precision`, `batch_accuracy`; docs/predictor.md
            defines them. `predictor` is "path" for the one that is measured, "path_batch" for
            the same one where it names for the batch as a whole.
        calibration: columns `low`, `high` (of a bin of predicted probabilities), `count`,
            `predicted`, `observed` (means in the bin; null without any).
        calibration_error: mean distance of the two, weighted by count.
        domains: sequences measured, by domain.
        trained_domains: what the predictor has learned from.
        num_sequences: measured.
        num_tokens: of these; the first token of a sequence is not measured.
        num_skipped: sequences that the predictor was trained on: they are not measured.
        baselines_from: what the baselines learned from: "trained sequences" or "other half".
        left_out: why something is not in the tables, for people.
    """

    recall: pl.DataFrame
    calibration: pl.DataFrame
    calibration_error: float
    domains: dict[str, int]
    trained_domains: list[str]
    num_sequences: int
    num_tokens: int
    num_skipped: int
    baselines_from: str
    left_out: list[str] = field(default_factory=list)


def evaluate(
    predictor: PathPredictor | str | os.PathLike[str],
    traces: Traces,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a predictor on the sequences of traces that it was not trained on.

    Args:
        predictor: opened, or its file.
        traces: one or several of its model. Sequences it was trained on only teach the baselines.
        batch_sizes: sequences that decode together.
        seed: of the order in which sequences are put together.
        threads: number of CPU threads; None for one a core. Not for an opened predictor.
        progress: called with the sequences done and in all.

    Raises:
        InvalidArgumentError: every sequence was trained on, or the traces are of another model.
        As `PathPredictor.open` and `Trace.open`, besides.
    """
    if not isinstance(predictor, PathPredictor):
        predictor = PathPredictor.open(predictor, threads=threads)
    sizes = [check_int("a batch size", size, 1, 4096) for size in batch_sizes]
    if not sizes:
        raise InvalidArgumentError(
            f"batch_sizes: expected at least one, found {shown(batch_sizes)}"
        )
    info = predictor.info
    opened = opened_traces(traces)
    expected = RoutingSizes(info.moe_layers, info.num_experts, info.top_k)
    check_sizes(opened, expected, f"the predictor {predictor.path}")
    everything = read_sequences(opened, info.vocab_size)
    trained = set(info.trained_sequences.tolist())
    learned = [each for each in everything if each.hash in trained]
    measured = [each for each in everything if each.hash not in trained and each.num_tokens > 1]
    if not measured:
        why = (
            "the predictor was trained on all of them, and would look better than it is"
            if learned
            else "every one has a single token"
        )
        raise InvalidArgumentError(
            f"traces: expected sequences to measure, found none: {why}; give a trace of other text"
        )
    order = np.random.default_rng(seed).permutation(len(measured))
    results = list(_computed(predictor, [measured[i] for i in order], learned, progress))
    recall, left_out = _recall_table(results, sizes, info.moe_layers, info.top_k)
    calibration, error = _calibration_table(results)
    counts: dict[str, int] = {}
    for each in measured:
        counts[each.domain] = counts.get(each.domain, 0) + 1
    domains = info.training.get("domains")
    return Evaluation(
        recall=recall,
        calibration=calibration,
        calibration_error=error,
        domains=counts,
        trained_domains=[str(name) for name in domains] if isinstance(domains, list) else [],
        num_sequences=len(measured),
        num_tokens=sum(each.num_tokens - 1 for each in measured),
        num_skipped=len(learned),
        baselines_from="trained sequences" if learned else "other half",
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Result:
    """One sequence without its first token; experts are bits (L, T, E / 8)."""

    domain: str
    used: NDArray[np.uint8]
    named: dict[str, NDArray[np.uint8]]
    probabilities: NDArray[np.float32]  # (L, T, E)
    bins: NDArray[np.float64]  # (3, bins): count, sum predicted, sum observed


def _computed(
    predictor: PathPredictor,
    measured: Sequence[RoutedSequence],
    learned: Sequence[RoutedSequence],
    progress: Callable[[int, int], None] | None,
) -> Iterator[_Result]:
    info = predictor.info
    layers, experts = len(info.moe_layers), info.num_experts
    teachers: list[Frequencies | None] = [None, None]
    if learned:
        teachers = [Frequencies(learned, layers, experts)] * 2
    elif len(measured) > 1:  # each half learns from the other one
        teachers = [Frequencies(measured[1 - half :: 2], layers, experts) for half in (0, 1)]
    for index, sequence in enumerate(measured):
        used = activity(sequence.expert_ids, experts)
        probabilities = predictor.predict(sequence.token_ids).transpose(1, 0, 2)
        named = {"path": likeliest(probabilities, info.top_k)}
        named |= guesses(sequence, used, teachers[index % 2])
        yield _Result(
            sequence.domain,
            np.packbits(used[:, 1:], axis=2),
            {name: np.packbits(each[:, 1:], axis=2) for name, each in named.items()},
            np.ascontiguousarray(probabilities[:, 1:]),
            _binned(probabilities[:, 1:], used[:, 1:]),
        )
        if progress is not None:
            progress(index + 1, len(measured))


def _binned(probabilities: NDArray[np.float32], used: NDArray[np.bool_]) -> NDArray[np.float64]:
    flat = probabilities.ravel().astype(np.float64)
    bins = np.minimum((flat * _BINS).astype(np.int64), _BINS - 1)
    return np.stack(
        [
            np.bincount(bins, minlength=_BINS),
            np.bincount(bins, flat, _BINS),
            np.bincount(bins, used.ravel().astype(np.float64), _BINS),
        ]
    )


def _calibration_table(results: Sequence[_Result]) -> tuple[pl.DataFrame, float]:
    count, predicted, observed = np.sum([result.bins for result in results], axis=0)
    filled = np.maximum(1, count)
    edges = np.arange(_BINS + 1) / _BINS
    frame = pl.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "count": count.astype(np.int64),
            "predicted": [p / n if n else None for p, n in zip(predicted, count, strict=True)],
            "observed": [o / n if n else None for o, n in zip(observed, count, strict=True)],
        },
        schema_overrides={"predicted": pl.Float64, "observed": pl.Float64},
    )
    error = float((np.abs(predicted - observed) / filled * count).sum() / count.sum())
    return frame, error


def _recall_table(
    results: Sequence[_Result], batch_sizes: Sequence[int], layers: Sequence[int], top_k: int
) -> tuple[pl.DataFrame, list[str]]:
    domains = list(dict.fromkeys(result.domain for result in results))
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    names = [name for name in BASELINES if all(name in result.named for result in results)]
    for size in dict.fromkeys(batch_sizes):
        for domain in [None, *(domains if len(domains) > 1 else [])]:
            members = [each for each in results if domain is None or each.domain == domain]
            if len(members) < size:
                where = "" if domain is None else f" of {domain}"
                left_out.append(f"batch {size}{where} (only {len(members)} sequences)")
                continue
            rows += _rows(members, size, domain, ["path", *names], layers, top_k)
    schema = {
        "batch_size": pl.Int32,
        "domain": pl.String,
        "layer": pl.Int32,
        "predictor": pl.String,
        "recall": pl.Float64,
        "precision": pl.Float64,
        "batch_accuracy": pl.Float64,
    }
    return pl.DataFrame(rows, schema=schema), left_out


def _rows(
    members: Sequence[_Result],
    size: int,
    domain: str | None,
    names: Sequence[str],
    layers: Sequence[int],
    top_k: int,
) -> Iterator[dict[str, Any]]:
    """Add up full batches of `size` sequences, which step together until the shortest ends."""
    own, names = names, ["path", "path_batch", *names[1:]]
    num_used = np.zeros(len(layers), np.int64)
    num_named = {name: np.zeros(len(layers), np.int64) for name in names}
    num_right = {name: np.zeros(len(layers), np.int64) for name in names}
    num_best = np.zeros(len(layers), np.int64)
    for first in range(0, len(members) - size + 1, size):
        batch = members[first : first + size]
        steps = min(each.used.shape[1] for each in batch)
        used = _union([each.used[:, :steps] for each in batch])
        num_used += _ONES[used].sum(axis=(1, 2))
        sets = {name: _union([each.named[name][:, :steps] for each in batch]) for name in own}
        sets["path_batch"], best = _of_batch(batch, steps, used, top_k)
        num_best += best
        for name, named in sets.items():
            num_named[name] += _ONES[named].sum(axis=(1, 2))
            num_right[name] += _ONES[named & used].sum(axis=(1, 2))
    is_known = {name: num_named[name] > 0 for name in names}
    for name in names:
        accuracy = num_best / num_used if name == "path" else None
        for row, layer in enumerate(layers):
            if is_known[name][row]:
                yield {
                    "batch_size": size,
                    "domain": domain,
                    "layer": layer,
                    "predictor": name,
                    "recall": num_right[name][row] / num_used[row],
                    "precision": num_right[name][row] / num_named[name][row],
                    "batch_accuracy": None if accuracy is None else accuracy[row],
                }
        known = is_known[name]
        if known.any():
            yield {
                "batch_size": size,
                "domain": domain,
                "layer": None,
                "predictor": name,
                "recall": num_right[name][known].sum() / num_used[known].sum(),
                "precision": num_right[name][known].sum() / num_named[name][known].sum(),
                "batch_accuracy": None if accuracy is None else num_best.sum() / num_used.sum(),
            }


def _of_batch(
    batch: Sequence[_Result], steps: int, used: NDArray[np.uint8], top_k: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return what is named for a batch as a whole, and for each layer how many of the used experts
    are among the so many with the highest summed probability."""
    shape = (used.shape[0], steps, batch[0].probabilities.shape[2])
    summed, unused = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    for each in batch:
        probabilities = each.probabilities[:, :steps]
        summed += probabilities
        unused *= 1 - probabilities
    experts = np.arange(shape[2])
    # As many as the batch is expected to use, those that it most probably uses.
    expected = np.clip(np.rint((1 - unused).sum(axis=2, keepdims=True)), top_k, shape[2])
    named = np.zeros(shape, np.bool_)
    np.put_along_axis(named, np.argsort(unused, axis=2, kind="stable"), experts < expected, axis=2)
    is_used = np.unpackbits(used, axis=2, count=shape[2]).astype(np.bool_)
    in_order = np.take_along_axis(is_used, np.argsort(-summed, axis=2, kind="stable"), axis=2)
    best: NDArray[np.int64] = (in_order & (experts < is_used.sum(axis=2, keepdims=True))).sum(
        axis=(1, 2)
    )
    return np.packbits(named, axis=2), best


def _union(parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    result: NDArray[np.uint8] = np.bitwise_or.reduce(np.stack(parts), axis=0)
    return result
