"""A process with a budget stays within it, measured from the process."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

MEASURED = {
    "model_type": "olmoe",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}

MEASURE = """
import json, sys
import numpy, moerun

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))

directory, budget, policy = sys.argv[1:]
model = moerun.Model.load(moerun.default_model(), threads=2)  # what any first run brings along
list(model.generate([1, 2, 3], max_new_tokens=2))
model.close()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts anew
before = kilobytes("VmHWM")
model = moerun.Model.load(directory, threads=2, expert_budget=budget, policy=policy)
logits = model.forward(range(40))
tokens = list(model.generate(range(40), max_new_tokens=12, ignore_eos=True))
stats = model.stats()
print(json.dumps({
    "grown_bytes": 1024 * (kilobytes("VmHWM") - before),
    "logits": float(numpy.abs(logits).sum()),
    "tokens": tokens,
    "stats": stats,
}))
"""


def bf16(values):
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def write_olmoe(directory, config):
    """Random weights, several hundred MB of them: one block of numbers, shifted per tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    random = np.random.default_rng(1)
    block = bf16(0.05 * random.standard_normal(1 << 20))
    ones = bf16(np.ones(hidden))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("self_attn.q", "self_attn.k", "input_layer", "post_attention_layer"):
            suffix = "_norm" if "." in name else "norm"
            shapes[f"{prefix}.{name}{suffix}.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for name, shape in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                shapes[f"{prefix}.mlp.experts.{expert}.{name}.weight"] = shape
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            size = int(np.prod(shape))
            at = int(random.integers(0, len(block) - size)) if size < len(block) else 0
            file.write((ones if len(shape) == 1 else block[at : at + size]).tobytes())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("measured") / "model"
    write_olmoe(directory, MEASURED)
    yield directory
    shutil.rmtree(directory)


def measure(directory, budget, policy):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, directory, budget, policy],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_process_stays_within_its_budget(measured):
    whole = measure(measured, "100%", "lcp")
    sizes = whole["stats"]["cache"]
    assert whole["grown_bytes"] > sizes["total_expert_bytes"] > 300e6
    for policy in ("lcp", "off"):
        part = measure(measured, "25%", policy)
        assert (part["tokens"], part["logits"]) == (whole["tokens"], whole["logits"])
        assert part["stats"]["logits_hash"] == whole["stats"]["logits_hash"]
        budget = part["stats"]["cache"]["budget_bytes"]
        assert budget == sizes["total_expert_bytes"] // 4
        allowed = budget + part["stats"]["memory"]["resident_bytes"] + (64 << 20)
        assert part["grown_bytes"] <= allowed
