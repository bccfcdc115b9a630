"""How the statistics of a run are written."""

from __future__ import annotations

import json
import math
from typing import Any


def speed_line(stats: dict[str, Any]) -> str:
    """Return one line: how fast the model was loaded, and how fast it read and wrote."""
    load = stats["load"]
    parts = [
        f"load {_seconds(load['seconds'])} ({_rate(load['gb_per_s'])} GB/s)",
        f"TTFT {_seconds(stats['ttft_s'])}",
        f"prefill {_rate(stats['prefill_tokens_per_s'])} tok/s ({stats['prompt_tokens']} tokens)",
        f"decode {_rate(stats['decode_tokens_per_s'])} tok/s ({stats['generated_tokens']} tokens, "
        f"{_rate(stats['decode_gb_per_s'])} GB/s)",
    ]
    return ", ".join(parts)


def memory_line(stats: dict[str, Any]) -> str:
    """Return one line: where the run took place, what it held in memory, what made it unique."""
    memory = stats["memory"]
    parts = [
        f"{stats['device']} memory: experts {_bytes(memory['expert_bytes'])}",
        f"resident {_bytes(memory['resident_bytes'])}",
        f"KV cache {_bytes(memory['kv_cache_bytes'])}",
        f"scratch {_bytes(memory['scratch_bytes'])}; {stats['cpu_kernels']} kernels",
        f"{stats['threads']} threads",
        f"seed {stats['seed']}",
        f"logits {stats['logits_hash']}",
    ]
    return ", ".join(parts)


def json_object(
    text: str, token_ids: list[int], prompt_token_ids: list[int], stats: dict[str, Any]
) -> str:
    """Return what --json prints: one object on one line, with its end."""
    value = {
        "text": text,
        "token_ids": token_ids,
        "prompt_token_ids": prompt_token_ids,
        "stats": _finite(stats),
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for (a rate over zero seconds) by null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
