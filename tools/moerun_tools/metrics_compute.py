"""Computes everything that moe-metrics shows of a trace, stage after stage."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from tqdm import tqdm  # type: ignore[import-untyped]

from moerun import metrics
from moerun.errors import MoerunWarning
from moerun.trace import Trace
from moerun_tools.metrics_published import GROUP_LENGTH
from moerun_tools.metrics_results import (
    POLICIES,
    POLICY_NAMES,
    TraceFacts,
    TraceMetrics,
    clean_text,
)


@dataclass(frozen=True)
class Settings:
    """What a person may choose about the computation."""

    segment_lengths: tuple[int, ...] = (4, 16, 64, 256)
    bootstrap: int = 1000
    seed: int = 0
    threads: int | None = None


_Function = Callable[[Trace, Settings], pl.DataFrame]


@dataclass(frozen=True)
class _Stage:
    """One call of `moerun.metrics`: rows of a table, and what the progress bar calls it."""

    table: str
    name: str
    compute: _Function
    is_detail: bool = False  # only files and figures want it


def _srp(level: str) -> _Function:
    def compute(trace: Trace, settings: Settings) -> pl.DataFrame:
        # Thousands of experts, each with few windows: their intervals would say little, slowly.
        draws = 0 if level == "expert" else settings.bootstrap
        return metrics.srp(
            trace,
            settings.segment_lengths,
            level,
            bootstrap=draws,
            seed=settings.seed,
            by_domain=len(trace.domain_names) > 1,
            threads=settings.threads,
        )

    return compute


def _hit_rate(policy: str, level: str) -> _Function:
    def compute(trace: Trace, settings: Settings) -> pl.DataFrame:
        return metrics.hit_rate(
            trace,
            policy,
            level=level,
            bootstrap=settings.bootstrap if level == "mean" else 0,
            seed=settings.seed,
            threads=settings.threads,
        )

    return compute


def _chance_hit_rate(trace: Trace, settings: Settings) -> pl.DataFrame:
    return metrics.chance_hit_rate(trace, POLICIES, threads=settings.threads)


def _activation_rates(trace: Trace, _: Settings) -> pl.DataFrame:
    return metrics.activation_rates(trace, by_domain=len(trace.domain_names) > 1)


def _specialization(trace: Trace, _: Settings) -> pl.DataFrame:
    return metrics.specialization(trace)


def _load_balance(trace: Trace, settings: Settings) -> pl.DataFrame:
    return metrics.load_balance(
        trace,
        settings.segment_lengths,
        by_domain=len(trace.domain_names) > 1,
        threads=settings.threads,
    )


def _predictability(trace: Trace, settings: Settings) -> pl.DataFrame:
    return metrics.predictability(
        trace, by_domain=len(trace.domain_names) > 1, threads=settings.threads
    )


_STAGES = [
    *(
        _Stage("srp", f"SRP, {level} level", _srp(level), level != "model")
        for level in ("model", "layer", "expert")
    ),
    *(
        _Stage(
            "hit_rate",
            f"{POLICY_NAMES[policy]} hit rates, {level} level",
            _hit_rate(policy, level),
            level != "mean",
        )
        for policy in POLICIES
        for level in ("mean", "layer", "model")
    ),
    _Stage("chance_hit_rate", "hit rates by chance", _chance_hit_rate),
    _Stage("activation_rates", "activation rates", _activation_rates, is_detail=True),
    _Stage("specialization", "specialisation", _specialization),
    _Stage("load_balance", "load balance", _load_balance),
    _Stage("predictability", "predictability", _predictability),
]


def open_traces(paths: Sequence[str]) -> list[tuple[str, Trace]]:
    """Open all traces and give each a short name, before anything is computed."""
    return _labelled([Trace.open(path) for path in paths])


def compute(
    label: str, trace: Trace, settings: Settings, progress: Progress, *, with_details: bool
) -> TraceMetrics:
    """Return the metrics of one trace; without details, what the printed tables show."""
    parts: dict[str, list[pl.DataFrame]] = {}
    verdict = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MoerunWarning)
        for stage in stages(with_details):
            progress.start(f"{clean_text(label, 20)}: {stage.name}")
            parts.setdefault(stage.table, []).append(stage.compute(trace, settings))
        progress.start(f"{clean_text(label, 20)}: verdict")
        if trace.max_length >= GROUP_LENGTH:
            verdict = metrics.verdict(
                trace, bootstrap=settings.bootstrap, seed=settings.seed, threads=settings.threads
            )
    facts = TraceFacts.of(trace)
    if verdict is not None:
        verdict = dataclasses.replace(verdict, model=facts.model)
    told = [str(each.message) for each in caught if issubclass(each.category, MoerunWarning)]
    if verdict is None:
        told.append(
            f"no verdict on {label}: it needs sequences of at least {GROUP_LENGTH} tokens, the "
            f"longest has {trace.max_length}"
        )
    return TraceMetrics(
        label=label,
        facts=facts,
        verdict=verdict,
        tables={name: pl.concat(frames) for name, frames in parts.items()},
        warnings=tuple(clean_text(text, 500) for text in dict.fromkeys(told)),
    )


def stages(with_details: bool) -> list[_Stage]:
    """Return what is computed of each trace, before the verdict."""
    return [stage for stage in _STAGES if with_details or not stage.is_detail]


class Progress:
    """A bar on standard error, one step a stage; elsewhere than at a terminal few lines."""

    def __init__(self, num_stages: int, quiet: bool) -> None:
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=num_stages,
            delay=0 if self._is_terminal else 1,
            mininterval=0.1 if self._is_terminal else 5,
            bar_format="{desc:<44} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            leave=False,
            disable=quiet or sys.stderr is None,
        )
        self._is_running = False

    def start(self, stage: str) -> None:
        """Say that a stage begins, and so that the one before it is done."""
        if self._is_running:
            self._bar.update()
        self._is_running = True
        self._bar.set_description_str(stage, refresh=self._is_terminal)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def _labelled(traces: Sequence[Trace]) -> list[tuple[str, Trace]]:
    """Name each trace by its file, with the folder before it or a number where names meet."""
    stems = [_stem(trace) for trace in traces]
    labels: list[str] = []
    for stem, trace in zip(stems, traces, strict=True):
        label = stem
        if stems.count(stem) > 1:
            folder = trace.files[0].absolute().parent
            if folder != Path.home():  # whose name is that of a person
                label = clean_text(f"{folder.name}/{stem}")
        number = 2
        unique = label
        while unique in labels:
            unique, number = f"{label} ({number})", number + 1
        labels.append(unique)
    return list(zip(labels, traces, strict=True))


def _stem(trace: Trace) -> str:
    stem = Path(trace.files[0]).name.removesuffix(".safetensors")
    first, middle, last = stem.rpartition("-of-")
    if middle and last.isdigit():  # a shard: t-00001-of-00003
        stem = first.rpartition("-")[0] or stem
    return clean_text(stem)
