"""How the statistics of a run are written."""

from __future__ import annotations

import json
import math
from typing import Any

from moerun_tools.units import as_bytes, as_rate, as_seconds


def speed_line(stats: dict[str, Any]) -> str:
    """Return one line: how fast the model was loaded, and how fast it read and wrote."""
    load = stats["load"]
    parts = [
        f"load {as_seconds(load['seconds'])} ({as_rate(load['gb_per_s'])} GB/s) "
        f"on {stats['device']} ({stats['device_reason']})",
        f"TTFT {as_seconds(stats['ttft_s'])}",
        f"prefill {as_rate(stats['prefill_tokens_per_s'])} tok/s ({stats['prompt_tokens']} tokens)",
        f"decode {as_rate(stats['decode_tokens_per_s'])} tok/s "
        f"({stats['generated_tokens']} tokens, {as_rate(stats['decode_gb_per_s'])} GB/s)",
    ]
    return ", ".join(parts)


def batch_lines(stats: dict[str, Any], texts: int, failed: int, before: int) -> list[str]:
    """Return the closing lines of a batch: how many texts, how fast, and what a step takes.

    Args:
        stats: of the model.
        texts: lines of the file.
        failed: of these.
        before: lines that another run has done.
    """
    batch = stats["batch"]
    done = f"{texts} lines, {failed} failed" if failed else f"{texts} texts"
    if before:
        done += f" ({before} of them before)"
    if batch is None:
        return [done]
    tokens, per_step = batch["generated_tokens"], batch["tokens_per_step"]
    seconds = batch["prefill_s"] + batch["decode_s"]
    parts = [
        f"{done}, {tokens} tokens in {as_seconds(seconds)}",
        f"prefill {as_rate(batch['prefill_tokens_per_s'])} tok/s ({batch['prompt_tokens']} tokens)",
        f"decode {as_rate(batch['decode_tokens_per_s'])} tok/s ({batch['steps']} steps of "
        f"{'-' if per_step is None else f'{per_step:.1f}'} tokens)",
    ]
    kv = batch["kv_cache"]
    step = [f"KV cache {as_bytes(kv['peak_bytes'])} of {as_bytes(kv['budget_bytes'])}"]
    if batch["active_experts"] is not None:
        step.insert(0, f"{batch['active_experts']:.1f} active experts a layer and step")
    if batch["hit_rate"] is not None:
        hits = f"{100 * batch['hit_rate']:.1f} % hits"
        if batch["ready_rate"] > batch["hit_rate"]:
            hits += f" ({100 * batch['ready_rate']:.1f} % with what was read ahead in time)"
        step.append(hits)
        step.append(f"{as_bytes(batch['bytes_per_token'])} read a token")
    lines = [", ".join(parts), ", ".join(step)]
    if (schedule := batch["schedule"]) is not None and schedule["rounds"]:
        lines.append(schedule_line(schedule))
    if (prediction := batch["prediction"]) is not None and prediction["ms"] is not None:
        lines.append(
            f"experts predicted {prediction['predictions']} times, {prediction['ms']:.2g} ms each, "
            f"of which steps waited for {prediction['waited_ms'] or 0:.2g}"
        )
    return lines


def schedule_line(schedule: dict[str, Any]) -> str:
    """Return what scheduling did, from `stats()["batch"]["schedule"]`."""
    text = f"scheduled {schedule['scheduled_rounds']} of {schedule['rounds']} rounds of two batches"
    if schedule["predicted_in_order"]:
        saved = 1 - schedule["predicted_experts"] / schedule["predicted_in_order"]
        text += f": {100 * saved:.1f} % fewer experts predicted than in order of arrival"
        if schedule["split_ms"] is not None:
            text += f", {schedule['split_ms']:.1f} ms to divide each"
    if schedule["token_ms_on"] is not None:
        outcome = "stays on" if schedule["active"] else "is switched off"
        text += (
            f"; measured {schedule['token_ms_on']:.3g} ms a token with it and "
            f"{schedule['token_ms_off']:.3g} ms without: it {outcome}"
        )
    return text


def memory_line(stats: dict[str, Any]) -> str:
    """Return one line: where the run took place, what it held in memory, what made it unique."""
    memory = stats["memory"]
    experts = as_bytes(memory["expert_bytes"])
    if stats["cache"]["state"] == "cached":
        experts += f" of {as_bytes(stats['cache']['total_expert_bytes'])}"
    if (host := stats["cache"]["host"]) is not None:
        experts += f" (host: {host_text(host)})"
    parts = [
        f"{stats['device']} memory: experts {experts}",
        f"resident {as_bytes(memory['resident_bytes'])}",
        f"KV cache {as_bytes(memory['kv_cache_bytes'])}",
        f"scratch {as_bytes(memory['scratch_bytes'])}; {stats['cpu_kernels']} kernels",
        f"{stats['threads']} threads",
        f"seed {stats['seed']}",
        f"logits {stats['logits_hash']}",
    ]
    return ", ".join(parts)


def host_text(host: dict[str, Any]) -> str:
    """Return where the host keeps experts for a device, from `stats()["cache"]["host"]`."""
    parts = [
        f"{as_bytes(host[name])} {label}"
        for name, label in (
            ("page_locked_bytes", "page-locked"),
            ("pageable_bytes", "pageable"),
            ("disk_bytes", "on disk"),
        )
        if host[name] or name == "page_locked_bytes"
    ]
    if host["ring_bytes"]:
        parts.append(f"ring {as_bytes(host['ring_bytes'])}")
    return ", ".join(parts)


def json_object(
    text: str, token_ids: list[int], prompt_token_ids: list[int], stats: dict[str, Any]
) -> str:
    """Return what --json prints: one object on one line, with its end."""
    value = {
        "text": text,
        "token_ids": token_ids,
        "prompt_token_ids": prompt_token_ids,
        "stats": stats,
    }
    return json_line(value)


def json_line(value: dict[str, Any]) -> str:
    """Return one JSON object on one line, with its end."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for (a rate over zero seconds) by null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
