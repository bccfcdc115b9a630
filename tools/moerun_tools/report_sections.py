"""The sections of the report: what each explains, says of the traces, and lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from moerun_tools import report_text
from moerun_tools.metrics_published import PUBLISHED
from moerun_tools.metrics_results import (
    POLICIES,
    POLICY_NAMES,
    PREDICTORS,
    VOCABULARIES,
    TraceMetrics,
    clean_text,
)

_MOST_ROWS = 400  # of a table in the report; the parquet files hold everything

Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A table with a header; cells are text."""

    header: list[str]
    rows: Rows
    left_out: int = 0


@dataclass(frozen=True)
class Section:
    """A part of the report: a picture, how to read it, what it shows, and the numbers."""

    name: str  # of its figure
    title: str
    reading: str
    findings: list[tuple[str, str]]  # label of a trace, sentence
    table: Table


@dataclass(frozen=True)
class _Plan:
    name: str
    title: str
    reading: str
    finding: Callable[[TraceMetrics], str]
    header: list[str]
    rows: Callable[[TraceMetrics], Rows]


def sections(results: Sequence[TraceMetrics]) -> tuple[list[Section], list[str]]:
    """Return the sections with something in them, and a sentence on each of the others."""
    all_sections = [_section(plan, results) for plan in _PLANS]
    empty = [
        f"{section.title}: {section.findings[0][1]}"
        for section in all_sections
        if not section.table.rows
    ]
    return [section for section in all_sections if section.table.rows], empty


def _section(plan: _Plan, results: Sequence[TraceMetrics]) -> Section:
    is_single = len(results) == 1
    rows = [
        row if is_single else [result.label, *row]
        for result in results
        for row in plan.rows(result)
    ]
    if plan.name == "standing" and rows:
        rows += [
            [
                *([] if is_single else ["study"]),
                model.name,
                _ratio(model.srp),
                "",
                "",
                _ratio(model.srp_chance_even),
                _share(model.sch),
            ]
            for model in PUBLISHED
        ]
    return Section(
        name=plan.name,
        title=plan.title,
        reading=plan.reading,
        findings=[(result.label, plan.finding(result)) for result in results],
        table=Table(
            header=plan.header if is_single else ["trace", *plan.header],
            rows=rows[:_MOST_ROWS],
            left_out=max(0, len(rows) - _MOST_ROWS),
        ),
    )


def _standing_rows(result: TraceMetrics) -> Rows:
    verdict, facts = result.verdict, result.facts
    if verdict is None:
        return []
    at_two = result.hit_rate_at("sch", 2 * facts.top_k)
    interval = _interval(verdict.srp_ci_low, verdict.srp_ci_high)
    return [
        [
            clean_text(facts.model),
            _ratio(verdict.srp),
            interval,
            _ratio(verdict.srp_chance),
            _ratio(verdict.srp_chance_even),
            _share(at_two),
        ]
    ]


def _srp_rows(level: str, *columns: str, by_domain: bool = False) -> Callable[[TraceMetrics], Rows]:
    def rows(result: TraceMetrics) -> Rows:
        frame = result.srp(level, by_domain=by_domain).sort(*columns, "segment_length")
        return [
            [
                *(clean_text(str(row[column])) for column in columns),
                str(row["segment_length"]),
                _ratio(row["srp"]),
                _interval(row["ci_low"], row["ci_high"]),
                _ratio(row["srp_chance"]),
                _ratio(row["srp_chance_even"]),
                str(row["threshold"]),
                _ratio(row["cache_ratio"], 2),
            ]
            for row in frame.iter_rows(named=True)
        ]

    return rows


def _hit_rate_rows(result: TraceMetrics) -> Rows:
    facts = result.facts
    capacities = set(range(facts.top_k, facts.num_experts + 1, facts.top_k))
    if result.verdict is not None:
        capacities.add(result.verdict.capacity)
    return [
        [
            str(capacity),
            f"{capacity / facts.top_k:.2f}",
            _share(capacity / facts.num_experts),
            _share(result.static_hit_rate_at(capacity)),
            *(
                _share(rate)
                for policy in POLICIES
                for rate in (
                    result.hit_rate_at(policy, capacity),
                    result.chance_hit_rate_at(policy, capacity),
                )
            ),
        ]
        for capacity in sorted(capacities)
    ]


def _use_rows(result: TraceMetrics) -> Rows:
    rate = pl.col("activation_rate")
    by_layer = (
        result.activation_rates()
        .group_by("layer")
        .agg(
            pl.col("expert").sort_by(rate, descending=True).first(),
            rate.max().alias("most"),
            rate.median().alias("median"),
            rate.min().alias("least"),
            (rate <= 0).sum().alias("never"),
        )
        .sort("layer")
    )
    return [
        [
            str(row["layer"]),
            str(row["expert"]),
            *(_share(row[name]) for name in ("most", "median", "least")),
            str(row["never"]),
        ]
        for row in by_layer.iter_rows(named=True)
    ]


def _expert_rows(result: TraceMetrics) -> Rows:
    if not result.segment_lengths:
        return []
    srp = pl.col("srp")
    by_layer = (
        result.srp("expert", result.reference_length)
        .group_by("layer")
        .agg(
            pl.col("expert").sort_by(srp, descending=True).first(),
            srp.max().alias("highest"),
            srp.median().alias("median"),
            srp.min().alias("lowest"),
            pl.col("srp_chance").median().alias("by chance"),
        )
        .sort("layer")
    )
    return [
        [
            str(row["layer"]),
            str(row["expert"]),
            *(_ratio(row[name]) for name in ("highest", "median", "lowest", "by chance")),
        ]
        for row in by_layer.iter_rows(named=True)
    ]


def _specialization_rows(result: TraceMetrics) -> Rows:
    names = [
        f"{name}{suffix}"
        for name in ("domain_variation", *VOCABULARIES)
        for suffix in ("", "_chance")
    ]
    frame = result.tables["specialization"].group_by("layer").agg(pl.col(names).median())
    return [
        [
            str(row["layer"]),
            *(_ratio(row[name], 2) for name in names[:2]),
            *(_share(row[name]) for name in names[2:]),
        ]
        for row in frame.sort("layer").iter_rows(named=True)
        if any(row[name] is not None for name in names)
    ]


def _balance_rows(result: TraceMetrics) -> Rows:
    frame = pl.concat([result.load_balance("model"), result.load_balance("layer")])
    return [
        [
            "mean" if row["layer"] is None else str(row["layer"]),
            str(row["segment_length"]),
            f"{row['std']:.4f}",
            _ratio(row["variation"]),
            _ratio(row["variation_chance"]),
        ]
        for row in frame.iter_rows(named=True)
    ]


def _prediction_rows(result: TraceMetrics) -> Rows:
    by_layer = {
        name: dict(result.predictability(name).select("layer", "recall").iter_rows())
        for name in PREDICTORS
    }
    chance = _share(result.facts.even_share)
    rows = [["mean", *(_share(result.recall(name)) for name in PREDICTORS), chance]]
    for layer in result.facts.moe_layers:
        recalls = (_share(recalls.get(layer)) for recalls in by_layer.values())
        rows.append([str(layer), *recalls, chance])
    return rows


def _ratio(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


_BY_CHANCE = ["by chance", "by chance, even use"]
_SRP_HEADER = ["m", "SRP", "95% interval", *_BY_CHANCE, "threshold", "set size / k"]

_PLANS = [
    _Plan(
        "standing",
        "Where it stands",
        "SRP at 16 tokens says how well one set of experts, chosen for 16 tokens in a row, fits "
        "what they use. Models of few experts reach a high SRP by chance; a dotted line leads from "
        "chance to what was measured. The study that introduced SRP sorts models into the four "
        "groups shown, by SRP alone. Its models were measured on its own texts: compare roughly.",
        report_text.standing,
        ["model", "SRP(16)", "95% interval", *_BY_CHANCE, "SCH at \N{GREEK SMALL LETTER RHO} = 2"],
        _standing_rows,
    ),
    _Plan(
        "srp_by_segment_length",
        "Consistency by segment length",
        "1 would mean that some experts are used by every token of a window and the others by "
        "none. The slower the line falls, the longer experts stay useful once they are loaded. The "
        "dotted line is chance: tokens that use every expert as often, without any memory.",
        report_text.by_length,
        _SRP_HEADER,
        _srp_rows("model"),
    ),
    _Plan(
        "hit_rate",
        "Hit rate by size of the cache",
        "Each layer has a cache of its own. SCH and Belady know the future and show what could be "
        "reached; LRU and LFU need no knowledge. Right of the knee each further expert brings less "
        "than its share of the experts. The dotted lines are what sets that never change find: "
        "a random one, and that of the most used experts.",
        report_text.hit_rates,
        [
            "experts a layer",
            "cache ratio",
            "random set",
            "most used",
            *(header for name in POLICY_NAMES.values() for header in (name, "by chance")),
        ],
        _hit_rate_rows,
    ),
    _Plan(
        "srp_by_layer",
        "Consistency by layer",
        "A layer with a high SRP keeps to its experts and is served by a small cache; a layer with "
        "a low one changes them from token to token. The shade around one line is the 95% "
        "interval, the dotted line is chance with the layer's own use of experts.",
        report_text.by_layer,
        ["layer", *_SRP_HEADER],
        _srp_rows("layer", "layer"),
    ),
    _Plan(
        "srp_by_domain",
        "Consistency by domain",
        "Each row is a kind of text, each dot a segment length, with its 95% interval; the small "
        "stroke below a dot is chance with the same use of experts. Rows that differ say that the "
        "same cache will serve some work better than other work.",
        report_text.by_domain,
        ["domain", *_SRP_HEADER],
        _srp_rows("model", "domain", by_domain=True),
    ),
    _Plan(
        "activation_rates",
        "Use of each expert",
        "A column is a layer, its experts sorted by use, so a row is a rank and not an expert. "
        "White is the even share; a column that goes from strong orange to blue leans on few "
        "experts.",
        report_text.activation,
        ["layer", "most used", "its rate", "median rate", "least rate", "never used"],
        _use_rows,
    ),
    _Plan(
        "srp_by_expert",
        "Consistency of each expert",
        "The same order as above: rank by use. Dark experts are used in runs and worth keeping; "
        "pale ones come and go.",
        report_text.srp_of_experts,
        ["layer", "most consistent", "its SRP", "median SRP", "lowest SRP", "median by chance"],
        _expert_rows,
    ),
    _Plan(
        "specialization",
        "Specialisation",
        "Domains: how much an expert's use differs between kinds of text; the line is the median "
        "expert, the shades hold half and four fifths of them. Tokens: of the token ids that "
        "choose an expert more than any other, how large its share of them is; lines are medians. "
        "Dotted: by chance.",
        report_text.specialization,
        [
            "layer",
            *(
                header
                for name in ("domains (std / mean)", *VOCABULARIES.values())
                for header in (name, "by chance")
            ),
        ],
        _specialization_rows,
    ),
    _Plan(
        "load_balance",
        "Load balance",
        "0 would be perfect balance. The dotted line is what chance gives: short windows are "
        "uneven even when every token draws its experts at random.",
        report_text.load_balance,
        ["layer", "m", "std", "std / mean", "by chance"],
        _balance_rows,
    ),
    _Plan(
        "predictability",
        "Predictability",
        "Experts that are named before the router has spoken can be fetched in time. Each guess "
        "names as many experts as a token uses; the dotted line is blind guessing.",
        report_text.predictability,
        ["layer", *PREDICTORS.values(), "by chance"],
        _prediction_rows,
    ),
]
