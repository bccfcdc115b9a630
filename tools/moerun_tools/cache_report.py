"""What moe-run --stats and --layer-stats print; every line has at most 80 columns."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from moerun_tools.report import aligned, batch_statistics, device_text, host_text
from moerun_tools.units import as_binary, as_percent, as_rate, as_seconds, counted, of_total

_COLUMNS = 80
_LABEL_COLUMNS = 10
_MIN_WINDOW_TOKENS = 64
_NOTHING_SPECIAL = ("every expert is in memory", "experts are cached within the budget")

_Line = tuple[str, str]


def statistics_text(
    stats: dict[str, Any], with_layers: bool = False, with_load: bool = True
) -> str:
    """Return what --stats shows, from `Model.stats()`.

    Args:
        stats: of the model.
        with_layers: add a table with a row for each layer.
        with_load: also say how the model was loaded.
    """
    lines = [*_run_lines(stats, with_load), *_cache_lines(stats["cache"])]
    if stats["batch"] is not None:
        lines += batch_statistics(stats["batch"])
    if stats["plan"] is not None:
        lines.append(("plan", _plan_text(stats["plan"])))
    lines += _promise_lines(stats)
    text = "\n".join(_wrapped(label, line) for label, line in lines)
    if with_layers and stats["cache"]["layers"]:
        text += "\n\n" + layer_table(stats["cache"])
    return text


def layer_table(cache: dict[str, Any]) -> str:
    """Return what the cache did layer by layer, from `stats()["cache"]`.

    Columns that are 0 in every layer are left out, and `split` where it is the same everywhere.
    """
    layers, total = cache["layers"], cache["total"]
    slots = sum(layer["slots"] for layer in layers)
    splits = {layer["split"] for layer in layers}
    columns: list[tuple[str, ...]] = [
        ("layer", *(str(layer["layer"]) for layer in layers), "total"),
        ("slots", *(str(layer["slots"]) for layer in layers), str(slots)),
    ]
    if len(splits) > 1:
        columns.append(("split", *(f"{layer['split']:.2f}" for layer in layers), ""))
    for title, name in (("hit %", "hits"), ("part %", "top_hits"), ("miss %", "misses")):
        if total[name] or name == "hits":
            cells = (as_percent(each[name], each["lookups"]) for each in (*layers, total))
            columns.append((title, *cells))
    for title, name in (
        ("fetched", "prefetch_issued"),
        ("used", "prefetch_useful"),
        ("late", "prefetch_late"),
        ("unused", "prefetch_wasted"),
    ):
        if total[name]:
            columns.append((title, *(_short(each[name]) for each in (*layers, total))))
    read = [each["demand_bytes"] + each["prefetch_bytes"] for each in (*layers, total)]
    if any(read):
        columns.append(("read", *map(as_binary, read)))
    if total["stalled_s"]:
        columns.append(("stalled", *(as_seconds(each["stalled_s"]) for each in (*layers, total))))
    rows = list(zip(*columns, strict=True))
    wide = aligned(rows)
    return wide if max(map(len, wide.splitlines())) <= _COLUMNS else aligned(rows, gap=1)


def _run_lines(stats: dict[str, Any], with_load: bool) -> list[_Line]:
    memory, cache = stats["memory"], stats["cache"]
    lines = [_load_line(stats)] if with_load else []
    lines.append(
        (
            "memory",
            f"experts {_held(memory, cache)}, resident {as_binary(memory['resident_bytes'])}, "
            f"KV cache {as_binary(memory['kv_cache_bytes'])}, "
            f"scratch {as_binary(memory['scratch_bytes'])}",
        )
    )
    if cache["host"] is not None:
        lines.append(("host", host_text(cache["host"])))
    if stats["batch"] is not None or not stats["generated_tokens"]:
        return lines
    speed = f"prompt {as_rate(stats['prefill_tokens_per_s'])} tok/s"
    if stats["decode_gb_per_s"] is not None:
        speed += f"; decoding reads {as_rate(stats['decode_gb_per_s'])} GB/s of memory"
    return [
        *lines,
        ("speed", speed),
        ("sampling", _sampling_text(stats)),
        ("logits", f"fingerprint {stats['logits_hash']}"),
    ]


def _load_line(stats: dict[str, Any]) -> _Line:
    load = stats["load"]
    return (
        "load",
        f"{as_seconds(load['seconds'])} at {as_rate(load['gb_per_s'])} GB/s; "
        f"{device_text(stats)}, {stats['cpu_kernels']} kernels, "
        f"{counted(stats['threads'], 'thread')}",
    )


def _held(memory: dict[str, Any], cache: dict[str, Any]) -> str:
    if cache["state"] != "cached":
        return as_binary(memory["expert_bytes"])
    return of_total(memory["expert_bytes"], cache["total_expert_bytes"])


def _sampling_text(stats: dict[str, Any]) -> str:
    """Return the settings that are not neutral; the seed matters only where one is used."""
    sampling = stats["sampling"] or {}
    temperature = sampling.get("temperature", 0)
    parts = [f"temperature {temperature:g}" if temperature else "the likeliest token (greedy)"]
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0} if temperature else {}
    for name, value in {**neutral, "repetition_penalty": 1}.items():
        if sampling.get(name, value) != value:
            parts.append(f"{name.replace('_', ' ')} {sampling[name]:g}")
    if temperature:
        parts.append(f"seed {stats['seed']}")
    return ", ".join(parts)


def _cache_lines(cache: dict[str, Any]) -> list[_Line]:
    reason = cache["reason"].strip()
    if reason in _NOTHING_SPECIAL:
        reason = ""
    if cache["state"] == "resident":
        return [("experts", f"all in memory. {reason}".rstrip())]
    total = cache["total"]
    lines = [("experts", _state_text(cache))]
    if total["lookups"]:
        lines.append(("", _hits_text(total)))
    lines.append(("", _read_text(cache)))
    if (ratio := cache["ratio_to_limit"]) is not None:
        lines.append(("", _limit_text(cache, ratio)))
    if (window := _window_text(cache["window"])) is not None:
        lines.append(("", window))
    if reason:
        lines.append(("", reason))
    return lines


def _state_text(cache: dict[str, Any]) -> str:
    policy = cache["policy"]
    if not cache["cache_active"]:
        policy += " (switched off)"
    elif cache["predictive_active"] is False:
        policy += " (as lcp)"
    prefetch = cache["prefetch"]
    if prefetch != "off":
        prefetch += " (on)" if cache["prefetch_active"] else " (switched off)"
    parts = [f"policy {policy}", f"prefetch {prefetch}"]
    splits = {layer["split"] for layer in cache["layers"]}
    if len(splits) == 1 and splits != {1.0}:
        parts.append(f"split {splits.pop():.2f}")
    parts.append(counted(cache["decode_tokens"], "decoded token"))
    return ", ".join(parts)


def _hits_text(total: dict[str, Any]) -> str:
    lookups = total["lookups"]
    parts = [f"{as_percent(total['hits'], lookups)} % hits"]
    if total["top_hits"]:
        parts.append(f"{as_percent(total['top_hits'], lookups)} % partly cached")
    parts.append(f"{as_percent(total['misses'], lookups)} % misses")
    return f"{', '.join(parts)} of {counted(lookups, 'look-up')}"


def _read_text(cache: dict[str, Any]) -> str:
    total = cache["total"]
    text = f"{as_binary(total['demand_bytes'] + total['prefetch_bytes'])} read"
    if total["prefetch_bytes"]:
        text += f" ({as_binary(total['prefetch_bytes'])} of it by prefetch)"
    if cache["link_gb_per_s"] is not None:
        text += f" at {as_rate(cache['link_gb_per_s'])} GB/s"
    if cache["direct_io"] is False:
        text += " through the page cache"
    if (compute := cache["compute_s_per_token"]) is not None:
        stalled = cache["stalled_s_per_token"]
        text += f"; {as_seconds(compute)} a token to compute, {as_seconds(stalled)} stalled"
    return text


def _limit_text(cache: dict[str, Any], ratio: float) -> str:
    limit = "disk and memory" if cache["host"] is None else "link and device"
    percent = round(100 * (ratio - 1))
    if percent < 1:
        return f"as fast as {limit} allow"
    return f"{percent:,} % slower than {limit} allow"


def _window_text(window: dict[str, Any] | None) -> str | None:
    """Return what the last tokens got and could have got, once there are enough of them."""
    if window is None or window["tokens"] < _MIN_WINDOW_TOKENS:
        return None
    live, static, optimal = (
        f"{100 * window[name]:.1f} %"
        for name in ("hit_rate", "static_hit_rate", "optimal_hit_rate")
    )
    return (
        f"last {window['tokens']} tokens: {live} hits (whole or partly), {static} with the best "
        f"fixed set, {optimal} at best"
    )


def _promise_lines(stats: dict[str, Any]) -> list[_Line]:
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
    return [("plan", f"predicted {' and '.join(parts)}")] if parts else []


def _plan_text(plan: dict[str, Any]) -> str:
    """Return what came of plan "auto"."""
    start = "from a stored plan" if plan["started_from"] == "stored" else "without a stored plan"
    text = f"auto, {start}: planned {plan['planned']} times, changed {plan['changed']}"
    last = plan["last"]
    if last is None:
        return f"{text}; it plans after every {plan['every']:,} tokens of a model that stays loaded"
    return f"{text}; last at token {last['at_token']}: {last['reason']}"


def _short(count: int) -> str:
    """Return a number of at most five digits, with k, M or G where it needs one."""
    for unit in ("", "k", "M"):
        if count < 100_000:
            return f"{count}{unit}"
        count = round(count / 1000)
    return f"{count}G"


def _wrapped(label: str, text: str) -> str:
    """Return lines that begin under the label; a number stays with its unit."""
    lines = textwrap.fill(
        re.sub(r"(?<=[\d-]) (?=\S)", "\xa0", text),
        width=_COLUMNS,
        initial_indent=label.ljust(_LABEL_COLUMNS),
        subsequent_indent=" " * _LABEL_COLUMNS,
        break_on_hyphens=False,
    )
    return lines.replace("\xa0", " ")
