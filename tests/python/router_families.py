"""Tiny models of many families of transformers, and what their experts truly do."""

import torch
import transformers

# Sizes that most configurations share; what a family does not know is left out.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}

# Model type: (what is special about it, layers with experts, E, k).
FAMILIES = {
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 3}, [0, 1, 2], 8, 3),
    "mixtral": ({"num_local_experts": 6, "num_experts_per_tok": 2}, [0, 1, 2], 6, 2),
    "qwen2_moe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16},
        [0, 1, 2],
        8,
        2,
    ),
    "qwen3_moe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
        [0, 2],
        8,
        2,
    ),
    "granitemoe": ({"num_local_experts": 8, "num_experts_per_tok": 3}, [0, 1, 2], 8, 3),
    "phimoe": ({"num_local_experts": 8, "num_experts_per_tok": 2}, [0, 1, 2], 8, 2),
    "deepseek_v2": (
        {**LATENT, **GROUPS, "topk_method": "group_limited_greedy"},
        [1, 2],
        8,
        3,
    ),
    "deepseek_v3": ({**LATENT, **GROUPS, "head_dim": 4}, [1, 2], 8, 3),
    "glm4_moe": (GROUPS, [1, 2], 8, 3),
    "dots1": ({**GROUPS, "n_shared_experts": 1}, [1, 2], 8, 3),
    "ernie4_5_moe": (
        {"moe_num_experts": 8, "moe_k": 3, "moe_layer_start_index": 1},
        [1, 2],
        8,
        3,
    ),
    "hunyuan_v1_moe": ({"num_experts": 8, "moe_topk": 2}, [0, 1, 2], 8, 2),
    "gpt_oss": ({"num_local_experts": 8, "num_experts_per_tok": 3}, [0, 1, 2], 8, 3),
    "jamba": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        [1],
        4,
        2,
    ),
    "jetmoe": (
        {"num_local_experts": 6, "num_experts_per_tok": 2, "kv_channels": 8},
        [0, 1, 2],
        6,
        2,
    ),
    "dbrx": (
        {
            "d_model": 32,
            "n_heads": 4,
            "num_hidden_layers": None,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 6, "moe_top_k": 2},
        },
        [0, 1],
        6,
        2,
    ),
    "llama4_text": (
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 64,
        },
        [1],
        6,
        2,
    ),
    "switch_transformers": (
        {
            "d_model": 32,
            "d_ff": 16,
            "d_kv": 8,
            "num_heads": 4,
            "num_hidden_layers": None,  # not under this name
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "num_experts": 6,
            "expert_capacity": 64,
            "decoder_start_token_id": 0,
        },
        [1, 3],
        6,
        1,
    ),
    "nllb-moe": (
        {
            "d_model": 32,
            "num_hidden_layers": None,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_experts": 6,
            "expert_capacity": 64,
            "moe_eval_capacity_token_fraction": 1.0,
            "second_expert_policy": "all",
            "decoder_start_token_id": 2,
        },
        [1, 3],
        6,
        2,
    ),
    "minimax": ({"num_local_experts": 6, "num_experts_per_tok": 2}, [0, 1, 2], 6, 2),
    "lfm2_moe": (
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "use_expert_bias": True,
        },
        [1, 2],
        6,
        2,
    ),
    "flex_olmo": ({"num_experts": 8, "num_experts_per_tok": 3}, [0, 1, 2], 8, 3),
    "afmoe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "num_dense_layers": 1},
        [1, 2],
        8,
        2,
    ),
}


def config_of(model_type, **changes):
    """Return the tiny configuration of a family."""
    special = FAMILIES[model_type][0]
    values = {**SIZES, **special, **changes}
    values = {name: value for name, value in values.items() if value is not None}
    return transformers.CONFIG_MAPPING[model_type].from_dict(values)


def tiny_model(model_type, seed=0, **changes):
    """Return a tiny model with random weights, all of them large enough to matter."""
    config = config_of(model_type, **changes)
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    torch.manual_seed(seed)
    model = kind.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.3)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name and tensor.is_floating_point():  # in the choice of experts too
                tensor.normal_(0, 0.1)
    return model


def expert_tensors(block, num_experts):
    """Return a function that gives the tensors of expert e of a block, to be changed."""
    experts = block._modules.get("experts")
    children = [] if experts is None else list(experts.children())[:num_experts]
    if len(children) == num_experts:
        return lambda e: list(children[e].parameters())
    if experts is not None:
        own = [p for p in experts.parameters() if p.ndim > 1]
    else:
        own = [p for n, p in block.named_parameters() if not n.startswith("router.")]
    # (E, ...), or for dbrx (E * intermediate size, hidden size).
    own = [p for p in own if p.ndim > 1 and p.shape[0] % num_experts == 0]
    return lambda e: [p.view(num_experts, -1)[e] for p in own]
