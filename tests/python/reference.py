"""Small random models of every family, made and run by transformers: what moerun is held to.

Sizes are odd on purpose: hidden sizes that are no multiple of 64, intermediate sizes that are no
multiple of 32, grouped queries, 4 to 128 experts. No weight is left at a neutral value.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are tiny

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# A choice of experts that is nearer to a tie than this may go either way in float32.
MIN_ROUTING_MARGIN = 1e-4


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 37
    max_shard_size: str = "1GB"


LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 32,
}


def longrope(head_dim: int, **extra: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0 + 0.05 * i for i in range(head_dim // 2)],
        "long_factor": [1.5 + 0.5 * i for i in range(head_dim // 2)],
        "original_max_position_embeddings": 40,
        **extra,
    }


def sizes(hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_72 = sizes(72, 40, 6, 2)  # head_dim 12
_100 = sizes(100, 52, 5, 1)  # head_dim 20
_QWEN_72 = sizes(72, 76, 6, 3) | {"moe_intermediate_size": 40}
_QWEN_100 = sizes(100, 84, 5, 5) | {"moe_intermediate_size": 52}
_PHI = {"attention_bias": True, "lm_head_bias": True, "num_experts_per_tok": 2}
_GRANITE = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.17,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}

CASES = [
    Case("olmoe", "olmoe", _72 | {"num_experts": 4, "num_experts_per_tok": 2}),
    Case(
        "olmoe_clip_bias_tied",
        "olmoe",
        sizes(100, 52, 5, 5)
        | {
            "num_experts": 60,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "clip_qkv": 0.8,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        max_shard_size="100KB",
    ),
    Case(
        "olmoe_linear",
        "olmoe",
        _72 | {"num_experts": 6, "num_experts_per_tok": 3, "rope_parameters": LINEAR},
    ),
    Case(
        "olmoe_longrope",
        "olmoe",
        _72 | {"num_experts": 6, "num_experts_per_tok": 2, "rope_parameters": longrope(12)},
    ),
    Case("mixtral", "mixtral", _100 | {"num_local_experts": 8}, max_shard_size="150KB"),
    Case(
        "mixtral_sliding_head_dim",
        "mixtral",
        _72 | {"num_local_experts": 6, "sliding_window": 7, "head_dim": 16},
    ),
    Case(
        "mixtral_llama3_tied",
        "mixtral",
        _72 | {"num_local_experts": 16, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
        num_tokens=90,
    ),
    Case(
        "mixtral_longrope_past_the_original_length",
        "mixtral",
        _100
        | {
            "num_local_experts": 4,
            "head_dim": 20,
            "rope_parameters": longrope(20, factor=8.0),
        },
        num_tokens=53,
    ),
    Case(
        "qwen2_moe",
        "qwen2_moe",
        _QWEN_72
        | {
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 84,
            "mlp_only_layers": [1],
        },
    ),
    Case(
        "qwen2_moe_yarn_sliding_tied",
        "qwen2_moe",
        _QWEN_100
        | {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 52,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "qwen2_moe_no_bias_linear",
        "qwen2_moe",
        _QWEN_72
        | {
            "num_experts": 6,
            "num_experts_per_tok": 1,
            "shared_expert_intermediate_size": 40,
            "qkv_bias": False,
            "rope_parameters": LINEAR,
        },
    ),
    Case(
        "qwen3_moe",
        "qwen3_moe",
        _QWEN_72
        | {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "head_dim": 24,
            "norm_topk_prob": True,
        },
    ),
    Case(
        "qwen3_moe_dense_layers_bias_sliding_tied",
        "qwen3_moe",
        _QWEN_100
        | {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "qwen3_moe_yarn_mscale",
        "qwen3_moe",
        _QWEN_72
        | {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "head_dim": 16,
            "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4, "truncate": False},
        },
    ),
    Case(
        "qwen3_moe_yarn_attention_factor",
        "qwen3_moe",
        _QWEN_72
        | {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "head_dim": 12,
            "rope_parameters": YARN | {"attention_factor": 1.3},
        },
    ),
    Case("granitemoe", "granitemoe", _72 | _GRANITE | {"num_local_experts": 6}),
    Case(
        "granitemoe_bias_llama3_tied",
        "granitemoe",
        _100
        | _GRANITE
        | {
            "num_local_experts": 60,
            "num_experts_per_tok": 8,
            "attention_bias": True,
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    Case("phimoe", "phimoe", _72 | _PHI | {"num_local_experts": 16, "router_jitter_noise": 0.1}),
    Case(
        "phimoe_longrope",
        "phimoe",
        _100
        | _PHI
        | {
            "num_local_experts": 4,
            "rope_parameters": longrope(20, short_mscale=1.1, long_mscale=1.2),
        },
    ),
    Case(
        "phimoe_sliding_no_bias",
        "phimoe",
        _72
        | {
            "num_experts_per_tok": 2,
            "num_local_experts": 6,
            "router_jitter_noise": 0.3,
            "sliding_window": 10,
            "tie_word_embeddings": True,
        },
    ),
]


def is_router(name: str) -> bool:
    return name.endswith(".gate.weight") or ".router." in name


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Gives every parameter a random value: products keep a size near 1, routing is decided."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_norm_weight = "norm" in name and name.endswith("weight")
            parameter.data = (1.0 if is_norm_weight else 0.0) + 0.3 * noise
        elif "embed_tokens" in name:
            parameter.data = noise
        else:
            scale = 2.0 if is_router(name) else 1.0
            parameter.data = scale * noise / parameter.shape[-1] ** 0.5


def token_ids(case: Case) -> list[int]:
    return torch.randint(0, 128, (case.num_tokens,), generator=torch.manual_seed(7)).tolist()


def round_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()


class RoutingMargin:
    """Collects, over a forward pass, how near the routers came to choosing otherwise."""

    def __init__(self, model: torch.nn.Module) -> None:
        config = model.config
        self._model_type = config.model_type
        self._top_k = config.num_experts_per_tok
        self._jitter = getattr(config, "router_jitter_noise", 0.0)
        self.margin = float("inf")
        self._hooks = [
            module.register_forward_hook(self._on_router)
            for name, module in model.named_modules()
            if name.endswith((".gate", ".router", ".router.layer"))
        ]

    def _on_router(self, module: torch.nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        weight = getattr(module, "weight", None)
        if weight is None:
            return
        scores = torch.nn.functional.linear(inputs[0].reshape(-1, weight.shape[1]), weight)
        self._note_gaps(scores, self._top_k)
        if self._model_type == "phimoe":
            self._note_sparse_mixer(scores)

    def _note_gaps(self, scores: torch.Tensor, top_k: int) -> None:
        if top_k < scores.shape[-1]:
            ordered = scores.sort(dim=-1, descending=True).values
            self.margin = min(self.margin, float((ordered[:, top_k - 1] - ordered[:, top_k]).min()))

    def _note_sparse_mixer(self, scores: torch.Tensor) -> None:
        """Its threshold cuts experts out of a softmax, and its two rounds choose one each."""
        for _ in range(2):
            self._note_gaps(scores, 1)
            largest, idx = scores.max(dim=-1, keepdim=True)
            distance = (largest - scores) / scores.abs().clamp(min=largest)
            distance = distance[torch.isfinite(distance)]
            self.margin = min(self.margin, float((distance - 2 * self._jitter).abs().min()))
            scores = scores.scatter(-1, idx, float("-inf"))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class Reference:
    directory: Path
    token_ids: list[int]
    logits: np.ndarray  # (T, V) float32


def run_transformers(model: torch.nn.Module, ids: list[int]) -> tuple[np.ndarray, float]:
    """Returns the logits and the routing margin."""
    margin = RoutingMargin(model)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float().numpy()
    margin.remove()
    return logits, margin.margin


def make_model(case: Case, dtype: str, seed: int) -> torch.nn.Module:
    """Returns the float32 model, its weights already rounded to `dtype`."""
    fields = {
        "vocab_size": 131,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(case.model_type, **(fields | case.config))
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    randomise(model, seed)
    round_to(model, DTYPES[dtype])
    return model


def chooses_every_expert(model: torch.nn.Module) -> bool:
    config = model.config
    return bool(config.num_experts_per_tok == getattr(config, "num_experts", None))


def make_reference(case: Case, dtype: str, directory: Path) -> Reference:
    """Makes the first random model whose routing is clear of ties, saves it and runs it."""
    ids = token_ids(case)
    for seed in range(50):
        model = make_model(case, dtype, seed)
        logits, margin = run_transformers(model, ids)
        if margin == float("inf") and not chooses_every_expert(model):
            raise RuntimeError(f"{case.name}: the routers were not found")
        if margin > MIN_ROUTING_MARGIN:
            break
    else:
        raise RuntimeError(f"{case.name}: no seed keeps the routing clear of ties")
    stored = copy.deepcopy(model).to(DTYPES[dtype])
    stored.save_pretrained(directory, max_shard_size=case.max_shard_size)
    return Reference(directory, ids, logits)


def to_old_config(directory: Path) -> None:
    """Rewrites config.json the way transformers 4 wrote it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    path.write_text(json.dumps(config))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|a - b| / max|b|"""
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())
