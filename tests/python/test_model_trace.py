"""Routing as the model records it: against its own logits, its text, and its cache."""

import numpy as np
import pytest

import moerun
from moerun.errors import InvalidArgumentError
from moerun.trace import CACHE_EVENT_KINDS


@pytest.fixture(scope="module")
def token_ids(tokenizer):
    return tokenizer.encode("import os\n\n\ndef walk(top):\n    for name in os.listdir(top):\n" * 4)


@pytest.fixture(scope="module")
def routing(model, token_ids):
    return model.trace(token_ids, with_weights=True, with_logits=True, with_predictions=True)


def test_the_routing_of_every_token_and_layer_is_there(model, token_ids, routing):
    tokens = len(token_ids)
    assert model.moe_layers == list(range(8))
    assert routing.expert_ids.shape == routing.expert_weights.shape == (8, tokens, 4)
    assert routing.router_logits.shape == (8, tokens, 32)
    assert routing.token_ids.tolist() == list(token_ids)
    assert routing.num_tokens == tokens
    assert routing.cache_events is None


def test_experts_are_the_largest_logits_by_falling_score(routing):
    order = np.argsort(-routing.router_logits, axis=-1, kind="stable")[..., :4]
    np.testing.assert_array_equal(routing.expert_ids, order)
    probabilities = np.exp(routing.router_logits - routing.router_logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        routing.expert_weights, np.take_along_axis(probabilities, order, -1), rtol=1e-4
    )


def test_predictions_are_the_likeliest_tokens(model, token_ids, routing):
    assert routing.predicted_ids.tolist() == model.forward(token_ids).argmax(axis=1).tolist()


def test_only_what_is_asked_for_is_recorded(model, token_ids):
    plain = model.trace(token_ids)
    assert plain.expert_weights is plain.router_logits is plain.predicted_ids is None


def test_chunks_of_the_prompt_change_nothing(default_path, token_ids, routing):
    with moerun.Model.load(default_path, prefill_chunk=7, threads=2) as other:
        found = other.trace(token_ids, with_weights=True, with_logits=True, with_predictions=True)
    for name in ("expert_ids", "expert_weights", "router_logits", "predicted_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(routing, name))


def test_decoding_records_the_tokens_that_were_decoded(model, token_ids):
    prompt = token_ids[:30]
    found = model.trace(prompt, generate=12, with_predictions=True, with_weights=True)
    text = list(model.generate(prompt, max_new_tokens=12, ignore_eos=True, temperature=0))
    assert found.token_ids.tolist() == text
    assert found.predicted_ids.tolist()[:-1] == text[1:]
    whole = model.trace([*prompt, *text], with_weights=True)
    np.testing.assert_array_equal(found.expert_ids, whole.expert_ids[:, 30:])
    np.testing.assert_array_equal(found.expert_weights, whole.expert_weights[:, 30:])


def test_sampling_has_a_seed(model, token_ids):
    def text(seed):
        found = model.trace(token_ids[:9], generate=12, temperature=1.5, seed=seed)
        return found.token_ids.tolist()

    assert text(1) == text(1) != text(2)


def test_a_budget_changes_nothing_but_adds_cache_events(default_path, model, token_ids):
    expected = model.trace(token_ids, generate=10)
    with moerun.Model.load(default_path, expert_budget="25%", cache_events=True) as cached:
        prompt = cached.trace(token_ids)
        np.testing.assert_array_equal(prompt.expert_ids, model.trace(token_ids).expert_ids)
        list(cached.generate(token_ids[:5], max_new_tokens=4, ignore_eos=True, temperature=0))
        before = cached.cache_events()
        found = cached.trace(token_ids, generate=10)
        assert cached.cache_events() == before
        np.testing.assert_array_equal(found.expert_ids, expected.expert_ids)
        kinds = [CACHE_EVENT_KINDS[kind] for kind in found.cache_events[:, 3]]
        looked_up = [
            tuple(event[:3])
            for event, kind in zip(found.cache_events.tolist(), kinds, strict=True)
            if kind in ("hit", "top_hit", "miss")
        ]
    used = {
        (token, layer, int(expert))
        for layer in range(8)
        for token in range(10)
        for expert in expected.expert_ids[layer, token]
    }
    assert len(looked_up) == len(used)
    assert set(looked_up) == used


def test_a_single_token_can_be_traced(model, token_ids, routing):
    found = model.trace(token_ids[:1], with_predictions=True)
    np.testing.assert_array_equal(found.expert_ids, routing.expert_ids[:, :1])
    assert found.predicted_ids.tolist() == routing.predicted_ids.tolist()[:1]


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ([], {}, "empty"),
        ([4096], {}, "outside the vocabulary"),
        ([1] * 1025, {}, "1025 tokens"),
        ([1], {"generate": -1}, "generate must be"),
        ([1] * 1000, {"generate": 25}, "generate: expected 1 to 24 tokens after the prompt"),
        ([1], {"generate": 3, "temperature": -1}, "temperature"),
        ([1], {"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_named(model, arguments, options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        model.trace(arguments, **options)
