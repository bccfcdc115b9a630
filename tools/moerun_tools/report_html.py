"""Writes the report: one HTML file with its pictures and style, which loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moerun_tools import report_text
from moerun_tools.metrics_published import GROUPS
from moerun_tools.metrics_results import TraceMetrics, clean_text
from moerun_tools.palette import DARK, LIGHT, style_variables
from moerun_tools.report_sections import sections
from moerun_tools.units import as_binary, counted

_MOST_ENTRIES = 60  # of a trace's metadata
_MOST_DOMAINS = 40
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
    verdict = results[0].verdict
    page = environment.get_template("report.html").render(
        title=_title(results),
        headline=_headline(results),
        cost=report_text.cost(results[0]),
        is_single=len(results) == 1,
        group="" if verdict is None else verdict.group,
        zones=_GROUP_ZONES,
        key_numbers=_key_numbers(results[0]) if len(results) == 1 else [],
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
    first = report_text.headline(results[0], with_label=len(results) > 1)
    known = [result for result in results if result.verdict is not None]
    if len(known) < 2:
        return first
    best, last = known[0], known[-1]
    return (
        f"Of {len(results)} traces, {best.label} is the most consistent and {last.label} the "
        f"least. {first}"
    )


def _key_numbers(result: TraceMetrics) -> list[tuple[str, str, str]]:
    """Return (name, value, what to add) of the numbers that matter most."""
    verdict, facts = result.verdict, result.facts
    if verdict is None:
        return []
    low, high = verdict.srp_ci_low, verdict.srp_ci_high
    interval = "" if low is None or high is None else f"95%: {low:.3f} to {high:.3f}; "
    memory = (
        ("Cache", f"{verdict.cache_fraction:.0%}", "of all experts; bytes are not recorded")
        if verdict.cache_bytes is None
        else ("Cache", as_binary(verdict.cache_bytes), f"of {as_binary(verdict.total_bytes)}")
    )
    return [
        (
            "SRP at 16 tokens",
            f"{verdict.srp:.3f}",
            f"{interval}{verdict.srp_floor:.3f} with all experts, whatever the routing",
        ),
        (
            "Knee of SCH",
            f"{verdict.capacity} of {facts.num_experts}",
            f"experts a layer, \N{GREEK SMALL LETTER RHO} = {verdict.cache_ratio:.3g}",
        ),
        memory,
        (
            "Hits at the knee",
            f"{verdict.sch_hit_rate:.0%}",
            f"SCH; LRU {verdict.lru_hit_rate:.0%}, Belady {verdict.belady_hit_rate:.0%}",
        ),
    ]


def _comparison_row(result: TraceMetrics) -> dict[str, Any]:
    verdict, facts = result.verdict, result.facts
    row: dict[str, Any] = {
        "label": result.label,
        "model": facts.model,
        "size": f"{len(facts.moe_layers)} x {facts.num_experts}, {facts.top_k} used",
        "group": "no verdict",
        "zone": 0,
        "cells": ["-"] * 6,
    }
    if verdict is not None:
        cache = (
            f"{verdict.cache_fraction:.0%}"
            if verdict.cache_bytes is None
            else f"{as_binary(verdict.cache_bytes)} ({verdict.cache_fraction:.0%})"
        )
        row |= {
            "group": verdict.group,
            "zone": _GROUP_ZONES[verdict.group],
            "cells": [
                f"{verdict.srp:.3f}",
                f"{verdict.cache_ratio:.3g}",
                cache,
                f"{verdict.sch_hit_rate:.0%}",
                f"{verdict.lru_hit_rate:.0%}",
                f"{verdict.belady_hit_rate:.0%}",
            ],
        }
    return row


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
            entries.append((key, value))
    shown = [(clean_text(key), clean_text(value, 300)) for key, value in entries]
    return {"label": result.label, "entries": shown[:_MOST_ENTRIES]}


def _flattened(text: str) -> list[tuple[str, str]]:
    """Return the settings of a recording as lines; as it is, if it is not a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        return [("recording", text)]
    return [(f"recording: {key}", _shown(entry)) for key, entry in value.items()]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
    if value is None:
        return "-"
    return str(value)


def _listed(names: Sequence[str], most: int) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
