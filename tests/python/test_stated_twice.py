"""Facts of a model that several files state: what transformers does, or a refusal of both."""

import json
import shutil
import warnings

import numpy as np
import pytest
import reference
import safetensors.torch as st
import torch
from transformers import AutoModelForCausalLM

import moerun
from moerun import errors

IDS = list(range(3, 30))
MAX_ERROR = 1e-5
CASE = next(case for case in reference.CASES if case.name == "mixtral_llama3_tied")


def write_model(directory, case=CASE, **config):
    model = reference.make_model(case, "f32", 0)
    model.save_pretrained(directory)
    change_config(directory, **config)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_weights(directory, tensors):
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    st.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def ours(directory, **options):
    with moerun.Model.load(directory, device="cpu", threads=1, **options) as model:
        return model.forward(IDS)


def theirs(directory):
    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    return reference.run_transformers(model, IDS)[0]


def test_a_head_that_is_there_and_differs_is_used_though_the_config_says_tied(tmp_path):
    tensors = write_model(tmp_path, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    write_weights(tmp_path, tensors)
    with pytest.warns(errors.MoerunWarning, match=r"tie_word_embeddings.*'lm_head.weight'"):
        found = ours(tmp_path)
    assert reference.relative_error(found, theirs(tmp_path)) <= MAX_ERROR
    # One element is enough.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    write_weights(tmp_path, tensors)
    with pytest.warns(errors.MoerunWarning, match="differs"):
        found = ours(tmp_path)
    assert reference.relative_error(found, theirs(tmp_path)) <= MAX_ERROR


def test_an_equal_copy_of_the_embedding_is_tied_in_silence(tmp_path):
    tensors = write_model(tmp_path, tie_word_embeddings=True)
    tensors.pop("lm_head.weight", None)
    write_weights(tmp_path, tensors)
    tied, alone = ours(tmp_path), moerun.dry_run(tmp_path, device="cpu")["resident_bytes"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_weights(tmp_path, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(ours(tmp_path), tied)
    assert moerun.dry_run(tmp_path, device="cpu")["resident_bytes"] == alone


def test_of_tied_weights_the_file_may_have_the_head_alone(tmp_path):
    tensors = write_model(tmp_path, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_weights(tmp_path, tensors)
    assert reference.relative_error(ours(tmp_path), theirs(tmp_path)) <= MAX_ERROR


def test_a_head_of_another_shape_is_refused_though_the_config_says_tied(tmp_path):
    tensors = write_model(tmp_path, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    write_weights(tmp_path, tensors)
    with pytest.raises(errors.FormatError, match=r"'lm_head.weight'.*\[130, 72\].*\[131, 72\]"):
        ours(tmp_path)


def test_a_model_without_a_head_whose_config_says_untied_is_refused_with_both_facts(tmp_path):
    tensors = write_model(tmp_path, tie_word_embeddings=False)
    tensors.pop("lm_head.weight", None)
    write_weights(tmp_path, tensors)
    with pytest.raises(errors.FormatError, match=r"config\.json.*tie_word_embeddings.*lm_head"):
        ours(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lm_head.bias", [131]), ("model.norm.bias", [72]), ("model.layers.1.mlp.extra", [3])],
)
def test_a_tensor_that_the_config_knows_nothing_of_is_refused(tmp_path, name, shape):
    tensors = write_model(tmp_path)
    tensors.pop("lm_head.weight", None)
    write_weights(tmp_path, tensors | {name: torch.ones(shape)})
    with pytest.raises(errors.UnsupportedModelError, match=f"'{name}'"):
        ours(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 130},
        {"hidden_size": 78},
        {"head_dim": 24},
        {"num_key_value_heads": 3},
        {"num_local_experts": 15},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"intermediate_size": 41},
        {"text_config": {"vocab_size": 100}},
        {"num_experts": 7},
    ],
    ids=str,
)
def test_a_size_that_the_tensors_contradict_is_refused(tmp_path, change):
    write_model(tmp_path, **change)
    with pytest.raises((errors.FormatError, errors.UnsupportedModelError)) as caught:
        ours(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_of_two_forms_of_the_rotary_parameters_the_one_of_transformers_counts(tmp_path):
    write_model(tmp_path)
    old = {"type": "linear", "factor": 2.0, "rope_theta": 300.0}
    change_config(tmp_path, rope_scaling=old, rope_theta=900.0)
    assert reference.relative_error(ours(tmp_path), theirs(tmp_path)) <= MAX_ERROR


def sharded(tmp_path):
    """A model in two shards, and all its tensors."""
    tensors = write_model(tmp_path)
    tensors.pop("lm_head.weight", None)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    write_weights(tmp_path, tensors)
    expected = ours(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    return tensors, parts, expected


def write_index(tmp_path, parts, **more):
    index = {name: file for file, names in parts.items() for name in names} | more
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)


def test_the_index_says_which_of_two_versions_of_a_tensor_is_read(tmp_path):
    tensors, parts, expected = sharded(tmp_path)
    overlaid = "model.layers.1.self_attn.q_proj.weight"
    for file, names in parts.items():
        kept = {name: tensors[name] for name in names}
        # The other shard has an older version of this, and copies of all else.
        st.save_file({**tensors, overlaid: tensors[overlaid] * 3} | kept, tmp_path / file)
    write_index(tmp_path, parts)
    assert np.array_equal(ours(tmp_path), expected)
    smallest = moerun.dry_run(tmp_path, device="cpu")["smallest_budget_bytes"]
    assert np.array_equal(ours(tmp_path, expert_budget=smallest), expected)


def test_shards_may_lie_in_folders_below_the_model_and_behind_links(tmp_path):
    directory, blobs = tmp_path / "model", tmp_path / "blobs"
    directory.mkdir()
    blobs.mkdir()
    tensors, parts, expected = sharded(directory)
    (directory / "sub" / "deep").mkdir(parents=True)
    placed = dict(zip(["sub/model-1.safetensors", "sub/deep/b"], parts.values(), strict=True))
    for number, (file, names) in enumerate(placed.items()):
        st.save_file({name: tensors[name] for name in names}, blobs / str(number))
        (directory / file).symlink_to(blobs / str(number))
    write_index(directory, placed)
    assert np.array_equal(ours(directory), expected)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "sub/../../m", "/etc/passwd", "a//b"])
def test_a_shard_outside_the_directory_is_refused(tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    _, parts, _ = sharded(directory)
    write_index(directory, parts, **{"model.norm.weight": name})
    with pytest.raises(errors.FormatError, match="in a folder below it"):
        ours(directory)


def test_without_a_word_of_the_index_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors, parts, expected = sharded(tmp_path)
    for file in parts:
        st.save_file(tensors, tmp_path / file)
    write_index(tmp_path, parts)
    assert np.array_equal(ours(tmp_path), expected)
    parts["model-1.safetensors"].pop()
    write_index(tmp_path, parts)
    with pytest.raises(errors.FormatError, match="in two shards"):
        ours(tmp_path)
    shutil.rmtree(tmp_path)
