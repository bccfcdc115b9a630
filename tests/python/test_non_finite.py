"""A weight that is no number: every way to compute refuses it, and names layer and tensor."""

import re
import warnings

import numpy as np
import pytest
import reference
import torch
from click.testing import CliRunner
from weights_on_disk import Damage, tensors_of

import moerun
from moerun import errors
from moerun_tools.trace import main as trace

CASES = {
    case.name: case
    for case in reference.CASES
    if case.name
    in {
        "olmoe",
        "olmoe_clip_bias_tied",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe_dense_layers_bias_sliding_tied",
        "granitemoe_bias_llama3_tied",
        "phimoe_longrope",
    }
}
IDS = list(range(3, 30))


@pytest.fixture(scope="module", params=list(CASES))
def directory(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param) / "model"
    reference.make_model(CASES[request.param], "f32", 0).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen") / "model"
    model = reference.make_model(CASES["qwen2_moe"], "f32", 0)
    model.to(torch.bfloat16).save_pretrained(made)
    return made


def load(directory, **options):
    return moerun.Model.load(directory, **{"device": "cpu", "threads": 1, **options})


def damages(directory):
    """Of every kind of tensor one, with an element that these tokens need."""
    with load(directory) as model:
        routing = model.trace(IDS)
    tensors = tensors_of(directory)
    with_experts = re.compile(r"model\.layers\.(\d+)\..*(experts\.|input_linear)")
    moe_layers = sorted({int(found[1]) for name in tensors if (found := with_experts.match(name))})
    for name, shape in tensors.items():
        element = 5
        if name == "model.embed_tokens.weight":
            element += IDS[4] * shape[1]
        elif found := re.match(r"model\.layers\.(\d+)\.", name):
            layer = int(found[1])
            if layer == 0:
                continue
            if expert := re.search(r"\.experts\.(\d+)\.", name):
                used = routing.expert_ids[moe_layers.index(layer)]
                if int(expert[1]) != used.flat[0]:
                    continue
            elif re.search(r"input_linear|output_linear|experts\.", name):
                used = routing.expert_ids[moe_layers.index(layer)]
                element += int(used.flat[0]) * shape[1] * shape[2]
        yield name, element


def checked_forward(model, ids):
    """Logits; a warning about numbers that are none is raised as the error that it quotes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = model.forward(ids)
    assert np.isfinite(logits).all() == (not caught)
    if caught:
        assert caught[0].category is errors.MoerunWarning
        raise errors.FormatError(str(caught[0].message))
    return logits


def assert_refused(call, tensor, kind):
    with pytest.raises(errors.FormatError) as caught:
        call()
    text = str(caught.value)
    assert f"'{tensor}'" in text and {"nan": "NaN", "inf": "infinity"}[kind] in text
    if found := re.match(r"model\.layers\.(\d+)\.", tensor):
        assert f"layer {found[1]} " in text


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_one_bad_element_of_any_tensor_is_refused_by_its_name(directory, kind):
    tried = 0
    for tensor, element in damages(directory):
        with Damage(directory, tensor, element, kind), load(directory) as model:
            assert_refused(lambda model=model: checked_forward(model, IDS), tensor, kind)
        tried += 1
    assert tried >= 10
    with load(directory) as model:
        assert np.isfinite(checked_forward(model, IDS)).all()


ROUTER = "model.layers.2.mlp.gate.weight"
CALLS = {
    "forward": lambda model: checked_forward(model, IDS),
    "generate": lambda model: list(model.generate(IDS, max_new_tokens=3, temperature=0)),
    "batch": lambda model: list(
        model.generate_batch([IDS, IDS[:9]], max_new_tokens=3, temperature=0).results()
    ),
    "trace": lambda model: model.trace(IDS),
    "trace of decoding": lambda model: model.trace(IDS, generate=2),
}
BAD = [
    "model.layers.{}.mlp.gate.weight",
    "model.layers.{}.mlp.shared_expert_gate.weight",
    "model.layers.{}.mlp.shared_expert.up_proj.weight",
    "model.layers.{}.self_attn.k_proj.weight",
    "model.layers.{}.self_attn.q_proj.bias",
]


@pytest.mark.parametrize("budget", [None, "smallest"])
@pytest.mark.parametrize("call", list(CALLS))
def test_every_way_to_compute_refuses(qwen, call, budget):
    options = {}
    if budget:
        options["expert_budget"] = moerun.dry_run(qwen, device="cpu")["smallest_budget_bytes"]
    for tensor in BAD:
        name = tensor.format(2)
        with Damage(qwen, name, 5, "nan"), load(qwen, **options) as model:
            assert_refused(lambda model=model: CALLS[call](model), name, "nan")


@pytest.mark.parametrize("kernels", moerun.build_info()["cpu_kernels"]["supported"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_no_kernel_set_swallows_a_number_that_is_none(qwen, kernels, kind):
    for tensor in BAD:
        name = tensor.format(2)
        with Damage(qwen, name, 5, kind), load(qwen, cpu_kernels=kernels, threads=2) as model:
            assert_refused(lambda model=model: checked_forward(model, IDS), name, kind)
            assert_refused(lambda model=model: checked_forward(model, IDS[:1]), name, kind)


@pytest.mark.parametrize("kernels", moerun.build_info()["cpu_kernels"]["supported"])
def test_a_pass_that_was_refused_leaves_nothing_to_the_next_one(qwen, kernels):
    """Memory of activations is used again, their padding too."""
    hidden = tensors_of(qwen)["model.embed_tokens.weight"][1]
    options = {"cpu_kernels": kernels}
    with load(qwen, **options) as model:
        expected = checked_forward(model, IDS)
    tensor = "model.embed_tokens.weight"
    with Damage(qwen, tensor, 100 * hidden, "nan"), load(qwen, **options) as model:
        for _ in range(2):
            assert_refused(lambda: checked_forward(model, [100, *IDS]), tensor, "nan")
            assert np.array_equal(checked_forward(model, IDS), expected)
    with Damage(qwen, ROUTER, 5, "nan"), load(qwen, **options) as model:
        for ids in (IDS, IDS[:1], IDS, IDS[:1]):
            assert_refused(lambda ids=ids: checked_forward(model, ids), ROUTER, "nan")


def test_a_token_whose_embedding_is_damaged_is_refused_and_others_are_not(qwen):
    hidden = tensors_of(qwen)["model.embed_tokens.weight"][1]
    with Damage(qwen, "model.embed_tokens.weight", 7 * hidden, "nan"), load(qwen) as model:
        assert_refused(
            lambda: checked_forward(model, [1, 7, 2]), "model.embed_tokens.weight", "nan"
        )
        with pytest.raises(errors.FormatError, match="of token 7"):
            checked_forward(model, [1, 7, 2])
        assert np.isfinite(checked_forward(model, [1, 2, 3])).all()


def test_activations_that_overflow_are_not_blamed_on_a_weight(tmp_path):
    model = reference.make_model(CASES["mixtral"], "f32", 0)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e30)
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e30)
    model.save_pretrained(tmp_path / "model")
    with (
        load(tmp_path / "model") as loaded,
        pytest.raises(errors.FormatError, match=r"layer 1 .*too large for float32"),
    ):
        checked_forward(loaded, IDS)


@pytest.mark.usefixtures("own_weights")
def test_the_tools_refuse_and_write_no_trace(model_copy, run_cli, tmp_path):
    tensor = "model.layers.1.mlp.gate.weight"
    with Damage(model_copy, tensor, 5, "nan"):
        done = run_cli("-m", model_copy, "-n", "3", "-q", "hi")
        assert done.returncode == 1 and tensor in done.stderr
        out = tmp_path / "t.safetensors"
        options = f"-m {model_copy} --samples 2 --length 16 -q -o {out}".split()
        recorded = CliRunner().invoke(trace, ["record", *options])
        assert recorded.exit_code == 1 and tensor in recorded.output
        assert not out.exists()
