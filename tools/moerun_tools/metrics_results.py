"""What was measured of one trace, and how the tables, figures and the report read it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    from moerun.metrics import Verdict
    from moerun.trace import Trace

POLICIES = ("sch", "lru", "lfu", "belady")
POLICY_NAMES = {"sch": "SCH", "lru": "LRU", "lfu": "LFU", "belady": "Belady"}
PREDICTORS = {
    "previous_token": "previous token",
    "previous_layer": "previous layer",
    "most_used": "most used experts",
}
VOCABULARIES = {
    "input_vocabulary": "input token",
    "predicted_vocabulary": "predicted token",
    "next_vocabulary": "true next token",
}
TABLES = (
    "srp",
    "hit_rate",
    "chance_hit_rate",
    "activation_rates",
    "specialization",
    "load_balance",
    "predictability",
)

_LONGEST_LABEL = 60
# An absolute path up to its last slash, at the start of a word.
_FOLDERS = re.compile(
    r"""(?<![^\s"'(=,:\[{])(?:~[^\s/\\]*|[A-Za-z]:)?[/\\](?=[^\s/\\])(?:[^\s/\\"',]+[/\\])*"""
)
_PATH = re.compile(r"(?:~[^\s/\\]*|[A-Za-z]:)?[/\\][^/\\].*", re.DOTALL)


def without_folders(text: str) -> str:
    """Return a text with file names in place of absolute paths, which tell of a machine."""
    if _PATH.fullmatch(text.strip()):
        return re.split(r"[/\\]", text.strip().rstrip("/\\"))[-1]
    return _FOLDERS.sub("", text)


def clean_text(text: str, longest: int = _LONGEST_LABEL) -> str:
    """Return a name from a file so that it can be shown: one line, printable, not too long."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    shown = " ".join(shown.split()) or "(empty)"
    return shown if len(shown) <= longest else shown[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class TraceFacts:
    """What a trace says about itself."""

    files: list[str]  # their names, without folders
    model: str
    num_experts: int
    top_k: int
    moe_layers: list[int]
    domains: dict[str, int]  # sequences by domain
    num_sequences: int
    num_tokens: int
    min_length: int
    max_length: int
    tensors: list[str]
    expert_bytes: int | None
    metadata: dict[str, str]

    @classmethod
    def of(cls, trace: Trace) -> TraceFacts:
        """Return the facts of an open trace."""
        return cls(
            files=[clean_text(Path(file).name, 255) for file in trace.files],
            model=clean_text(without_folders(trace.model)),
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            moe_layers=list(trace.moe_layers),
            domains=dict(Counter(trace.domains)),
            num_sequences=trace.num_sequences,
            num_tokens=int(trace.num_tokens),
            min_length=int(min(trace.lengths)),
            max_length=int(trace.max_length),
            tensors=sorted(trace.tensors),
            expert_bytes=trace.expert_bytes,
            metadata=dict(trace.metadata),
        )

    @property
    def lengths(self) -> str:
        """The lengths of the sequences as text: one number, or the shortest and the longest."""
        if self.min_length == self.max_length:
            return str(self.max_length)
        return f"{self.min_length} to {self.max_length}"

    @property
    def even_share(self) -> float:
        """The activation rate that every expert has when all are used alike."""
        return self.top_k / self.num_experts

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all routed experts, None where the trace does not say."""
        if self.expert_bytes is None:
            return None
        return self.expert_bytes * self.num_experts * len(self.moe_layers)


@dataclass(frozen=True)
class TraceMetrics:
    """All metrics of one trace. Frames have the columns that `moerun.metrics` gives them."""

    label: str
    facts: TraceFacts
    verdict: Verdict | None  # None where no sequence has 16 tokens; may withhold its group
    tables: Mapping[str, pl.DataFrame]
    warnings: Sequence[str] = field(default=())

    @property
    def segment_lengths(self) -> list[int]:
        """The lengths for which there are windows in this trace, shortest first."""
        return sorted(self.tables["srp"]["segment_length"].unique().to_list())

    @property
    def reference_length(self) -> int | None:
        """The length that figures of a single length show: 16, or the one nearest to it."""
        return min(self.segment_lengths, key=lambda m: abs(math.log2(m / 16)), default=None)

    @property
    def group(self) -> str | None:
        """The group of the verdict; None where there is no verdict."""
        return None if self.verdict is None else self.verdict.group

    def name(self, count: int) -> str:
        """Return what to call the trace in a report on `count` traces: its model if it is alone."""
        model, label = self.facts.model, self.label
        return model if count == 1 or label == model else f"{model} ({label})"

    def srp(
        self, level: str, segment_length: int | None = None, *, by_domain: bool = False
    ) -> pl.DataFrame:
        """Return the rows of a level, of all sequences together or of the domains."""
        frame = self.tables["srp"].filter(pl.col("level") == level)
        domain = pl.col("domain")
        frame = frame.filter(domain.is_not_null() if by_domain else domain.is_null())
        if segment_length is not None:
            frame = frame.filter(pl.col("segment_length") == segment_length)
        return frame.sort("layer", "expert", "segment_length")

    def srp_by_domain(self, segment_length: int) -> pl.DataFrame:
        """Return one row a domain, the highest SRP first."""
        frame = self.srp("model", segment_length, by_domain=True)
        return frame.sort("srp", "domain", descending=[True, False])

    def hit_rates(self, policy: str, level: str = "mean") -> pl.DataFrame:
        """Return the hit rate of a policy by capacity."""
        frame = self.tables["hit_rate"]
        wanted = (pl.col("level") == level) & (pl.col("policy") == policy)
        return frame.filter(wanted & pl.col("domain").is_null()).sort("layer", "capacity")

    def hit_rate_at(self, policy: str, capacity: int) -> float | None:
        """Return the mean hit rate of one cache a layer with `capacity` experts."""
        return _only(self.hit_rates(policy).filter(pl.col("capacity") == capacity)["hit_rate"])

    def chance_hit_rates(self, policy: str, use: str = "same") -> pl.DataFrame:
        """Return the hit rate of a policy on independent routing, by capacity.

        `use`: "same" for experts used as often as in the trace, "even" for all alike.
        """
        frame = self.tables["chance_hit_rate"]
        return frame.filter(use=use, policy=policy).sort("capacity")

    def chance_hit_rate_at(self, policy: str, capacity: int, use: str = "same") -> float | None:
        """Return the hit rate of a policy on independent routing with `capacity` experts."""
        return _only(
            self.chance_hit_rates(policy, use).filter(capacity=capacity)["hit_rate"],
        )

    def static_hit_rate_at(self, capacity: int) -> float | None:
        """Return what the `capacity` most used experts of each layer find, never replaced."""
        return _only(self.hit_rates("lru").filter(capacity=capacity)["static_hit_rate"])

    def activation_rates(self) -> pl.DataFrame:
        """Return one row for each expert, over all sequences."""
        frame = self.tables["activation_rates"].filter(pl.col("domain").is_null())
        return frame.sort("layer", "expert")

    def load_balance(self, level: str) -> pl.DataFrame:
        """Return the spread of activation frequencies inside windows, by segment length."""
        frame = self.tables["load_balance"]
        wanted = (pl.col("level") == level) & pl.col("domain").is_null()
        return frame.filter(wanted).sort("layer", "segment_length")

    def predictability(self, predictor: str) -> pl.DataFrame:
        """Return the recall of a predictor by layer, layers without one left out."""
        wanted = (pl.col("level") == "layer") & (pl.col("predictor") == predictor)
        wanted &= pl.col("domain").is_null() & pl.col("recall").is_not_null()
        frame = self.tables["predictability"].filter(wanted)
        return frame.sort("layer")

    def recall(self, predictor: str) -> float | None:
        """Return the recall of a predictor over all layers."""
        wanted = (pl.col("level") == "model") & (pl.col("predictor") == predictor)
        wanted &= pl.col("domain").is_null()
        return _only(self.tables["predictability"].filter(wanted)["recall"])

    def specialization(self, score: str) -> pl.DataFrame:
        """Return layer, expert and a score, experts without the score left out."""
        frame = self.tables["specialization"].select("layer", "expert", score)
        return frame.drop_nulls().filter(pl.col(score).is_finite()).sort("layer", "expert")

    def median_specialization(self, score: str) -> float | None:
        """Return the median of a score over all experts."""
        return _only(self.specialization(score).select(pl.col(score).median()).to_series())


def best_first(results: Sequence[TraceMetrics]) -> list[TraceMetrics]:
    """Return the traces by falling SRP over chance, those without a verdict last."""

    def order(result: TraceMetrics) -> tuple[bool, float]:
        gain = -1.0 if result.verdict is None else result.verdict.srp_gain
        return (result.group is not None, gain)

    return sorted(results, key=order, reverse=True)


def joined_table(results: Sequence[TraceMetrics], name: str) -> pl.DataFrame:
    """Return one table of all traces, with the label of its trace in front of every row."""
    frames = [
        result.tables[name].select(pl.lit(result.label).alias("trace"), pl.all())
        for result in results
    ]
    return pl.concat(frames, how="vertical_relaxed")


def _only(series: pl.Series) -> float | None:
    value: Any = series.item() if len(series) == 1 else None
    return None if value is None or not math.isfinite(value) else float(value)
