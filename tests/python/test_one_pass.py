"""A text that grows token by token is the text computed at once, bit for bit."""

from functools import reduce

import numpy as np
import pytest
import reference

import moerun

ORIGINAL = 40  # of reference.longrope()
CONTEXT = 52
CHUNK = 9
START = 4


def fnv(values):
    """The hash of logits that `Model.stats` tells."""
    bits = np.asarray(values, np.float32).view(np.uint32).tolist()
    return reduce(
        lambda seen, value: ((seen ^ value) * 0x100000001B3) & (2**64 - 1),
        bits,
        0xCBF29CE484222325,
    )


@pytest.fixture(scope="module", params=[case.name for case in reference.CASES])
def directory(request, tmp_path_factory):
    case = next(case for case in reference.CASES if case.name == request.param)
    made = tmp_path_factory.mktemp(request.param) / "model"
    reference.make_model(case, "f32", 3).save_pretrained(made)
    return made


def load(directory, **options):
    given = {"threads": 1, "context_length": CONTEXT, "prefill_chunk": CHUNK, **options}
    return moerun.Model.load(directory, device="cpu", **given)


def thresholds(model):
    windows = {model.config.get("sliding_window") or 0, 7, 8, 9, 10}
    return sorted(
        {
            length + near
            for length in {*windows, CHUNK, 2 * CHUNK, ORIGINAL}
            for near in (-1, 0, 1)
            if length + near >= START
        }
    )


def grown(model, prompt):
    """The text up to the context's end, and the hash of the logits before each new token."""
    text, hashes = list(prompt), []
    for token in model.generate(
        prompt, ignore_eos=True, max_new_tokens=CONTEXT - len(prompt), temperature=0
    ):
        hashes.append(int(model.stats()["logits_hash"], 16))
        text.append(token)
    return text, hashes


def test_every_token_has_the_logits_of_one_pass_over_all_before_it(directory):
    with load(directory) as model, load(directory, threads=2) as other:
        other_chunk = moerun.Model.load(directory, device="cpu", threads=1)
        text, hashes = grown(model, range(20, 20 + START))
        assert len(text) == CONTEXT
        for length, found in enumerate(hashes, start=START):
            once = other.forward(text[:length])[-1]
            assert fnv(once) == found, f"{length} tokens"
            if length in (ORIGINAL, ORIGINAL + 1, CONTEXT - 1):
                assert np.array_equal(other_chunk.forward(text[:length])[-1], once)
        other_chunk.close()
        # The text may begin to grow anywhere.
        for length in thresholds(model):
            again, hashes_again = grown(model, text[:length])
            assert again == text
            assert hashes_again == hashes[length - START :]


def test_a_batch_across_every_threshold_has_the_texts_of_each_alone(directory):
    with load(directory) as model:
        text, _ = grown(model, range(20, 20 + START))
        prompts = [text[:length] for length in thresholds(model)]
        for size in (3, CHUNK):
            batch = model.generate_batch(
                prompts, batch_size=size, max_new_tokens=CONTEXT, temperature=0
            )
            answers = [
                prompt + list(result.token_ids)
                for prompt, result in zip(prompts, batch.results(), strict=True)
            ]
            for answer in answers:
                assert answer[:CONTEXT] == text[: len(answer[:CONTEXT])]


def test_the_routing_of_decoding_is_that_of_the_text_as_a_prompt(directory):
    """Also of the tokens before a threshold that the text crosses later."""
    smallest = moerun.dry_run(directory, device="cpu")["smallest_budget_bytes"]
    for options in ({}, {"expert_budget": smallest}):
        with load(directory, **options) as model:
            text, _ = grown(model, range(20, 20 + START))
            for prompt, new in ((30, 9), (30, 12), (ORIGINAL - 1, 4), (ORIGINAL, 3), (5, 30)):
                decoded = model.trace(text[:prompt], generate=new)
                whole = model.trace(text[: prompt + new])
                assert np.array_equal(decoded.token_ids, whole.token_ids[prompt:])
                assert np.array_equal(decoded.expert_ids, whole.expert_ids[:, prompt:])


def test_a_text_with_a_cache_of_experts_crosses_the_threshold_too(directory):
    smallest = moerun.dry_run(directory, device="cpu")["smallest_budget_bytes"]
    with load(directory) as model, load(directory, expert_budget=smallest) as cached:
        prompt = range(20, 20 + START)
        assert grown(model, prompt) == grown(cached, prompt)
