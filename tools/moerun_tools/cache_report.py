"""Tables of the expert cache: what it would hold, and what it did."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from moerun_tools.report import host_text
from moerun_tools.units import as_bytes, as_percent, as_rate, as_seconds

_MIN_WINDOW_TOKENS = 64

_HEADER = (
    "layer",
    "slots",
    "split",
    "look-ups",
    "hit %",
    "top only %",
    "miss %",
    "prefetched",
    "useful",
    "late",
    "wasted",
    "demand read",
    "prefetch read",
    "stalled",
)


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
        f"{as_bytes(plan['expert_bytes_each'])}, {plan['top_k']} a token",
        f"device {plan['device']} ({plan['device_reason']})",
        "",
        *(f"{name:24}{as_bytes(size):>10}{share}" for name, size, share in sizes),
        "",
    ]
    if is_resident:
        lines.append("every expert fits in the budget: nothing is read after loading")
    else:
        lines += [f"note: {note}" for note in (plan["host"] or {"notes": []})["notes"]]
        lines.append(f"policy {plan['policy']}, prefetch {plan['prefetch']}")
        if plan["layers"]:
            lines += ["", _aligned(_layer_ranges(plan["layers"]))]
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


def statistics_text(stats: dict[str, Any]) -> str:
    """Return what `moe-run --stats` shows, from `Model.stats()`."""
    lines = [cache_table(stats["cache"])]
    if stats["plan"] is not None:
        lines.append(_plan_line(stats["plan"]))
    lines += _prediction_lines(stats)
    return "\n".join(lines)


def _prediction_lines(stats: dict[str, Any]) -> list[str]:
    """Return what a plan promised beside what was measured; a plan is for one text at a time."""
    promised, total = stats["predicted"], stats["cache"]["total"]
    if promised is None or not total["lookups"] or stats["batch"] is not None:
        return []
    parts = []
    if "hit_rate" in promised:
        hit_rate = 100 * (total["hits"] + total["top_hits"]) / total["lookups"]
        parts.append(f"{100 * promised['hit_rate']:.1f} % hits (measured {hit_rate:.1f} %)")
    rate = stats["decode_tokens_per_s"]
    if "tpot_ms" in promised and rate:
        parts.append(f"{promised['tpot_ms']:.3g} ms a token (measured {1e3 / rate:.3g} ms)")
    return [f"the plan predicted {' and '.join(parts)}"] if parts else []


def _plan_line(plan: dict[str, Any]) -> str:
    """Return what came of plan "auto"."""
    start = "from a stored plan" if plan["started_from"] == "stored" else "without a stored plan"
    text = f"plan auto, {start}: planned {plan['planned']} times, changed {plan['changed']}"
    last = plan["last"]
    if last is None:
        return f"{text}; it plans after every {plan['every']:,} tokens of a model that stays loaded"
    return f"{text}; last at token {last['at_token']}: {last['reason']}"


def cache_table(cache: dict[str, Any]) -> str:
    """Return what the cache did, layer by layer and in all, from `stats()["cache"]`."""
    reason = cache["reason"].strip()
    if cache["state"] == "resident":
        return f"expert cache: every expert is in memory. {reason}".rstrip()
    total_slots = sum(layer["slots"] for layer in cache["layers"])
    rows = [
        _HEADER,
        *(
            (str(layer["layer"]), str(layer["slots"]), f"{layer['split']:.2f}", *_counts(layer))
            for layer in cache["layers"]
        ),
        ("total", str(total_slots), "", *_counts(cache["total"])),
    ]
    lines = [_state_line(cache), _aligned(rows), _time_line(cache), *_window_lines(cache), reason]
    return "\n".join(lines).rstrip("\n")


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


def _state_line(cache: dict[str, Any]) -> str:
    prefetch = "" if cache["prefetch"] == "off" else f" ({_at_work(cache['prefetch_active'])})"
    at_work = _at_work(cache["cache_active"])
    if cache["predictive_active"] is False:
        at_work = "as lcp"
    parts = [
        f"expert cache: {cache['policy']} ({at_work})",
        f"{as_bytes(cache['arena_bytes'])} of {as_bytes(cache['total_expert_bytes'])}",
        f"prefetch {cache['prefetch']}{prefetch}",
        f"{cache['decode_tokens']} decoded tokens",
    ]
    if cache["direct_io"] is not None:
        parts.append(f"reads {'bypass' if cache['direct_io'] else 'go through'} the page cache")
    if cache["host"] is not None:
        parts.append(f"host: {host_text(cache['host'])}")
    return ", ".join(parts)


def _time_line(cache: dict[str, Any]) -> str:
    ratio = cache["ratio_to_limit"]
    parts = [
        f"link {as_rate(cache['link_gb_per_s'])} GB/s",
        f"compute {_ms(cache['compute_s_per_token'])} ms/token",
        f"stalled {_ms(cache['stalled_s_per_token'])} ms/token",
        f"time per token {'-' if ratio is None else f'{ratio:.2f}'} x the limit",
    ]
    return ", ".join(parts)


def _window_lines(cache: dict[str, Any]) -> list[str]:
    """Return what the last tokens got and could have got, once they say something."""
    window = cache["window"]
    if window is None or window["tokens"] < _MIN_WINDOW_TOKENS:
        return []
    live, static, optimal = (
        f"{100 * window[name]:.1f} %"
        for name in ("hit_rate", "static_hit_rate", "optimal_hit_rate")
    )
    return [
        f"last {window['tokens']} tokens: hit rate {live} (whole or top), best fixed set {static}, "
        f"best possible {optimal}"
    ]


def _counts(counters: dict[str, Any]) -> tuple[str, ...]:
    lookups = counters["lookups"]
    return (
        str(lookups),
        as_percent(counters["hits"], lookups),
        as_percent(counters["top_hits"], lookups),
        as_percent(counters["misses"], lookups),
        str(counters["prefetch_issued"]),
        str(counters["prefetch_useful"]),
        str(counters["prefetch_late"]),
        str(counters["prefetch_wasted"]),
        as_bytes(counters["demand_bytes"]),
        as_bytes(counters["prefetch_bytes"]),
        as_seconds(counters["stalled_s"]),
    )


def _layer_ranges(layers: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a header and one row for each run of layers with the same slots and split."""
    rows: list[tuple[str, ...]] = [("layers", "with experts", "slots", "split")]
    for (slots, split), run in groupby(layers, lambda layer: (layer["slots"], layer["split"])):
        numbers = [layer["layer"] for layer in run]
        label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        rows.append((label, str(len(numbers)), str(slots), f"{split:.2f}"))
    return rows


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _share(part: int, whole: int) -> str:
    return f"  {as_percent(part, whole)} % of the experts" if whole else ""


def _at_work(active: bool) -> str:
    return "at work" if active else "not at work"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
