"""Writes a random checkpoint with the dimensions of a real model, in the ordinary per-expert form.

The weights are normal with standard deviation 0.02 (norms are 1), so activations stay finite and
the router is balanced. The text such a model makes is noise; its speed is the real model's.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

STD = 0.02
SHARD_BYTES = 2_000_000_000
CHUNK_ELEMENTS = 1 << 22
SAFETENSORS_NAMES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

# eos_token_id is null: a benchmark that asks for n tokens gets n tokens.
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 50304,
    },
    "tiny": {  # of no real model: for tests of the benchmarks
        "architectures": ["OlmoeForCausalLM"],
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "model_type": "olmoe",
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 256,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": None,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    is_norm: bool = False

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape))


def tensors_of(config: dict[str, Any]) -> Iterator[Tensor]:
    """Yields every tensor of the checkpoint, in the order of the layers."""
    hidden = config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    is_mixtral = config["model_type"] == "mixtral"
    num_experts = config["num_local_experts" if is_mixtral else "num_experts"]
    intermediate = config.get("moe_intermediate_size", config["intermediate_size"])
    moe = "block_sparse_moe" if is_mixtral else "mlp"
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")

    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield Tensor(f"{prefix}.input_layernorm.weight", (hidden,), is_norm=True)
        yield Tensor(f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, hidden))
        yield Tensor(f"{prefix}.self_attn.k_proj.weight", (kv_heads * head_dim, hidden))
        yield Tensor(f"{prefix}.self_attn.v_proj.weight", (kv_heads * head_dim, hidden))
        yield Tensor(f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim))
        if config["model_type"] == "olmoe":
            yield Tensor(f"{prefix}.self_attn.q_norm.weight", (heads * head_dim,), is_norm=True)
            yield Tensor(f"{prefix}.self_attn.k_norm.weight", (kv_heads * head_dim,), is_norm=True)
        if config["model_type"] == "qwen3_moe":
            yield Tensor(f"{prefix}.self_attn.q_norm.weight", (head_dim,), is_norm=True)
            yield Tensor(f"{prefix}.self_attn.k_norm.weight", (head_dim,), is_norm=True)
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,), is_norm=True)
        yield Tensor(f"{prefix}.{moe}.gate.weight", (num_experts, hidden))
        for expert in range(num_experts):
            expert_prefix = f"{prefix}.{moe}.experts.{expert}"
            yield Tensor(f"{expert_prefix}.{gate}.weight", (intermediate, hidden))
            yield Tensor(f"{expert_prefix}.{up}.weight", (intermediate, hidden))
            yield Tensor(f"{expert_prefix}.{down}.weight", (hidden, intermediate))
    yield Tensor("model.norm.weight", (hidden,), is_norm=True)
    yield Tensor("lm_head.weight", (config["vocab_size"], hidden))


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns float32 `values` as the stored bits of `dtype`, rounded to nearest even."""
    if dtype == "f32":
        return values.astype("<f4")
    if dtype == "f16":
        return values.astype("<f2")
    bits = values.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


class Weights:
    """Random weights at memory speed: 16 random bits choose one of 65536 quantiles."""

    def __init__(self, dtype: str, seed: int) -> None:
        normal = statistics.NormalDist(sigma=STD)
        quantiles = [normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)]
        self._table = encode(np.array(quantiles, dtype=np.float32), dtype)
        self._one = encode(np.ones(1, dtype=np.float32), dtype)
        self._rng = np.random.Generator(np.random.SFC64(seed))

    def chunks(self, tensor: Tensor) -> Iterator[np.ndarray]:
        if tensor.is_norm:
            yield np.repeat(self._one, tensor.num_elements)
            return
        for start in range(0, tensor.num_elements, CHUNK_ELEMENTS):
            n = min(CHUNK_ELEMENTS, tensor.num_elements - start)
            draws = self._rng.integers(0, 1 << 64, (n + 3) // 4, dtype=np.uint64)
            yield self._table[draws.view(np.uint16)[:n]]


def one_ahead(items: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Makes the next item on a second thread while the caller writes this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def split_into_shards(tensors: list[Tensor], element_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = tensor.num_elements * element_bytes
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def safetensors_header(shard: list[Tensor], dtype: str, element_bytes: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.num_elements * element_bytes
        entries[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_checkpoint(directory: Path, config: dict[str, Any], dtype: str, seed: int) -> int:
    """Writes the files into `directory` and returns the bytes of the weights."""
    element_bytes = 4 if dtype == "f32" else 2
    shards = split_into_shards(list(tensors_of(config)), element_bytes)
    total_bytes = sum(t.num_elements for shard in shards for t in shard) * element_bytes
    weights = Weights(dtype, seed)
    weight_map: dict[str, str] = {}
    with click.progressbar(
        length=total_bytes,
        label=f"{total_bytes / 1e9:.2f} GB",
        file=sys.stderr,
        update_min_steps=64_000_000,
    ) as progress:
        for number, shard in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with open(directory / file_name, "wb") as file:
                file.write(safetensors_header(shard, dtype, element_bytes))
                weight_map |= {tensor.name: file_name for tensor in shard}
                for chunk in one_ahead(c for tensor in shard for c in weights.chunks(tensor)):
                    file.write(chunk)
                    progress.update(chunk.nbytes)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = config | {"torch_dtype": TORCH_NAMES[dtype]}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total_bytes


@click.command()
@click.option("--like", required=True, type=click.Choice(sorted(CONFIGS)), help="The real model.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers to write [default: all].")
@click.option("--dtype", default="bf16", show_default=True, type=click.Choice(list(TORCH_NAMES)))
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the weights.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to make; it must not exist.",
)
def main(like: str, layers: int | None, dtype: str, seed: int, output: Path) -> None:
    """Write a random checkpoint with the dimensions of a real model."""
    config = dict(CONFIGS[like])
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    if output.exists():
        raise click.ClickException(f"{output} exists already; remove it or name another directory")
    element_bytes = 4 if dtype == "f32" else 2
    needed = sum(t.num_elements for t in tensors_of(config)) * element_bytes + (64 << 20)
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise click.ClickException(
            f"{output} needs {needed / 1e9:.1f} GB, and {output.parent} has {free / 1e9:.1f} GB "
            "free; give another directory or fewer --layers"
        )
    unfinished = output.with_name(f".{output.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        start = time.monotonic()
        total_bytes = write_checkpoint(unfinished, config, dtype, seed)
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    seconds = time.monotonic() - start
    click.echo(
        f"{output}: {like}, {config['num_hidden_layers']} layers, {dtype}, "
        f"{total_bytes / 1e9:.2f} GB in {seconds:.1f} s ({total_bytes / 1e6 / seconds:.0f} MB/s)"
    )


if __name__ == "__main__":
    main()
