"""How fast the device is, each figure beside the limit that was measured in the same run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_cache import markov_routing, predictions_of, srp

import moerun
from card.rows import Row, not_run, speed

DECODE_OF_DEVICE = 0.70
MISSING_OF_LINK = 0.85
TIMES_THE_LIMIT = 1.25
PREFILL_OF_TORCH = 0.50
FIRST_TOKEN_TIMES = 1.2

# Locality of trained routers: SRP at 16 tokens near 0.5, four of five predictions right.
STAY, ACCURACY, WINDOW = 0.65, 0.8, 16


@dataclass(frozen=True)
class Setting:
    device: str
    like: str  # the name of the model
    checkpoint: Path
    read: float  # GB/s of device memory
    from_host: float  # GB/s of the link
    torch_tflops: float | None
    prompt_tokens: int
    decode_tokens: int


def limits(device: str, num_bytes: int) -> Iterator[Row]:
    rates = moerun._moerun.device_bandwidth(device, num_bytes)
    yield speed("device memory, read", rates["read_gb_per_s"], "GB/s", key="read")
    yield speed("device memory, copied (read + written)", rates["copy_gb_per_s"], "GB/s")
    yield speed(
        "page-locked memory to device", rates["from_host_gb_per_s"], "GB/s", key="from_host"
    )


def load(setting: Setting, **options: Any) -> Any:
    return moerun._moerun.Model(
        str(setting.checkpoint),
        device=setting.device,
        prefill_chunk=setting.prompt_tokens,
        context_length=setting.prompt_tokens + setting.decode_tokens + 8,
        **options,
    )


class Timed:
    """A generation: when each token came, and the statistics in the middle and at the end."""

    def __init__(self, model: Any, num_prompt: int, num_new: int) -> None:
        ids = np.random.default_rng(1).integers(5, model.config["vocab_size"], num_prompt)
        generation = model.generate(
            ids, max_new_tokens=num_new, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0,
            repetition_penalty=1.0, seed=1, stop_token_ids=[],
        )  # fmt: skip
        self.times = []
        for index, _ in enumerate(generation):
            self.times.append(time.perf_counter())
            if index == num_new // 2:
                self.middle = model.stats()
        self.end = model.stats()

    def median_step(self) -> float:
        return float(np.median(np.diff(self.times)[len(self.times) // 4 :]))

    def seconds_since_middle(self) -> float:
        return self.times[-1] - self.times[len(self.times) // 2]

    def since_middle(self, counter: str) -> float:
        """Of the cache, a token."""
        before, after = self.middle["cache"], self.end["cache"]
        tokens = after["decode_tokens"] - before["decode_tokens"]
        return (after["total"][counter] - before["total"][counter]) / tokens


def prefill_flops(config: dict[str, Any], tokens: int) -> float:
    """Multiplications and additions of a prompt, without the head, which sees one token."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads = config["num_attention_heads"]
    rows = (heads + 2 * config["num_key_value_heads"]) * head_dim
    a_token = hidden * rows + heads * head_dim * hidden + hidden * config["num_experts"]
    a_token += config["top_k"] * 3 * hidden * config["moe_intermediate_size"]
    attention = heads * head_dim * tokens * (tokens + 1)
    return float(2 * config["num_hidden_layers"] * (tokens * a_token + attention))


def resident(setting: Setting) -> Iterator[Row]:
    model = load(setting, expert_budget="100%")
    Timed(model, 16, 8)
    timed = Timed(model, 16, setting.decode_tokens)
    step = timed.median_step()
    rate = timed.end["decode_bytes_per_token"] / 1e9 / step
    yield speed(
        f"{setting.like}: decode, all resident, of device memory's rate",
        rate / setting.read,
        at_least=DECODE_OF_DEVICE,
        tokens_per_s=1 / step,
        gb_per_s=rate,
        limit_gb_per_s=setting.read,
    )
    Timed(model, setting.prompt_tokens, 1)
    seconds = setting.prompt_tokens / max(
        Timed(model, setting.prompt_tokens, 1).end["prefill_tokens_per_s"] for _ in range(2)
    )
    tflops = prefill_flops(model.config, setting.prompt_tokens) / seconds / 1e12
    name = f"{setting.like}: prompt of {setting.prompt_tokens}"
    yield speed(name, tflops, "TFLOP/s", seconds=seconds)
    name += ", of torch's bf16 products"
    if setting.torch_tflops is None:
        yield not_run("speed", name, "torch with CUDA is not there")
        return
    limit = setting.torch_tflops
    share = tflops / limit
    yield speed(name, share, at_least=PREFILL_OF_TORCH, torch_tflop_per_s=limit)


def missing(setting: Setting) -> Iterator[Row]:
    """No expert is kept: every one that is used comes over the link."""
    model = load(setting, expert_budget="25%", policy="off", prefetch="off")
    total_bytes = moerun.dry_run(setting.checkpoint, device="cpu")["total_expert_bytes"]
    Timed(model, 16, 4)
    timed = Timed(model, 16, max(4, setting.decode_tokens // 2))
    seconds = timed.seconds_since_middle()
    tokens = len(timed.times) - 1 - len(timed.times) // 2
    rate = timed.since_middle("demand_bytes") * tokens / 1e9 / seconds
    yield speed(
        f"{setting.like}: decode, all missing, of the link's rate",
        rate / setting.from_host,
        at_least=MISSING_OF_LINK,
        tokens_per_s=tokens / seconds,
        gb_per_s=rate,
        limit_gb_per_s=setting.from_host,
    )
    Timed(model, setting.prompt_tokens, 1)
    first_token = Timed(model, setting.prompt_tokens, 1).end["ttft_s"]
    least = total_bytes / 1e9 / setting.from_host
    yield speed(
        f"{setting.like}: first token by moving all experts once",
        first_token / least,
        "times",
        at_most=FIRST_TOKEN_TIMES,
        ttft_s=first_token,
        limit_s=least,
    )


def budget(setting: Setting, share: str) -> Iterator[Row]:
    """Decoding under a budget, with the locality of a trained model's routing."""
    config = moerun._moerun.model_config(os.fsencode(setting.checkpoint))
    layers, experts, top_k = config["num_moe_layers"], config["num_experts"], config["top_k"]
    ids = markov_routing(2 * setting.decode_tokens, layers, experts, top_k, STAY, seed=1)
    replay = (ids, predictions_of(ids, experts, ACCURACY, seed=2))
    plan = moerun.dry_run(setting.checkpoint, device="cpu")
    model = load(setting, expert_budget=share, policy="lcp", prefetch="on", routing_replay=replay)
    # The first half of the tokens fills the cache.
    timed = Timed(model, 16, 2 * setting.decode_tokens)
    tokens = len(timed.times) - 1 - len(timed.times) // 2
    step = timed.seconds_since_middle() / tokens
    missed = timed.since_middle("misses") * plan["expert_bytes_each"] / 1e9
    computed = timed.end["decode_bytes_per_token"] / 1e9
    limit = max(computed / setting.read, missed / setting.from_host)
    yield speed(
        f"{setting.like}: decode at {share}, step by its limit",
        step / limit,
        "times",
        at_most=TIMES_THE_LIMIT,
        tokens_per_s=1 / step,
        hit_rate=timed.since_middle("hits") / timed.since_middle("lookups"),
        missed_gb_per_token=missed,
        moved_gb_per_token=(
            timed.since_middle("demand_bytes") + timed.since_middle("prefetch_bytes")
        )
        / 1e9,
        computed_gb_per_token=computed,
        limit_s=limit,
        srp_16=srp(ids, experts, min(WINDOW, len(ids))),
        key=f"tokens_per_s {share}",
    )
