"""moe-trace info: describes a trace."""

from __future__ import annotations

import json
from typing import Any

import click

from moerun_tools.command import ToolCommand, write_out
from moerun_tools.trace_options import CONTEXT_SETTINGS, option

_EPILOG = """\b
Examples:
  moe-trace info trace.safetensors
  moe-trace info --json trace.safetensors | jq .domains
"""

_MAX_SAMPLES = 2**53  # of a file that may say anything


@click.command(
    "info",
    cls=ToolCommand,
    short_help="Describe a trace.",
    epilog=_EPILOG,
    context_settings=CONTEXT_SETTINGS,
)
@click.argument("trace")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON object.")
def info_command(trace: str, as_json: bool) -> None:
    """Describe TRACE: a file, any file of a set, or a directory that holds one."""
    from moerun.trace import Trace
    from moerun_tools.report import json_line

    with Trace.open(trace) as opened:
        facts = _facts(opened)
    write_out(json_line(facts) if as_json else _as_text(facts))


def _facts(trace: Any) -> dict[str, Any]:
    """Return what --json prints."""
    lengths: dict[str, list[int]] = {}
    for domain, length in zip(trace.domains, trace.lengths.tolist(), strict=True):
        lengths.setdefault(domain, []).append(length)
    metadata = dict(trace.metadata)
    try:
        recording = json.loads(metadata.pop("recording", "null"))
    except (ValueError, RecursionError):
        recording = None
    planned, state = _planned(recording, {name: len(own) for name, own in lengths.items()})
    return {
        "model": trace.model,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "moe_layers": trace.moe_layers,
        "expert_bytes": trace.expert_bytes,
        "num_sequences": trace.num_sequences,
        "planned_sequences": planned,
        "state": state,
        "num_tokens": trace.num_tokens,
        "shortest": int(trace.lengths.min()),
        "longest": trace.max_length,
        "domains": [
            {"name": name, "num_sequences": len(tokens), "num_tokens": sum(tokens)}
            for name, tokens in lengths.items()
        ],
        "tensors": sorted(trace.tensors),
        "metadata": metadata,
        "recording": recording,
        "files": [{"file": str(file), "bytes": file.stat().st_size} for file in trace.files],
    }


def _planned(recording: Any, domains: dict[str, int]) -> tuple[int | None, str | None]:
    """Return how many sequences were asked for, and whether they are there.

    Domains are recorded one after the other, so all but the last that is there ended by themselves.

    Args:
        recording: settings of `moe-trace record`; anything, if the trace was made otherwise.
        domains: sequences by domain, in the order of the trace.
    """
    if not isinstance(recording, dict):
        return None, None
    samples, data = recording.get("samples"), recording.get("data")
    if not isinstance(samples, int) or not 0 < samples < _MAX_SAMPLES:
        return None, None
    if not isinstance(data, dict) or domains.keys() - data.keys():
        return None, None
    planned = samples * len(data)
    if len(domains) < len(data):
        return planned, "incomplete"
    if list(domains.values())[-1] < samples:
        return planned, "ended early or ran out of text"
    return planned, "complete"


def _as_text(facts: dict[str, Any]) -> str:
    """Return the description for people: a word on each line, then what it is."""
    from moerun_tools.units import as_binary, counted

    layers = facts["moe_layers"]
    metadata = facts["metadata"]
    rows = [
        ("model", facts["model"]),
        (
            "experts",
            f"{facts['top_k']} of {facts['num_experts']} a token, "
            f"in {counted(len(layers), 'layer')} ({ranges(layers)})",
        ),
    ]
    if facts["expert_bytes"]:
        total = facts["expert_bytes"] * facts["num_experts"] * len(layers)
        size = f"{as_binary(facts['expert_bytes'])}, {as_binary(total)} all of them"
        rows.append(("expert", size))
    recorded = [metadata.get(name) for name in ("engine", "phase", "stack", "created_by")]
    rows.append(("recorded", ", ".join(text for text in recorded if text) or "unknown"))
    lengths = str(facts["longest"])
    if facts["shortest"] != facts["longest"]:
        lengths = f"{facts['shortest']} to {lengths}"
    rows.append(
        (
            "sequences",
            f"{facts['num_sequences']:,} of {lengths} tokens, "
            + counted(facts["num_tokens"], "token"),
        )
    )
    if facts["state"] not in (None, "complete"):
        planned = counted(facts["planned_sequences"], "sequence")
        if facts["state"] == "incomplete":
            rows.append(("incomplete", f"{facts['num_sequences']:,} of {planned}"))
        else:
            rows.append(("asked for", f"{planned}: {facts['state']}"))
    for index, domain in enumerate(facts["domains"]):
        text = f"{domain['name']}: {counted(domain['num_sequences'], 'sequence')}"
        text += f", {counted(domain['num_tokens'], 'token')}"
        rows.append(("domains" if index == 0 else "", text))
    rows.append(("also holds", ", ".join(facts["tensors"]) or "nothing else"))
    for index, file in enumerate(facts["files"]):
        text = f"{file['file']} ({as_binary(file['bytes'])})"
        rows.append(("files" if index == 0 else "", text))
    return "".join(f"{plain(name):<11} {plain(text)}\n" for name, text in rows)


def ranges(numbers: list[int]) -> str:
    """Return rising numbers in short: 0-3, 5, 7-9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in parts)


def plain(text: str) -> str:
    """Return text from a file without what would steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)
