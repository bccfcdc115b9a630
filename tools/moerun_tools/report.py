"""The closing lines of moe-run, and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from moerun_tools.units import as_binary, as_rate, as_seconds, counted, of_total

# What a user who asked for no GPU and has none does not need to read.
_NO_CARD = ("no NVIDIA driver is installed", "this build has no CUDA part")


def closing_line(stats: dict[str, Any], interrupted: bool = False) -> str:
    """Return the one line that follows a text: how much was written, and how fast."""
    written = counted(stats["generated_tokens"] or 0, "token")
    if (rate := stats["decode_tokens_per_s"]) is not None:
        written += f", {_speed(rate)} tok/s"
    parts = [f"interrupted: {written}" if interrupted else written]
    if stats["prompt_tokens"] is not None:
        prompt = f"prompt {counted(stats['prompt_tokens'], 'token')}"
        if stats["ttft_s"] is not None:
            prompt += f", first token after {as_seconds(stats['ttft_s'])}"
        parts.append(prompt)
    where = "" if stats["device"] == "cpu" else f" ({stats['device']})"
    return "; ".join(parts) + where


def _speed(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def device_text(stats: dict[str, Any]) -> str:
    """Return where a model runs, with the reason where one is worth knowing."""
    reason = stats["device_reason"]
    if stats["device"] == "cpu" and any(each in reason for each in _NO_CARD):
        return "cpu"
    return f"{stats['device']} ({reason})"


def batch_lines(
    stats: dict[str, Any], texts: int, failed: int, before: int, interrupted: bool = False
) -> list[str]:
    """Return the closing line of a batch, and a line on what its cache did where there is one.

    Args:
        stats: of the model.
        texts: lines of the file.
        failed: of these.
        before: lines that another run has done.
        interrupted: the run did not end by itself.
    """
    done = f"{counted(texts, 'line')}, {failed} failed" if failed else counted(texts, "text")
    if before:
        done += f" ({before} of them before)"
    if interrupted:
        done = f"interrupted: {done}"
    batch = stats["batch"]
    if batch is None:
        return [done]
    tokens, seconds = batch["generated_tokens"], batch["prefill_s"] + batch["decode_s"]
    written = f"{counted(tokens, 'token')} in {as_seconds(seconds)}"
    if (rate := batch["decode_tokens_per_s"]) is not None:
        written += f", {_speed(rate)} tok/s"
    lines = [f"{done}: {written}; prompts {counted(batch['prompt_tokens'], 'token')}"]
    if batch["hit_rate"] is not None:
        hits = f"experts: {100 * batch['hit_rate']:.1f} % hits"
        if batch["ready_rate"] > batch["hit_rate"]:
            hits += f", {100 * batch['ready_rate']:.1f} % with prefetches in time"
        lines.append(f"{hits}; {as_binary(batch['bytes_per_token'])} read a token")
    return lines


def batch_statistics(batch: dict[str, Any]) -> list[tuple[str, str]]:
    """Return labelled lines on a batch for --stats, from `stats()["batch"]`."""
    kv, per_step = batch["kv_cache"], batch["tokens_per_step"]
    size = "-" if per_step is None else f"{per_step:.1f}"
    step = f"{counted(batch['steps'], 'step')} of {size} tokens"
    if batch["active_experts"] is not None:
        step += f", {batch['active_experts']:.1f} active experts a layer and step"
    rate = as_rate(batch["prefill_tokens_per_s"])
    lines = [
        ("batch", f"{step}; prompts {rate} tok/s"),
        ("KV cache", f"{of_total(kv['peak_bytes'], kv['budget_bytes'])} used"),
    ]
    if (schedule := batch["schedule"]) is not None and schedule["rounds"]:
        lines.append(("schedule", schedule_line(schedule)))
    if (prediction := batch["prediction"]) is not None and prediction["ms"] is not None:
        text = f"{counted(prediction['predictions'], 'prediction')}, {prediction['ms']:.2g} ms each"
        waited = prediction["waited_ms"] or 0
        lines.append(("predictor", f"{text}; decoding waited {waited:.2g} ms for each"))
    return lines


def schedule_line(schedule: dict[str, Any]) -> str:
    """Return what scheduling did, from `stats()["batch"]["schedule"]`."""
    text = f"{schedule['scheduled_rounds']} of {schedule['rounds']} rounds of two batches scheduled"
    if schedule["predicted_in_order"]:
        saved = 1 - schedule["predicted_experts"] / schedule["predicted_in_order"]
        text += f": {100 * saved:.1f} % fewer experts predicted than in order of arrival"
        if schedule["split_ms"] is not None:
            text += f", {schedule['split_ms']:.1f} ms to divide each"
    if schedule["token_ms_on"] is not None:
        outcome = "stays on" if schedule["active"] else "is now off"
        times = f"{schedule['token_ms_on']:.3g} ms a token with it"
        text += f"; {times}, {schedule['token_ms_off']:.3g} ms without: it {outcome}"
    return text


def host_text(host: dict[str, Any]) -> str:
    """Return where the host keeps experts for a device, from `stats()["cache"]["host"]`."""
    parts = [
        f"{as_binary(host[name])} {label}"
        for name, label in (
            ("page_locked_bytes", "page-locked"),
            ("pageable_bytes", "pageable"),
            ("disk_bytes", "on disk"),
        )
        if host[name] or name == "page_locked_bytes"
    ]
    if host["ring_bytes"]:
        parts.append(f"ring {as_binary(host['ring_bytes'])}")
    return ", ".join(parts)


def aligned(rows: Sequence[tuple[str, ...]], gap: int = 2) -> str:
    """Return a table of columns that end at the same place, `gap` spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        (" " * gap)
        .join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        .rstrip()
        for row in rows
    )


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
