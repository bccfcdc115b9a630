"""moe-plan calibrate: measure what a model takes on this machine."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

if TYPE_CHECKING:
    from moerun.planning import CostModel

_EPILOG = """\b
Examples:
  moe-plan calibrate                                 the shipped model
  moe-plan calibrate -m Qwen/Qwen3-30B-A3B --threads 8
  moe-plan calibrate -m Qwen/Qwen3-30B-A3B --pack    experts from a record file
  moe-plan calibrate -o costs.json                   also to a file, for --costs
  moe-plan calibrate --list                          what is stored, and how old it is

\b
make, curve and simulate find what is stored by themselves. Measure again after a change of disk,
kernel, file system or number of threads; after one of processor, GPU, model files or moerun's
version they ask for it. The machine should have no other work meanwhile.
"""


@click.command(
    "calibrate",
    cls=ToolCommand,
    short_help="Measure how fast a model runs on this machine.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@option(
    "Input",
    "-m",
    "--model",
    metavar="MODEL",
    help="Directory or Hugging Face repository id.  [default: the shipped tiny-olmoe]",
)
@option(
    "Machine",
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where the model runs.",
)
@option("Machine", "--threads", type=click.IntRange(min=1), metavar="N", help="As for moe-run.")
@option("Machine", "--pack", is_flag=True, help="Experts come from a record file, as for moe-run.")
@option(
    "Machine",
    "--context",
    type=click.IntRange(min=1),
    default=256,
    metavar="N",
    help="Tokens before the ones that are timed.",
)
@option(
    "Machine",
    "--budget",
    metavar="SIZE",
    help="Memory for experts: 40% of them, 8GiB, 500MB or bytes.  [default: half of them at most]",
)
@option("Output", "-o", "--output", metavar="FILE", help="Also write the costs to a JSON file.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
@option("Stored", "--list", "lists", is_flag=True, help="Show what is stored; measure nothing.")
@option("Stored", "--forget", "forgets", is_flag=True, help="Remove what is stored of the model.")
def calibrate_command(
    model: str | None,
    device: str,
    threads: int | None,
    pack: bool,
    context: int,
    budget: str | None,
    output: str | None,
    as_json: bool,
    lists: bool,
    forgets: bool,
) -> None:
    """Measure layers and the link to experts, and keep the figures for the other commands."""
    if lists and forgets:
        raise click.UsageError("--list and --forget exclude each other.")
    if output is not None and (lists or forgets or not output):
        raise click.UsageError("--output needs a name, and a measurement.")
    if lists:
        return _list(as_json)

    # Imported here, so that --help and wrong usage answer at once.
    from moerun.planning import calibrate, forget_costs, store_costs
    from moerun.user_files import user_path
    from moerun.whole_file import replace_file
    from moerun_tools.output_file import check_target
    from moerun_tools.report import json_line

    if forgets:
        count = forget_costs(model)
        text = f"{count} measurement{'' if count == 1 else 's'} removed\n"
        return write_out(json_line({"removed": count}) if as_json else text)
    target = None if output is None else user_path(output)
    if target is not None:
        check_target(target, [])
    load = os.getloadavg()[0]
    progress = _Progress()
    try:
        costs = calibrate(
            model,
            device=device,
            pack=pack,
            threads=threads,
            context_tokens=context,
            expert_budget=budget,
            progress=progress,
        )
    finally:
        progress.clear()
    notes = _notes(costs, load)
    if target is not None:
        replace_file(target, (costs.to_json() + "\n").encode())
    if as_json:
        stored = store_costs(costs)
        write_out(json_line({**vars(costs), "stored": str(stored), "notes": notes}))
        return
    write_out(_as_text(costs) + "".join(f"note: {note}\n" for note in notes))
    write_out("" if output is None else f"costs: {output}\n")
    write_out(f"stored: {store_costs(costs)}\n")


_BUSY = 0.5  # of one core


class _Progress:
    """One line on standard error, if that is a terminal."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, step: str, share: float) -> None:
        line = f"{step} {share:.0%}"
        if sys.stderr.isatty() and line != self._last:
            click.echo(f"\r\033[K{line}", nl=False, err=True)
            self._last = line

    def clear(self) -> None:
        if self._last:
            click.echo("\r\033[K", nl=False, err=True)


def _notes(costs: CostModel, load: float) -> list[str]:
    """Return what makes the figures doubtful; `load` is the load average before."""
    notes = []
    if load > _BUSY:
        notes.append(
            f"the machine had other work (load average {load:.1f}), and times are those beside it; "
            "measure again when it is idle"
        )
    if costs.direct_io is False:
        notes.append(
            "reads pass through the page cache here (direct reads are refused), so the link is "
            "that of memory for what was read lately, and faster than the disk"
        )
    if costs.link_error is not None and costs.link_error > 0.15:
        notes.append(
            "transfers took very unequal times; measure again while the machine has no other work"
        )
    return notes


def _as_text(costs: CostModel) -> str:
    """Return the times as a short table."""
    from moerun_tools.plan_table import columns, milliseconds

    parts = {
        "attention": sum(costs.attention_s),
        "experts": sum(costs.moe_s),
        "head": costs.head_s,
        "in all": costs.resident_s,
    }
    rows = [("a token", "ms"), *((name, milliseconds(1e3 * s)) for name, s in parts.items())]
    rows.append(("prompt token", milliseconds(1e3 * sum(costs.prompt_s))))
    threads = f"{costs.threads} thread{'' if costs.threads == 1 else 's'}"
    return (
        f"{costs.model} on {costs.machine}: {costs.device}, {threads}, {costs.store}, "
        f"{costs.context_tokens} tokens before\n"
        + columns(rows)
        + f"{_source(costs)}: {costs.link_bytes_per_s / 1e9:.3g} GB/s, "
        f"{_duration(costs.link_fixed_s)} latency, {_at_once(costs.link_channels)} "
        f"(fit within {costs.link_error or 0:.1%}, worst {costs.link_error_worst or 0:.0%})\n"
        f"computing is {costs.slowdown:.0%} slower during reads; waking up after a wait: "
        f"{_duration(costs.wake_s)}\n"
    )


def _at_once(channels: int) -> str:
    return f"{channels} reads at once" if channels > 1 else "one read at a time"


def _source(costs: CostModel) -> str:
    """Return what experts are copied from."""
    return "disk" if costs.device == "cpu" else "link"


def _duration(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def _list(as_json: bool) -> None:
    from moerun.planning import all_stored_costs, costs_folder
    from moerun_tools.costs_source import age_text
    from moerun_tools.plan_table import columns
    from moerun_tools.report import json_line

    found = list(all_stored_costs())
    if as_json:
        entries: list[dict[str, Any]] = [
            {"file": str(file), "costs": None if costs is None else vars(costs)}
            for file, costs in found
        ]
        return write_out(json_line({"folder": str(costs_folder()), "stored": entries}))
    if not found:
        return write_out(f"nothing is stored in {costs_folder()}\n")
    rows = [("model", "device", "store", "age", "machine", "file")]
    for file, costs in found:
        if costs is None:
            rows.append(("cannot be read", "", "", "", "", file.name))
            continue
        age = age_text(costs.measured_at)
        rows.append((costs.model, costs.device, costs.store, age, costs.machine, file.name))
    write_out(columns(rows))
