"""Loading for the engine transformers: code of a model's own, random weights, wrong configs."""

import json
import sys

import numpy as np
import pytest
import router_families as families

from moerun.errors import (
    FileError,
    InvalidArgumentError,
    MissingFileError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from moerun.recording import TraceOptions, load_transformers
from moerun.recording import transformers_loading as loading

TOKENS = np.arange(10, 30, dtype=np.int32)

# --- models with code of their own

CONFIGURATION = """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"

    def __init__(self, choice="bias", **kwargs):
        self.choice = choice
        self.hidden_size, self.num_hidden_layers, self.vocab_size = 16, 2, 64
        self.num_experts, self.num_experts_per_tok = 6, 2
        super().__init__(**kwargs)
"""
MODELING = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tiny import TinyConfig

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.choice = config.choice
        self.gate = nn.Linear(16, 6, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(6))
        self.register_buffer("offset", torch.tensor([3.0, 0, 0, 0, 0, 0]))

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        if self.choice == "bias":
            ids = (probs + self.offset).topk(2, dim=-1)[1]
        else:
            ids = probs.sort(dim=-1, descending=True).indices[..., :2]
        weights = probs.gather(-1, ids)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, token, place = (ids == i).nonzero(as_tuple=True)
            if len(row):
                used = expert(x[row, token]) * weights[row, token, place][:, None]
                out.index_put_((row, token), used, accumulate=True)
        return x + out

class TinyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(Block(config) for _ in range(2))
        self.head = nn.Linear(16, 64, bias=False)
        self.post_init()

    def forward(self, input_ids, use_cache=False, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture
def remote_model(tmp_path, monkeypatch):
    """Writes a model that brings its own code."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def write(choice):
        directory = tmp_path / f"remote_{choice}"
        directory.mkdir()
        (directory / "configuration_tiny.py").write_text(CONFIGURATION)
        (directory / "modeling_tiny.py").write_text(MODELING)
        config = {
            "model_type": "tiny_remote",
            "choice": choice,
            "auto_map": {
                "AutoConfig": "configuration_tiny.TinyConfig",
                "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
            },
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


def test_a_choice_that_the_block_makes_itself_is_seen_bias_and_all(remote_model):
    directory = remote_model("bias")
    engine = load_transformers(directory, random_init=True, trust_remote_code=True)
    (routing,) = engine.trace(TOKENS, TraceOptions(with_logits=True), 0)
    assert (routing.expert_ids[..., 0] == 0).all()  # its bias is above every probability
    rest = routing.router_logits.copy()
    rest[..., 0] = -np.inf
    assert np.array_equal(routing.expert_ids[..., 1], rest.argmax(axis=-1))
    assert engine.notes() == []
    (decoded,) = engine.trace(TOKENS, TraceOptions(generate=3), 0)  # it keeps no KV cache
    assert decoded.expert_ids.shape == (2, 3, 2)


def test_where_only_logits_are_seen_their_largest_are_taken_and_that_is_told(remote_model):
    directory = remote_model("sort")
    engine = load_transformers(directory, random_init=True, trust_remote_code=True)
    (routing,) = engine.trace(TOKENS, TraceOptions(with_logits=True), 0)
    best = np.argsort(-routing.router_logits, axis=-1)[..., :2]
    assert np.array_equal(routing.expert_ids, best)
    assert any("show only logits" in note for note in engine.notes())


def test_code_of_a_model_runs_only_when_it_is_trusted(remote_model):
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_transformers(remote_model("bias"), random_init=True)


# --- loading


def tiny_config_file(directory, name="olmoe", **changes):
    path = directory / f"{name}.json"
    values = families.config_of(name, **changes).to_dict()
    path.write_text(json.dumps(values))
    return path


def test_random_weights_need_only_a_config_and_follow_the_seed(tmp_path):
    path = tiny_config_file(tmp_path)
    engines = [load_transformers(path, random_init=True, seed=seed) for seed in (3, 3, 4)]
    one, again, other = (engine.trace(TOKENS, TraceOptions(), 0)[0] for engine in engines)
    assert np.array_equal(one.expert_ids, again.expert_ids)
    assert not np.array_equal(one.expert_ids, other.expert_ids)
    assert engines[0].model_name == "olmoe (random weights)"
    with pytest.raises(MissingFileError, match="no tokenizer"):
        engines[0].encode("text")


@pytest.mark.parametrize("name", ["olmoe", "switch_transformers", "lfm2_moe", "jamba"])
def test_a_model_with_random_weights_can_have_fewer_layers(tmp_path, name):
    path = tiny_config_file(tmp_path, name)
    engine = load_transformers(path, random_init=True, num_layers=2)
    expected = [layer for layer in families.FAMILIES[name][1] if layer < 2]
    for stack in engine.stacks:
        assert list(stack.moe_layers) == expected
    with pytest.raises(InvalidArgumentError, match="--random-init"):
        load_transformers(path, num_layers=2)


def test_a_model_that_does_not_fit_is_refused_before_it_takes_memory(tmp_path, monkeypatch):
    path = tiny_config_file(tmp_path, hidden_size=64)
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match=r"needs .* GiB .* are free; .*--layers"):
        load_transformers(path, random_init=True)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", FileError, "JSON"),
        ("[1]", ValueError, "olmoe.json"),
        ('{"model_type": "nothing_known"}', UnsupportedModelError, "does not know"),
        ('{"model_type": ["olmoe"]}', UnsupportedModelError, "does not know"),
        ('{"model_type": "olmoe", "hidden_size": "x"}', ValueError, "cannot be used|hidden_size"),
        ('{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 32, '
         '"num_hidden_layers": 1, "num_attention_heads": 2}', UnsupportedModelError, "no router"),
        ('{"model_type": "vit"}', UnsupportedModelError, "no language model"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_an_error_that_names_it(tmp_path, text, kind, message):
    path = tmp_path / "olmoe.json"
    path.write_text(text)
    with pytest.raises(kind, match=message):
        load_transformers(path, random_init=True)


def test_a_config_alone_needs_random_weights(tmp_path):
    path = tiny_config_file(tmp_path)
    with pytest.raises(
        InvalidArgumentError, match=r"olmoe\.json is a configuration alone: add --ra"
    ):
        load_transformers(path)


def test_a_model_that_is_nowhere_is_an_error_that_names_it(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        load_transformers(tmp_path / "nowhere")


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("moerun.recording.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"pip install torch transformers"):
        load_transformers()
