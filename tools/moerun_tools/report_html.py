"""Writes the report: one HTML file with its pictures and style, which loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moerun_tools import report_text
from moerun_tools.metrics_published import GROUPS
from moerun_tools.metrics_results import TraceMetrics, clean_text, without_folders
from moerun_tools.metrics_table import cache_cell
from moerun_tools.palette import DARK, LIGHT, style_variables
from moerun_tools.report_sections import sections
from moerun_tools.units import as_binary, counted

_MOST_ENTRIES = 60  # of a trace's metadata
_MOST_DOMAINS = 40
_COMPARISON = (
    "trace",
    "group",
    "SRP(16)",
    "SRP by chance",
    "cache",
    "experts",
    "LRU",
    "hits by chance",
    "most used",
    "at best",
    "study's group",
    "model",
    "layers x experts",
)
_GROUP_ZONES = {group.name: number for number, group in enumerate(GROUPS, start=1)}


def report(
    results: Sequence[TraceMetrics],
    pictures: Mapping[str, str],
    settings: Mapping[str, Any],
    left_out: Sequence[str],
) -> str:
    """Return the report on traces, the best first.

    Args:
        results: the traces.
        pictures: SVG elements by the name of their figure; may lack some, or all.
        settings: how the metrics were computed.
        left_out: sentences on what could not be shown.
    """
    environment = Environment(
        loader=PackageLoader("moerun_tools"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown, empty = sections(results)
    page = environment.get_template("report.html").render(
        title=_title(results),
        headline=_headline(results),
        costs=[(result.label, report_text.cost(result)) for result in results],
        is_single=len(results) == 1,
        badge=_badge(results[0]),
        zone=_zone(results[0]),
        key_numbers=_key_numbers(results[0]) if len(results) == 1 else [],
        columns=_COMPARISON,
        comparison=[] if len(results) == 1 else [_comparison_row(result) for result in results],
        sections=shown,
        pictures={name: Markup(svg) for name, svg in pictures.items()},
        light=Markup(style_variables(LIGHT)),
        dark=Markup(style_variables(DARK)),
        recordings=[_recording(result) for result in results],
        settings=[(name, _shown(value)) for name, value in settings.items()],
        left_out=[*left_out, *empty],
    )
    return page.encode("utf-8", "replace").decode()


def _title(results: Sequence[TraceMetrics]) -> str:
    if len(results) == 1:
        return f"Expert routing of {results[0].facts.model}"
    return f"Expert routing of {len(results)} traces"


def _headline(results: Sequence[TraceMetrics]) -> str:
    count = len(results)
    first = report_text.headline(results[0], count)
    known = [result for result in results if result.group is not None]
    if len(known) < 2:
        return first
    best, last = known[0], known[-1]
    return (
        f"Of {count} traces, {best.name(count)} is the farthest above chance and "
        f"{last.name(count)} the least. {first}"
    )


def _zone(result: TraceMetrics) -> int:
    """Return the number of a group's colour; 0 without a verdict."""
    return 0 if result.group is None else _GROUP_ZONES[result.group]


def _badge(result: TraceMetrics) -> str:
    if result.group is None:
        return "no verdict"
    return "suits offloading" if result.group == "suits" else f"{result.group} for offloading"


def _key_numbers(result: TraceMetrics) -> list[tuple[str, str, str]]:
    """Return (name, value, what to add) of the numbers that matter most."""
    verdict, facts = result.verdict, result.facts
    if verdict is None:
        return []
    low, high = verdict.srp_ci_low, verdict.srp_ci_high
    interval = "" if low is None or high is None else f"; 95%: {low:.3f} to {high:.3f}"
    capacity = f"{verdict.capacity} of {facts.num_experts}"
    ratio = f"\N{GREEK SMALL LETTER RHO} = {verdict.cache_ratio:.3g}"
    memory = (
        f"{verdict.cache_fraction:.0%}; bytes are not recorded"
        if verdict.cache_bytes is None
        else f"{as_binary(verdict.cache_bytes)} of {as_binary(verdict.total_bytes)}"
    )
    cache = {
        "cache": ("Cache", capacity, f"experts a layer, {ratio}: {memory}"),
        "static": ("Static set", capacity, f"the most used experts of each layer: {memory}"),
        "none": ("Cache", "none", "is recommended"),
    }
    return [
        (
            "SRP at 16 tokens",
            f"{verdict.srp:.3f}",
            f"by chance {verdict.srp_chance:.3f}, with even use "
            f"{verdict.srp_chance_even:.3f}{interval}",
        ),
        (
            "Over chance",
            f"{100 * verdict.srp_gain:+.1f}",
            f"points of SRP; the study, by SRP alone: {verdict.study_group}",
        ),
        cache[verdict.advice],
        (
            f"Hits, {capacity} experts",
            f"{verdict.lru_hit_rate:.0%}",
            f"LRU; {verdict.chance_hit_rate:.0%} by chance, LFU {verdict.lfu_hit_rate:.0%}, most "
            f"used {verdict.static_hit_rate:.0%}, at best {verdict.best_hit_rate:.0%}",
        ),
    ]


def _comparison_row(result: TraceMetrics) -> dict[str, Any]:
    verdict, facts = result.verdict, result.facts
    cells = ["-"] * (len(_COMPARISON) - 4)
    if verdict is not None:
        cells = [
            f"{verdict.srp:.3f}",
            f"{verdict.srp_chance:.3f}",
            cache_cell(verdict),
            f"{verdict.capacity} ({verdict.cache_fraction:.0%})",
            f"{verdict.lru_hit_rate:.0%}",
            f"{verdict.chance_hit_rate:.0%}",
            f"{verdict.static_hit_rate:.0%}",
            f"{verdict.best_hit_rate:.0%}",
            verdict.study_group,
        ]
    return {
        "label": result.label,
        "zone": _zone(result),
        "group": result.group or "no verdict",
        "cells": [
            *cells,
            facts.model,
            f"{len(facts.moe_layers)} x {facts.num_experts}, {facts.top_k} used",
        ],
    }


def _recording(result: TraceMetrics) -> dict[str, Any]:
    """Return what a trace says about how it was made."""
    facts = result.facts
    entries = [
        ("files", _listed(facts.files, 4)),
        ("model", facts.model),
        (
            "experts",
            f"{counted(len(facts.moe_layers), 'layer')} of {facts.num_experts}, "
            f"{facts.top_k} a token",
        ),
        ("sequences", f"{facts.num_sequences} of {facts.lengths} tokens"),
        ("tokens", f"{facts.num_tokens:,}"),
        (
            "sequences by domain",
            _listed([f"{name} {n}" for name, n in facts.domains.items()], _MOST_DOMAINS),
        ),
        ("tensors", ", ".join(["expert_ids", *facts.tensors])),
    ]
    if facts.expert_bytes is not None:
        entries.append(("size of one expert", as_binary(facts.expert_bytes)))
    for key, value in sorted(facts.metadata.items()):
        if key == "recording":
            entries += _flattened(value)
        elif key != "expert_bytes":
            entries.append((key, without_folders(value)))
    shown = [(clean_text(key), clean_text(value, 300)) for key, value in entries]
    return {"label": result.label, "entries": shown[:_MOST_ENTRIES]}


def _flattened(text: str) -> list[tuple[str, str]]:
    """Return the settings of a recording as lines; as it is, if it is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return [("recording", without_folders(text))]
    return [(f"recording: {key}", _shown(entry)) for key, entry in value.items()]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
    if value is None:
        return "-"
    return without_folders(str(value))


def _listed(names: Sequence[str], most: int) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
