"""The table of moe-run --dry-run: what each memory tier would hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from moerun_tools.report import aligned, device_text
from moerun_tools.units import as_binary, as_percent


def dry_run_table(plan: dict[str, Any]) -> str:
    """Return what each tier would hold, from what `moerun.dry_run` returns."""
    total = plan["total_expert_bytes"]
    is_resident = plan["state"] == "resident"
    parts = [("  slots", plan["slot_bytes"], ""), ("  staging ring", plan["ring_bytes"], "")]
    sizes = [
        ("resident weights", plan["resident_bytes"], ""),
        ("KV cache, context full", plan["kv_cache_bytes_at_full_context"], ""),
        ("experts in all", total, ""),
        ("budget for experts", plan["budget_bytes"], _share(plan["budget_bytes"], total)),
        ("arena", plan["arena_bytes"], _share(plan["arena_bytes"], total)),
        *([] if is_resident else parts),
        ("smallest budget", plan["smallest_budget_bytes"], ""),
        ("free memory", plan["available_bytes"], ""),
        *([] if plan["device"] == "cpu" else _device_sizes(plan)),
        *_host_rows(plan["host"], total),
    ]
    lines = [
        f"{plan['model']}: {plan['num_moe_layers']} layers of {plan['num_experts']} experts of "
        f"{as_binary(plan['expert_bytes_each'])}, {plan['top_k']} a token",
        f"device {device_text(plan)}",
        "",
        *(f"{name:24}{as_binary(size):>10}{share}" for name, size, share in sizes),
        "",
    ]
    if is_resident:
        lines.append("every expert fits in the budget: nothing is read after loading")
    else:
        lines += [f"note: {note}" for note in (plan["host"] or {"notes": []})["notes"]]
        lines.append(f"policy {plan['policy']}, prefetch {plan['prefetch']}")
        if plan["layers"]:
            lines += ["", aligned(_layer_ranges(plan["layers"]))]
    if not plan["has_tokenizer"]:
        lines += ["", "note: there is no tokenizer.json: moe-run can write no text with this model"]
    return "\n".join(lines)


def _device_sizes(plan: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Return what a card's memory has to hold beside what every device holds."""
    return [
        ("free on the device", plan["device_free_bytes"], ""),
        ("  of", plan["device_total_bytes"], ""),
        ("  activations", plan["activation_bytes"], ""),
        ("  scratch memory", plan["scratch_bytes"], ""),
        ("  reserve", plan["reserve_bytes"], ""),
        ("  left for experts", plan["left_for_experts_bytes"], ""),
    ]


def _host_rows(host: dict[str, Any] | None, total: int) -> list[tuple[str, int, str]]:
    """Return the rows of a dry run about experts that the host keeps for a device."""
    if host is None:
        return []
    tiers = (("page-locked", "page_locked"), ("pageable", "pageable"), ("on disk", "disk"))
    rows = [
        (f"host: {label}", host[f"{name}_bytes"], _share(host[f"{name}_bytes"], total))
        for label, name in tiers
    ]
    return [*rows, ("host: ring", host["ring_bytes"], "")]


def _layer_ranges(layers: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a header and one row for each run of layers with the same slots and split."""
    rows: list[tuple[str, ...]] = [("layers", "with experts", "slots", "split")]
    for (slots, split), run in groupby(layers, lambda layer: (layer["slots"], layer["split"])):
        numbers = [layer["layer"] for layer in run]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.append((label, str(len(numbers)), str(slots), f"{split:.2f}"))
    return rows


def _share(part: int, whole: int) -> str:
    return f"  {as_percent(part, whole)} % of the experts" if whole else ""
