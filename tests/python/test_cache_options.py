"""Options of the expert cache in Python: how they are checked, and what a dry run makes of them."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import moerun
from moerun import Model, errors
from moerun.cache_options import cache_options

NOTHING = {"expert_budget": None, "policy": None, "split": None, "prefetch": None, "plan": None}


@pytest.fixture(scope="module")
def sizes(default_path):
    return moerun.dry_run(default_path)


# What the native module is given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"expert_budget": "25%"}, {"expert_budget": "25%"}),
        ({"expert_budget": 123456}, {"expert_budget": "123456"}),
        ({"expert_budget": np.int64(7)}, {"expert_budget": "7"}),
        ({"policy": "lru"}, {"policy": "lru"}),
        ({"policy": "predictive"}, {"policy": "predictive"}),
        ({"split": 0.4}, {"split": [0.4]}),
        ({"split": 1}, {"split": [1.0]}),
        ({"split": np.float32(0.5)}, {"split": [0.5]}),
        ({"split": [0, 0.25, 1]}, {"split": [0.0, 0.25, 1.0]}),
        ({"split": (0.5,)}, {"split": [0.5]}),
        ({"split": np.array([0.5, 1.0])}, {"split": [0.5, 1.0]}),
        ({"prefetch": True}, {"prefetch": "on"}),
        ({"prefetch": np.bool_(False)}, {"prefetch": "off"}),
        ({"prefetch": "auto"}, {"prefetch": "auto"}),
        ({"plan": "plan.json"}, {"plan": "plan.json"}),
        ({"plan": Path("a", "plan.json")}, {"plan": "a/plan.json"}),
        ({"plan": "~/plan.json"}, {"plan": str(Path.home() / "plan.json")}),
    ],
)
def test_what_was_given_is_put_as_the_native_module_wants_it(given, expected):
    assert cache_options(**(NOTHING | given)) == expected


BAD_TYPES = [
    {"expert_budget": 0},
    {"expert_budget": -5},
    {"expert_budget": 1.5},
    {"expert_budget": True},
    {"expert_budget": b"25%"},
    {"expert_budget": "\ud800"},
    {"policy": 3},
    {"split": "0.4"},
    {"split": True},
    {"split": -0.1},
    {"split": 1.1},
    {"split": float("nan")},
    {"split": []},
    {"split": [0.5, "x"]},
    {"split": [0.5, None]},
    {"split": np.array([[0.5]])},
    {"split": np.array(0.5)},
    {"split": {0: 0.5}},
    {"prefetch": "on"},
    {"prefetch": 1},
    {"prefetch": "sometimes"},
    {"plan": 3},
    {"plan": ""},
    {"plan": b"plan.json"},
    {"plan": "\ud800.json"},
]

BAD_VALUES = [
    {"expert_budget": ""},
    {"expert_budget": "lots"},
    {"expert_budget": "0"},
    {"expert_budget": "-5%"},
    {"expert_budget": "0%"},
    {"expert_budget": "120%"},
    {"expert_budget": "nan"},
    {"expert_budget": "inf%"},
    {"expert_budget": "6 parsecs"},
    {"expert_budget": 2**80},
    {"policy": ""},
    {"policy": "mru"},
    {"split": [0.5, 0.5], "expert_budget": "50%"},
]


@pytest.mark.parametrize("arguments", BAD_TYPES + BAD_VALUES, ids=str)
def test_a_bad_argument_is_refused_and_named(default_path, arguments):
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(errors.InvalidArgumentError, match=next(iter(arguments))):
            call(default_path, **arguments)


def test_a_bad_split_of_a_layer_is_named_by_its_index():
    with pytest.raises(errors.InvalidArgumentError, match=r"split\[1\] must be .* not 2"):
        cache_options(**(NOTHING | {"split": [0.5, 2]}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"plan": "plan.json", "expert_budget": "25%"}, "plan.*budget"),
        ({"plan": "plan.json", "policy": "lru"}, "plan.*policy"),
        ({"plan": "plan.json", "split": 0.5}, "plan.*split"),
        ({"policy": "off", "split": 0.5}, "split.*off"),
        ({"policy": "off", "prefetch": True}, "prefetch.*off"),
        ({"policy": "static"}, "static.*plan"),
        ({"policy": "predictive", "split": 1}, "split.*predictive"),
    ],
    ids=str,
)
def test_contradictory_options_are_refused_and_named(default_path, arguments, expected):
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(errors.InvalidArgumentError, match=expected):
            call(default_path, **arguments)


# dry_run


def test_a_dry_run_of_a_model_that_fits_says_that_all_is_resident(sizes):
    assert sizes["state"] == "resident"
    assert sizes["num_moe_layers"] == 8
    assert sizes["num_experts"] == 32
    assert sizes["top_k"] == 4
    assert sizes["total_expert_bytes"] == 8 * 32 * sizes["expert_bytes_each"]
    assert sizes["kv_cache_bytes_at_full_context"] > 0
    assert sizes["available_bytes"] > sizes["total_expert_bytes"]


@pytest.mark.parametrize("budget", ["25%", "50%", "99%"])
@pytest.mark.parametrize("split", [0.0, 0.5, 1.0, None])
def test_the_tiers_of_a_dry_run_add_up(default_path, sizes, budget, split):
    plan = moerun.dry_run(default_path, expert_budget=budget, split=split)
    total = sizes["total_expert_bytes"]
    assert plan["state"] == "cached"
    assert plan["budget_bytes"] == int(total * int(budget[:-1]) / 100)
    assert plan["smallest_budget_bytes"] <= plan["arena_bytes"] <= plan["budget_bytes"]
    assert plan["arena_bytes"] == plan["slot_bytes"] + plan["ring_bytes"]
    assert plan["ring_bytes"] >= plan["top_k"] * plan["expert_bytes_each"]
    layers = plan["layers"]
    assert [layer["layer"] for layer in layers] == list(range(8))
    assert plan["slot_bytes"] == sum(layer["slots"] * layer["slot_bytes"] for layer in layers)
    for layer in layers:
        assert layer["slot_bytes"] == layer["split"] * plan["expert_bytes_each"]
        assert 0 <= layer["slots"] <= plan["num_experts"]
        if split is not None:
            assert layer["split"] == split if layer["slots"] else layer["split"] == 0


def test_a_dry_run_says_what_a_load_then_does(default_path):
    options = {"expert_budget": "40%", "policy": "lfu", "split": 0.5, "prefetch": False}
    plan = moerun.dry_run(default_path, **options)
    with Model.load(default_path, **options) as model:
        stats = model.stats()
    cache = stats["cache"]
    same = ["state", "policy", "prefetch", "total_expert_bytes", "budget_bytes", "arena_bytes"]
    same += ["slot_bytes", "ring_bytes"]
    assert {name: plan[name] for name in same} == {name: cache[name] for name in same}
    assert plan["resident_bytes"] == stats["memory"]["resident_bytes"]
    assert plan["arena_bytes"] == stats["memory"]["expert_bytes"]
    assert [(layer["slots"], layer["split"]) for layer in plan["layers"]] == [
        (layer["slots"], layer["split"]) for layer in cache["layers"]
    ]


def test_a_shorter_context_needs_less_of_a_kv_cache(default_path, sizes):
    shorter = moerun.dry_run(default_path, context_length=256)
    whole = sizes["kv_cache_bytes_at_full_context"]
    assert shorter["kv_cache_bytes_at_full_context"] * 4 == whole


HUGE = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def huge_tensors(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner))):
                yield f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight", shape
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w3.weight", (inner, hidden)


def test_a_dry_run_reads_no_weights(tmp_path):
    """The file is a hole of 180 GB: reading it would be noticed."""
    header, offset = {}, 0
    for name, shape in huge_tensors(HUGE):
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (tmp_path / "config.json").write_text(json.dumps(HUGE))
    plan = moerun.dry_run(tmp_path, expert_budget="6GiB")
    assert plan["state"] == "cached"
    assert plan["total_expert_bytes"] == 4 * 128 * 3 * 4096 * 14336 * 2
    assert plan["arena_bytes"] <= 6 * 2**30
