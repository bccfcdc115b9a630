"""moe-plan simulate: the live cache over a trace, on virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from moerun_tools.cache_options import PREFETCH, split_list
from moerun_tools.command import ToolCommand, write_out
from moerun_tools.plan_options import (
    GivenCosts,
    assumed_line,
    cost_options,
    model_options,
)
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

if TYPE_CHECKING:
    from moerun import Simulation

_EPILOG = """\b
Examples:
  moe-plan simulate --trace t.safetensors --budget 25% --link-gb-per-s 1.5 --token-ms 2
  moe-plan simulate --trace t.safetensors --plan plan.json --prefetch on --costs costs.json
  moe-plan simulate --trace t.safetensors --budget 25% --policy belady --costs costs.json --json
  moe-plan simulate --trace t.safetensors --budget 25% --batch-size 16 --predictor p.safetensors
"""


@click.command(
    "simulate",
    cls=ToolCommand,
    short_help="Say what a cache would have done with a trace.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@model_options
@option("Cache", "--plan", metavar="FILE", help="Instead of budget, policy and split.")
@option(
    "Cache",
    "--budget",
    metavar="SIZE",
    help="Memory for experts: 40% of them, 8GiB, 500MB or bytes.  [needed without --plan]",
)
@option(
    "Cache",
    "--policy",
    type=click.Choice(["off", "lru", "lfu", "lcp", "predictive", "belady"]),
    help="How to choose the cached expert to drop; predictive asks a --predictor, belady knows the "
    "future.  [default: lcp]",
)
@option(
    "Cache",
    "--split",
    metavar="X[,X...]",
    callback=split_list,
    help="Share of a cached expert that stays in memory, one or one a layer.  [default: 1]",
)
@option(
    "Cache",
    "--prefetch",
    type=click.Choice(list(PREFETCH)),
    help="Read what the next layer will probably need; the trace must name it.  [default: what "
    "the plan says, else auto]",
)
@option("Cache", "--pack", is_flag=True, help="As from a record file; none is written.")
@option(
    "Cache",
    "--prompt-tokens",
    type=click.IntRange(min=0, max=2**31),
    default=0,
    metavar="N",
    help="Treat the first N tokens of each sequence as its prompt.",
)
@option(
    "Batch",
    "--batch-size",
    type=click.IntRange(min=1, max=2**31 - 1),
    metavar="N",
    help="Decode N sequences at once.  [default: one after the other]",
)
@option(
    "Batch",
    "--predictor",
    metavar="FILE",
    help="Predicts experts from the tokens of the trace; written by moe-predictor train.",
)
@option(
    "Batch",
    "--schedule",
    type=click.Choice(["on", "off"]),
    help="Decode those together that are predicted to use the same experts. There is no auto, "
    "which compares measured times.  [default: on with --predictor]",
)
@cost_options
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def simulate_command(
    model: str | None,
    trace: str,
    plan: str | None,
    budget: str | None,
    policy: str | None,
    split: list[float] | None,
    prefetch: str | None,
    pack: bool,
    prompt_tokens: int,
    batch_size: int | None,
    predictor: str | None,
    schedule: str | None,
    as_json: bool,
    **costs: Any,
) -> None:
    """Drive the cache of a live run with the routing of a trace, on the CPU."""
    given = GivenCosts(**costs)
    if plan == "auto":
        raise click.UsageError("--plan auto is for moe-run; name a file, or give --budget.")
    if plan is None and budget is None:
        raise click.UsageError("give --budget or --plan.")
    if plan is not None:
        for name, value in {"--budget": budget, "--policy": policy, "--split": split}.items():
            if value is not None:
                raise click.UsageError(f"--plan and {name} exclude each other.")
    if batch_size is None:
        for name, value in {"--predictor": predictor, "--schedule": schedule}.items():
            if value is not None:
                raise click.UsageError(f"{name} is about a batch: give --batch-size, too.")

    # Imported here, so that --help and wrong usage answer at once.
    from moerun import Trace, simulate
    from moerun_tools.report import json_line

    with Trace.open(trace) as opened:
        cost_model = given.find(model, "cpu", pack, len(opened.moe_layers))
        result = simulate(
            opened,
            model,
            costs=cost_model,
            prompt_tokens=prompt_tokens,
            expert_budget=budget,
            policy=policy,
            split=split,
            prefetch=None if prefetch is None else PREFETCH[prefetch],
            plan=plan,
            pack=pack,
            batch_size=batch_size,
            predictor=predictor,
            schedule=None if schedule is None else schedule == "on",
        )
    if as_json:
        facts = {**result.to_dict(), "assumed": given.assumed, **given.source(cost_model)}
        write_out(json_line(facts))
    else:
        write_out(_as_text(result) + assumed_line(given.assumed) + given.source_line(cost_model))


def _as_text(result: Simulation) -> str:
    """Return the times and what the cache did, in all and for each layer."""
    from moerun_tools.plan_table import columns, milliseconds, percent
    from moerun_tools.units import as_binary, as_rate, counted

    cache = result.cache
    facts = result.to_dict()
    tpot, ttft = facts["tpot_s"], facts["ttft_s"]
    times = ", ".join(
        f"{name} {milliseconds(None if value is None else 1e3 * value)}"
        for name, value in tpot.items()
    )
    state = f"policy {cache['policy']}, prefetch {cache['prefetch']}"
    if cache["state"] == "resident":
        state = "none, every expert is in memory"
    rows = [
        ("cache", state),
        ("hit rate", "-" if result.hit_rate is None else f"{percent(result.hit_rate)} %"),
        ("TPOT (ms)", f"{times}; {as_rate(facts['tokens_per_s'])} tok/s"),
        ("TTFT (ms)", "-" if ttft["mean"] is None else _first(ttft)),
        ("moved", as_binary(result.moved_bytes)),
        ("in all", f"{counted(facts['tokens'], 'decoded token')}, {result.seconds:.4g} s"),
    ]
    if result.batch is not None:
        rows += _batch_rows(result.batch)
    text = "".join(f"{name:<11} {value}\n" for name, value in rows)
    table = [("layer", "slots", "split", "hit rate (%)", "waiting (ms a token)")]
    for layer in cache["layers"]:
        table.append(
            (
                str(layer["layer"]),
                str(layer["slots"]),
                f"{layer['split']:.2f}",
                percent(layer["hit_rate"]),
                milliseconds(1e3 * layer["stalled_s"] / facts["tokens"]),
            )
        )
    return text + ("" if len(table) == 1 else columns(table))


def _batch_rows(batch: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the steps of a batch came to."""
    from moerun_tools.plan_table import percent
    from moerun_tools.report import schedule_line
    from moerun_tools.units import as_binary, counted

    steps = f"{counted(batch['steps'], 'step')} of {batch['tokens_per_step']:.1f} tokens"
    parts = [steps, f"{batch['active_experts']:.1f} active experts a layer and step"]
    if batch["hit_rate"] is not None:
        ready = f" ({percent(batch['ready_rate'])} % with what was read ahead in time)"
        has_ready = batch["ready_rate"] > batch["hit_rate"]
        parts.append(f"{percent(batch['hit_rate'])} % hits{ready if has_ready else ''}")
        parts.append(f"{as_binary(batch['bytes_per_token'])} read a token")
    rows = [("batch", ", ".join(parts))]
    if batch["schedule"] is not None and batch["schedule"]["rounds"]:
        rows.append(("schedule", schedule_line(batch["schedule"])))
    return rows


def _first(ttft: dict[str, float]) -> str:
    from moerun_tools.plan_table import milliseconds

    return f"mean {milliseconds(1e3 * ttft['mean'])}, longest {milliseconds(1e3 * ttft['max'])}"
