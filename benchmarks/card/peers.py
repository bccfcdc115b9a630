"""What others reach on the same card: torch's products, and transformers with accelerate."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from card.rows import Row, not_run, speed

RESIDENT_SHARE = 0.25  # of the layers: as much memory as a budget of 25 %


def cuda_torch(*others: str) -> Any:
    """Returns torch, or in words why it cannot be used."""
    for name in ("torch", *others):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return torch if torch.cuda.is_available() else "this torch has no CUDA device"


def torch_products(like: str, config: dict[str, Any], tokens: int, flops: float) -> Iterator[Row]:
    """A prompt's products and attention in bf16, of the model's shapes, by torch."""
    name = f"{like}: torch's bf16 products of a prompt of {tokens}"
    torch = cuda_torch()
    if isinstance(torch, str):
        yield not_run("speed", name, torch)
        return
    hidden, intermediate = config["hidden_size"], config["moe_intermediate_size"]
    heads, kv_heads, head_dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    experts, top_k = config["num_experts"], config["top_k"]

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, attended = random(tokens, hidden), random(tokens, heads * head_dim)
    qkv, out = random(hidden, (heads + 2 * kv_heads) * head_dim), random(heads * head_dim, hidden)
    # Every expert has as many tokens as the others.
    rows = random(experts, -(-tokens * top_k // experts), hidden)
    gate_up, down = random(experts, hidden, 2 * intermediate), random(experts, intermediate, hidden)
    query, key = random(1, heads, tokens, head_dim), random(1, kv_heads, tokens, head_dim)

    def layer() -> None:
        torch.mm(x, qkv)
        torch.nn.functional.scaled_dot_product_attention(
            query, key, key, is_causal=True, enable_gqa=True
        )
        torch.mm(attended, out)
        torch.bmm(torch.bmm(rows, gate_up)[..., :intermediate], down)

    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(config["num_hidden_layers"]):
            layer()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    yield speed(name, flops / best / 1e12, "TFLOP/s", key="torch_tflops", seconds=best)


def accelerate_offload(like: str, checkpoint: Path, tokens: int) -> Iterator[Row]:
    """Decoding with a quarter of the layers on the card, the others in the host's memory."""
    name = f"{like}: transformers + accelerate, a quarter of the layers on the card"
    torch = cuda_torch("transformers", "accelerate")
    if isinstance(torch, str):
        yield not_run("speed", name, torch)
        return
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    resident = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map: dict[str, Any] = dict.fromkeys(resident, 0)
    for layer in range(layers):
        device_map[f"model.layers.{layer}"] = 0 if layer < layers * RESIDENT_SHARE else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map=device_map
    ).eval()
    ids = torch.tensor([[1, 2, 3]], device="cuda")
    cache, times = None, []
    for _ in range(tokens + 1):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    step = float(np.median(np.diff(times)[tokens // 4 :]))
    yield speed(name, 1 / step, "tokens/s", key="accelerate")
