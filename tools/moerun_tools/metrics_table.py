"""What moe-metrics prints: a compact table of one trace, or a comparison of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moerun_tools.metrics_results import (
    POLICIES,
    POLICY_NAMES,
    PREDICTORS,
    VOCABULARIES,
    TraceMetrics,
    clean_text,
)
from moerun_tools.units import as_binary, as_percent, counted

if TYPE_CHECKING:
    from moerun.metrics import Verdict

_RATIOS = (1, 2, 3, 4)
_NAME_WIDTH = 26


def trace_table(result: TraceMetrics) -> str:
    """Return the table of one trace, several blocks of aligned columns."""
    blocks = [
        _heading(result),
        _by_segment_length(result),
        _by_cache_ratio(result),
        _single_numbers(result),
    ]
    return "\n\n".join(block for block in blocks if block)


def comparison_table(results: Sequence[TraceMetrics]) -> str:
    """Return one row for each trace, in the order given."""
    header = ("trace", "model", "E", "k", "SRP(16)", "chance", "group", "study's group")
    hits = ("experts", "of all", "LRU %", "static %", "chance %", "best %", "cache")
    rows: list[tuple[str, ...]] = [(*header, *hits)]
    for result in results:
        verdict, facts = result.verdict, result.facts
        row = [
            clean_text(result.label, 30),
            clean_text(facts.model, 30),
            str(facts.num_experts),
            str(facts.top_k),
        ]
        if verdict is None:
            row += ["-"] * (len(header) + len(hits) - len(row))
        else:
            row += [
                _number(verdict.srp),
                _number(verdict.srp_chance),
                verdict.group or "no verdict",
                verdict.study_group,
                str(verdict.capacity),
                _percent(verdict.cache_fraction, sign=True),
                _percent(verdict.lru_hit_rate),
                _percent(verdict.static_hit_rate),
                _percent(verdict.chance_hit_rate),
                _percent(verdict.best_hit_rate),
                cache_cell(verdict),
            ]
        rows.append(tuple(row))
    return _aligned(rows, left=2)


def cache_cell(verdict: Verdict) -> str:
    """Return the cache that a verdict recommends, for a table."""
    if verdict.group is None:
        return "-"
    if verdict.advice == "none":
        return "none"
    size = as_binary(verdict.cache_bytes) if verdict.cache_bytes else f"{verdict.capacity} a layer"
    return f"static, {size}" if verdict.advice == "static" else size


def _heading(result: TraceMetrics) -> str:
    facts = result.facts
    domains = ", ".join(
        f"{clean_text(name, 20)} {n}" for name, n in list(facts.domains.items())[:8]
    )
    more = len(facts.domains) - 8
    return "\n".join(
        [
            f"{result.label}: {facts.model}, {counted(len(facts.moe_layers), 'layer')} of "
            f"{counted(facts.num_experts, 'expert')}, {facts.top_k} a token",
            f"{counted(facts.num_sequences, 'sequence')} of {facts.lengths} tokens, "
            f"{counted(facts.num_tokens, 'token')} in all; by domain: {domains}"
            + (f" and {more} more domains" if more > 0 else ""),
        ]
    )


def _by_segment_length(result: TraceMetrics) -> str:
    frame = result.srp("model")
    if len(frame) == 0:
        return ""
    balance = result.load_balance("model")
    rows = [
        ("segment length (tokens)", *(str(m) for m in frame["segment_length"])),
        ("SRP", *(_number(value) for value in frame["srp"])),
        (
            "  95% interval",
            *(
                f"{low:.3f}-{high:.3f}" if low is not None and high is not None else "-"
                for low, high in frame.select("ci_low", "ci_high").iter_rows()
            ),
        ),
        ("  by chance, same use", *map(_number, frame["srp_chance"])),
        ("  by chance, even use", *map(_number, frame["srp_chance_even"])),
        ("  set size / k", *(_number(value, 2) for value in frame["cache_ratio"])),
        ("load, std / mean", *(_number(value, 2) for value in balance["variation"])),
        ("  by chance, even use", *(_number(value, 2) for value in balance["variation_chance"])),
    ]
    if all(cell == "-" for cell in rows[2][1:]):
        del rows[2]
    return _aligned(rows, left=1)


def _by_cache_ratio(result: TraceMetrics) -> str:
    facts = result.facts
    ratios = [ratio for ratio in _RATIOS if ratio * facts.top_k <= facts.num_experts]
    rows = [
        ("cache ratio", *(str(ratio) for ratio in ratios)),
        ("experts a layer", *(str(ratio * facts.top_k) for ratio in ratios)),
    ]
    capacities = [ratio * facts.top_k for ratio in ratios]
    rows += [
        ("random set (%)", *(_percent(capacity / facts.num_experts) for capacity in capacities)),
        ("most used experts (%)", *(_percent(result.static_hit_rate_at(c)) for c in capacities)),
    ]
    for policy in POLICIES:
        rates = [result.hit_rate_at(policy, capacity) for capacity in capacities]
        rows.append((f"{POLICY_NAMES[policy]} hit rate (%)", *map(_percent, rates)))
        chances = [result.chance_hit_rate_at(policy, capacity) for capacity in capacities]
        rows.append(("  by chance", *map(_percent, chances)))
    return _aligned(rows, left=1)


def _single_numbers(result: TraceMetrics) -> str:
    recalls = [f"{name} {_percent(result.recall(key))}" for key, name in PREDICTORS.items()]
    chance = f"chance {_percent(result.facts.even_share)}"
    lines = [f"{'predicted routing (%)':{_NAME_WIDTH}}{', '.join(recalls)}, {chance}"]
    domain = result.median_specialization("domain_variation")
    if domain is not None:
        by_chance = _number(result.median_specialization("domain_variation_chance"), 2)
        lines.append(
            f"{'domain specialisation':{_NAME_WIDTH}}{domain:.2f} (std / mean, median), "
            f"chance {by_chance}"
        )
    scores = [
        f"{name} {_percent(value)} (chance "
        f"{_percent(result.median_specialization(f'{key}_chance'))})"
        for key, name in VOCABULARIES.items()
        if (value := result.median_specialization(key)) is not None
    ]
    if scores:
        lines.append(f"{'token specialisation (%)':{_NAME_WIDTH}}{', '.join(scores)}")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows with aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if left == 1:
        widths[0] = max(widths[0], _NAME_WIDTH - 2)
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return as_percent(value, 1) + (" %" if sign else "")
