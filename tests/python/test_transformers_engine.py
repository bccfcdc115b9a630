"""The engine transformers: the experts it records are those that the model used."""

import json

import numpy as np
import pytest
import router_families as families
import torch

from moerun import Model
from moerun.errors import InvalidArgumentError
from moerun.recording import NativeEngine, TraceOptions, load_transformers
from moerun.recording.routers import find_routers
from moerun.recording.transformers_engine import TransformersEngine

TOKENS = np.arange(10, 30, dtype=np.int32)
EVERYTHING = TraceOptions(with_weights=True, with_logits=True)
# transformers 5.23 computes only the experts 0 and 1 of NLLB-MoE; it has a test of its own.
COMPUTED = [name for name in families.FAMILIES if name != "nllb-moe"]


def engine_of(model, name="tiny"):
    return TransformersEngine(model, name, None, {})


@pytest.fixture(scope="module")
def engine_for():
    """Makes the engine of a family once."""
    made = {}

    def get(name):
        if name not in made:
            model = families.tiny_model(name)
            made[name] = (engine_of(model, name), model)
        return made[name]

    return get


def routers_of(model, stack):
    found = [r for r in find_routers(model) if stack.name in (None, r.stack)]
    return {router.layer: router for router in found}


def block_output(engine, block):
    """What a block gives for each token."""
    outputs = []

    def keep(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(output.reshape(-1, output.shape[-1]).clone())

    hook = block.register_forward_hook(keep)
    engine.trace(TOKENS, TraceOptions(), 0)
    hook.remove()
    return outputs[0]


@pytest.mark.parametrize("name", COMPUTED)
def test_changing_an_expert_changes_the_tokens_that_the_trace_says_used_it(engine_for, name):
    engine, model = engine_for(name)
    routings = engine.trace(TOKENS, TraceOptions(), 0)
    for stack, routing in zip(engine.stacks, routings, strict=True):
        routers = routers_of(model, stack)
        for index, layer in enumerate(stack.moe_layers):
            block = routers[layer].block
            tensors_of = families.expert_tensors(block, stack.num_experts)
            before = block_output(engine, block)
            for expert in range(stack.num_experts):
                tensors = tensors_of(expert)
                assert tensors
                with torch.no_grad():
                    kept = [tensor.clone() for tensor in tensors]
                    for tensor in tensors:
                        tensor.mul_(1.5)
                    changed = (block_output(engine, block) != before).any(dim=1).numpy()
                    for tensor, old in zip(tensors, kept, strict=True):
                        tensor.copy_(old)
                recorded = (routing.expert_ids[index] == expert).any(axis=-1)
                assert np.array_equal(changed, recorded), (layer, expert)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_sizes_and_layers_are_those_of_the_configuration(engine_for, name):
    engine, _ = engine_for(name)
    _, layers, num_experts, top_k = families.FAMILIES[name]
    for stack in engine.stacks:
        assert (stack.num_experts, stack.top_k) == (num_experts, top_k)
        assert list(stack.moe_layers) == layers
    for stack, routing in zip(engine.stacks, engine.trace(TOKENS, TraceOptions(), 0), strict=True):
        assert routing.expert_ids.shape == (len(layers), len(TOKENS), top_k)
        ids = np.sort(routing.expert_ids, axis=-1)
        assert (np.diff(ids.astype(int), axis=-1) > 0).all()  # nothing twice
        assert stack.expert_bytes > 0


@pytest.mark.parametrize("name", [n for n in COMPUTED if n != "switch_transformers"])
def test_decoded_tokens_use_the_experts_that_they_use_as_a_prompt(engine_for, name):
    engine, _ = engine_for(name)
    (decoded,) = engine.trace(TOKENS, TraceOptions(generate=6), 0)
    text = np.concatenate([TOKENS, decoded.token_ids])
    (whole,) = engine.trace(text, TraceOptions(), 0)
    assert decoded.expert_ids.shape[1] == 6
    assert np.array_equal(decoded.expert_ids, whole.expert_ids[:, len(TOKENS) :])
    assert np.array_equal(decoded.predicted_ids, whole.predicted_ids[len(TOKENS) :])
    assert decoded.token_ids[1:].tolist() == decoded.predicted_ids[:-1].tolist()


SOFTMAX = ["olmoe", "mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "dbrx", "jamba", "llama4_text"]


@pytest.mark.parametrize("name", SOFTMAX)
def test_experts_stand_by_falling_score_and_their_weights_with_them(engine_for, name):
    engine, _ = engine_for(name)
    (routing,) = engine.trace(TOKENS, EVERYTHING, 0)
    best = np.argsort(-routing.router_logits, axis=-1)[..., : routing.expert_ids.shape[-1]]
    assert np.array_equal(routing.expert_ids, best)
    assert (np.diff(routing.expert_weights, axis=-1) <= 0).all()
    assert (routing.expert_weights > 0).all()


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "lfm2_moe", "ernie4_5_moe"])
def test_groups_and_biases_count_and_not_the_logits_alone(engine_for, name):
    engine, _ = engine_for(name)
    (routing,) = engine.trace(TOKENS, EVERYTHING, 0)
    best = np.argsort(-routing.router_logits, axis=-1)[..., : routing.expert_ids.shape[-1]]
    assert not np.array_equal(np.sort(routing.expert_ids), np.sort(best))


def test_the_order_of_experts_is_by_the_score_that_chose_them_bias_included(engine_for):
    engine, model = engine_for("dots1")
    (routing,) = engine.trace(TOKENS, EVERYTHING, 0)
    stack = engine.stacks[0]
    routers = routers_of(model, stack)
    for index, layer in enumerate(stack.moe_layers):
        bias = routers[layer].module.e_score_correction_bias.detach().numpy()
        scores = 1 / (1 + np.exp(-routing.router_logits[index])) + bias
        chosen = np.take_along_axis(scores, routing.expert_ids[index].astype(int), axis=-1)
        assert (np.diff(chosen, axis=-1) <= 1e-6).all()


def test_routing_of_nllb_is_its_routers_and_the_fault_of_transformers_is_told(engine_for):
    engine, _ = engine_for("nllb-moe")
    for routing in engine.trace(TOKENS, EVERYTHING, 0):
        best = np.argsort(-routing.router_logits, axis=-1)[..., :2]
        assert np.array_equal(routing.expert_ids, best)
    # A version that computes the right experts makes this note, and this line, go away.
    assert any("does not compute the experts" in note for note in engine.notes())


def test_no_other_family_computes_other_experts_than_its_router_chose(engine_for):
    for name in COMPUTED:
        assert engine_for(name)[0].notes() == [], name


def test_choices_beyond_the_capacity_of_an_expert_are_kept_with_weight_0_and_counted():
    engine = engine_of(families.tiny_model("switch_transformers", expert_capacity=1))
    routings = engine.trace(TOKENS, EVERYTHING, 0)
    dropped = sum(int((routing.expert_weights == 0).sum()) for routing in routings)
    assert dropped > 0
    for routing in routings:
        assert np.array_equal(routing.expert_ids[..., 0], routing.router_logits.argmax(axis=-1))
        # An expert computes its first token, no other.
        for ids, weights in zip(routing.expert_ids, routing.expert_weights, strict=True):
            for expert in np.unique(ids):
                of_expert = weights[ids == expert]
                assert of_expert[0] > 0
                assert not of_expert[1:].any()
    assert any("capacity" in note for note in engine.notes())


def test_an_encoder_decoder_model_gives_a_trace_of_each_with_its_own_tokens(engine_for):
    engine, model = engine_for("switch_transformers")
    assert [stack.name for stack in engine.stacks] == ["encoder", "decoder"]
    encoder, decoder = engine.trace(TOKENS, TraceOptions(), 0)
    assert np.array_equal(encoder.token_ids, TOKENS)
    assert np.array_equal(decoder.token_ids, [model.config.decoder_start_token_id, *TOKENS[:-1]])
    assert encoder.predicted_ids is None
    assert decoder.predicted_ids.shape == TOKENS.shape
    prompt, answer = engine.trace(TOKENS, TraceOptions(generate=4), 0)
    assert np.array_equal(prompt.expert_ids, encoder.expert_ids)
    assert answer.expert_ids.shape[1] == len(answer.token_ids) == 4


def test_same_seed_same_sampled_tokens(engine_for):
    engine, _ = engine_for("olmoe")
    options = TraceOptions(generate=8, temperature=1.5)
    one, again, other = (engine.trace(TOKENS, options, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(one.token_ids, again.token_ids)
    assert not np.array_equal(one.token_ids, other.token_ids)


def test_a_text_that_is_longer_than_the_model_allows_is_refused(engine_for):
    engine, _ = engine_for("olmoe")
    with pytest.raises(InvalidArgumentError, match=r"130 tokens .* max_position_embeddings is 128"):
        engine.trace(np.zeros(128, np.int32), TraceOptions(generate=2), 0)


# --- against our own runtime


@pytest.fixture(scope="module")
def both(default_path):
    """The shipped model in both engines."""
    with Model.load(default_path, device="cpu") as model:
        theirs = load_transformers(default_path, dtype="float32")
        yield NativeEngine(model, "tiny-olmoe"), theirs
        theirs.close()


@pytest.fixture(scope="module")
def source_tokens(both):
    with open(json.__file__) as file:
        return np.array(both[0].encode(file.read())[:256], np.int32)


def test_both_engines_give_the_same_experts_weights_and_predictions(both, source_tokens):
    ours, theirs = (engine.trace(source_tokens, EVERYTHING, 0)[0] for engine in both)
    assert np.array_equal(ours.expert_ids, theirs.expert_ids)
    assert np.array_equal(ours.predicted_ids, theirs.predicted_ids)
    np.testing.assert_allclose(ours.expert_weights, theirs.expert_weights, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.router_logits, theirs.router_logits, rtol=0, atol=1e-4)


def test_both_engines_decode_the_same_tokens_with_the_same_experts(both, source_tokens):
    options = TraceOptions(generate=24)
    ours, theirs = (engine.trace(source_tokens[:64], options, 0)[0] for engine in both)
    assert np.array_equal(ours.token_ids, theirs.token_ids)
    assert np.array_equal(ours.expert_ids, theirs.expert_ids)
    assert np.array_equal(ours.predicted_ids, theirs.predicted_ids)


def test_both_engines_describe_the_model_alike_and_tokenise_alike(both):
    ours, theirs = both
    (a,), (b,) = ours.stacks, theirs.stacks
    assert (a.name, a.num_experts, a.top_k, a.moe_layers) == (
        b.name,
        b.num_experts,
        b.top_k,
        b.moe_layers,
    )
    assert b.expert_bytes == 2 * a.expert_bytes  # bfloat16 in the file, float32 in this engine
    assert (ours.vocab_size, ours.separator) == (theirs.vocab_size, theirs.separator)
    assert ours.encode("def main():\n") == theirs.encode("def main():\n")


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "granitemoe"])
def test_both_engines_give_the_same_experts_for_a_model_with_random_weights(
    tmp_path, engine_for, name
):
    engine, model = engine_for(name)
    model.save_pretrained(tmp_path)
    with Model.load(tmp_path, device="cpu") as loaded:
        native = NativeEngine(loaded, name)
        assert native.stacks == list(engine.stacks)
        (ours,) = native.trace(TOKENS, TraceOptions(), 0)
    (theirs,) = engine.trace(TOKENS, TraceOptions(), 0)
    assert np.array_equal(ours.expert_ids, theirs.expert_ids)
