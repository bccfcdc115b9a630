"""What the commands of moe-plan have in common: the model, the trace, the costs, the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moerun_tools.command import FiniteFloat
from moerun_tools.trace_options import option

if TYPE_CHECKING:
    from moerun import Trace
    from moerun.planning import CostModel, Geometry

_Function = TypeVar("_Function", bound=Callable[..., Any])

_COSTS = "Costs: what moe-plan calibrate stored, a file, or the rate and a token's time"
# Where only a token's time is given. Attention and the head read a small part of what experts do.
_EXPERT_SHARE = 0.7
_LINK_FIXED_US = 50.0
_MANY_TOKENS = 1000  # of a trace

_POSITIVE = FiniteFloat(min=1e-6, max=1e6)
_NOT_NEGATIVE = FiniteFloat(min=0, max=1e6)

_MODEL_OPTIONS = (
    option(
        "Input",
        "-m",
        "--model",
        metavar="MODEL",
        help="Directory or Hugging Face repository id.  [default: the shipped tiny-olmoe]",
    ),
    option(
        "Input",
        "--trace",
        metavar="TRACE",
        required=True,
        help="Routing of the model: a file that moe-trace wrote, or a folder with one trace.",
    ),
)

_COST_OPTIONS = (
    option(
        _COSTS,
        "--costs",
        metavar="FILE",
        help="JSON file of a moerun.planning.CostModel (docs/planning.md).  [default: what "
        "moe-plan calibrate stored of this machine and model]",
    ),
    option(
        _COSTS,
        "--other-machine",
        is_flag=True,
        help="Take --costs that were measured on another machine: plan for that one.",
    ),
    option(
        _COSTS,
        "--link-gb-per-s",
        type=_POSITIVE,
        metavar="X",
        help="Rate at which experts come from the slow tier, in 10^9 bytes a second.",
    ),
    option(
        _COSTS,
        "--token-ms",
        type=_POSITIVE,
        metavar="Y",
        help="Milliseconds of a decoded token with every expert in memory.",
    ),
    option(
        _COSTS,
        "--link-fixed-us",
        type=_NOT_NEGATIVE,
        metavar="X",
        help=f"Microseconds that each transfer takes besides.  [assumed: {_LINK_FIXED_US:g}]",
    ),
    option(
        _COSTS,
        "--expert-share",
        type=FiniteFloat(min=0, max=1),
        metavar="X",
        help=f"Share of --token-ms that experts take.  [assumed: {_EXPERT_SHARE:g}]",
    ),
    option(
        _COSTS,
        "--prompt-token-ms",
        type=_NOT_NEGATIVE,
        metavar="X",
        help="Milliseconds of each token of a prompt.  [assumed: --token-ms, which is too long]",
    ),
)

_POLICIES = ("lru", "lfu", "lcp", "static")

_PLAN_OPTIONS = (
    option(
        "Cache",
        "--split",
        type=FiniteFloat(min=0, max=1),
        metavar="X",
        help="Share of a cached expert that stays in memory.  [default: chosen for each layer]",
    ),
    option(
        "Cache",
        "--prefetch",
        type=click.Choice(["on", "off"]),
        default="on",
        help="Whether the cache prefetches.",
    ),
    option(
        "Cache",
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        help="Where the model will run.",
    ),
    option(
        "Cache",
        "--prompt-tokens",
        type=click.IntRange(min=1, max=2**31),
        default=512,
        metavar="N",
        help="Predict the time to first token for a prompt of N tokens.",
    ),
)


def _adds(options: tuple[Callable[[Any], Any], ...]) -> Callable[[_Function], _Function]:
    def add(function: _Function) -> _Function:
        for each in reversed(options):
            function = each(function)
        return function

    return add


model_options = _adds(_MODEL_OPTIONS)
cost_options = _adds(_COST_OPTIONS)


def plan_options(policy: str) -> Callable[[_Function], _Function]:
    """Return the decorator that adds the options of the cache; `policy` is the default."""
    choices = [*_POLICIES] if policy in _POLICIES else [policy, *_POLICIES]
    which = option(
        "Cache",
        "--policy",
        type=click.Choice(choices),
        default=policy,
        help="How to choose the cached expert to drop."
        + ("" if policy in _POLICIES else " auto: the best of lru, lfu and lcp."),
    )
    return _adds((which, *_PLAN_OPTIONS))


@dataclass(frozen=True)
class GivenCosts:
    """The options about costs, as they were given.

    Raises:
        click.UsageError: they are too few, or exclude each other.
    """

    costs: str | None
    other_machine: bool
    link_gb_per_s: float | None
    token_ms: float | None
    link_fixed_us: float | None
    expert_share: float | None
    prompt_token_ms: float | None

    def __post_init__(self) -> None:
        others = dict(vars(self))
        others.pop("costs")
        if others.pop("other_machine") and self.costs is None:
            raise click.UsageError("--other-machine is about --costs FILE.")
        given = [name for name, value in others.items() if value is not None]
        if self.costs is not None:
            if given:
                flag = given[0].replace("_", "-")
                raise click.UsageError(f"--costs and --{flag} exclude each other.")
        elif given and (self.link_gb_per_s is None or self.token_ms is None):
            raise click.UsageError(
                "these numbers are not enough: give --link-gb-per-s and --token-ms, or --costs "
                "FILE, or nothing after moe-plan calibrate."
            )

    @property
    def are_stored(self) -> bool:
        """Whether nothing was given, so that what was measured here is meant."""
        return self.costs is None and self.link_gb_per_s is None

    def find(self, model: str | None, device: str, pack: bool, num_layers: int) -> CostModel:
        """Return the costs of a model with so many layers with experts.

        Args:
            model: what the user calls it.
            device: where it would run.
            pack: whether experts would come from a record file.
            num_layers: layers with experts.
        """
        from moerun.planning import CostModel
        from moerun_tools.costs_source import costs_from_file, costs_from_store

        if self.costs is not None:
            return costs_from_file(self.costs, model, self.other_machine)
        if self.are_stored:
            return costs_from_store(model, device, pack)
        assert self.link_gb_per_s is not None and self.token_ms is not None
        token_s = 1e-3 * self.token_ms
        share = _EXPERT_SHARE if self.expert_share is None else self.expert_share
        prompt_ms = self.token_ms if self.prompt_token_ms is None else self.prompt_token_ms
        fixed_us = _LINK_FIXED_US if self.link_fixed_us is None else self.link_fixed_us
        return CostModel(
            attention_s=(token_s * (1 - share) / num_layers,) * num_layers,
            moe_s=(token_s * share / num_layers,) * num_layers,
            prompt_s=(1e-3 * prompt_ms / num_layers,) * num_layers,
            head_s=0.0,
            link_fixed_s=1e-6 * fixed_us,
            link_bytes_per_s=1e9 * self.link_gb_per_s,
        )

    @property
    def assumed(self) -> list[str]:
        """What nobody measured, a phrase each; empty with a file and with what is stored."""
        if self.costs is not None or self.are_stored:
            return []
        phrases = ["all layers take the same time, and the head none"]
        if self.link_fixed_us is None:
            phrases.append(f"a transfer takes {_LINK_FIXED_US:g} µs besides its bytes")
        if self.expert_share is None:
            phrases.append(f"experts are {_EXPERT_SHARE:.0%} of a token's time")
        if self.prompt_token_ms is None:
            phrases.append("a prompt token takes as long as a decoded one (TTFT is too long)")
        return phrases

    def source(self, costs: CostModel) -> dict[str, str]:
        """Return where stored costs are from, for --json; nothing where the user gave them."""
        from moerun_tools.costs_source import source_text

        return {"costs": source_text(costs)} if self.are_stored else {}

    def source_line(self, costs: CostModel) -> str:
        """Return the same as a line, or nothing."""
        return "".join(f"costs: {text}\n" for text in self.source(costs).values())


def budget_bytes(text: str, geometry: Geometry, model: str | None) -> int:
    """Return the bytes that a budget such as 40% or 8GiB stands for, by the rules of moe-run.

    Raises:
        InvalidArgumentError: it is no budget.
        OutOfMemoryError: it is smaller than the smallest that works.
    """
    from moerun import dry_run

    found = dry_run(model, "cpu", expert_budget=text)
    return geometry.total_bytes if found["state"] == "resident" else int(found["budget_bytes"])


def assumed_guesses(opened: Trace, prefetch: bool) -> list[str]:
    """Return the phrase that the quality of guesses is assumed, where the trace does not say."""
    if not prefetch or "prefetch_ids" in opened.tensors:
        return []
    return ["how often prefetch is right (recorded by moe-trace record --with-prefetch)"]


def few_tokens(num_tokens: int) -> list[str]:
    """Return the phrase that a trace is short, where it is."""
    if num_tokens >= _MANY_TOKENS:
        return []
    return [f"that {num_tokens} tokens of a trace are like all others (record some thousands)"]


def assumed_line(phrases: list[str]) -> str:
    """Return one line that says what is assumed; empty if nothing is."""
    return f"assumed, not measured: {'; '.join(phrases)}\n" if phrases else ""
