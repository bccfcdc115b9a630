import array
import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import change_json

import moerun
from moerun import Model, errors
from moerun.stop_strings import StopStrings

PROMPT = '# Licensed under the Apache License, Version 2.0 (the "License");\n'


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer.encode(PROMPT)


@pytest.fixture(scope="module")
def greedy(model, prompt):
    return list(model.generate(prompt, max_new_tokens=24, temperature=0))


def test_forward_gives_finite_logits_for_each_token(model, prompt):
    logits = model.forward(prompt)
    assert logits.shape == (len(prompt), model.config["vocab_size"])
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_the_logits_of_a_token_do_not_depend_on_those_after_it(model, prompt):
    whole = model.forward(prompt)
    np.testing.assert_allclose(model.forward(prompt[:5]), whole[:5], rtol=0, atol=1e-3)


def test_greedy_generation_takes_the_likeliest_token_of_forward(model, prompt, greedy):
    logits = model.forward([*prompt, *greedy])
    expected = logits[len(prompt) - 1 : -1].argmax(axis=1)
    assert greedy == expected.tolist()


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        np.array,
        iter,
        lambda ids: np.array(ids, dtype=np.int16),
        lambda ids: np.array(ids, dtype=np.uint64),
        lambda ids: np.array(ids * 2, dtype=np.int32)[: len(ids)],
        lambda ids: np.repeat(np.array(ids), 2)[::2],
        lambda ids: array.array("i", ids),
        lambda ids: [np.int32(token_id) for token_id in ids],
    ],
)
def test_any_sequence_of_integers_is_a_prompt(model, prompt, greedy, convert):
    assert list(model.generate(convert(prompt), max_new_tokens=4, temperature=0)) == greedy[:4]


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], "empty"),
        (np.array([], dtype=np.int64), "empty"),
        ("text", "encode"),
        (b"text", "encode"),
        (7, "sequence"),
        (None, "sequence"),
        ([1, 2.0], "position 1"),
        ([True, 1], "position 0"),
        ([1, None], "position 1"),
        (np.array([1.0, 2.0]), "float64"),
        (np.array([True]), "bool"),
        (np.array([[1, 2]]), r"\(1, 2\)"),
        (np.array(3), r"\(\)"),
        ([1, 4096], "4096 at position 1"),
        ([-1], "-1 at position 0"),
        ([2**70], "position 0"),
        (np.array([2**63], dtype=np.uint64), "position 0"),
    ],
)
def test_a_bad_prompt_is_refused_at_the_call(model, token_ids, expected):
    for call in (model.forward, model.generate):
        with pytest.raises(errors.InvalidArgumentError, match=expected):
            call(token_ids)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.0},
        {"stop": [4096]},
        {"stop": [-1]},
        {"stop": ["ok", ""]},
        {"stop": [1.5]},
        {"stop": True},
    ],
)
def test_a_bad_argument_is_refused_at_the_call_and_named(model, arguments):
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(arguments))):
        model.generate([1, 2, 3], **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"threads": 0},
        {"threads": 1.5},
        {"threads": True},
        {"context_length": 0},
        {"prefill_chunk": 0},
        {"device": "toaster"},
        {"device": None},
        {"cpu_kernels": "abacus"},
    ],
)
def test_a_bad_argument_of_load_is_refused_and_named(default_path, arguments):
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(arguments))):
        Model.load(default_path, **arguments)


def test_generation_is_an_iterator_that_can_be_left(model, prompt, greedy):
    generation = model.generate(prompt, max_new_tokens=24, temperature=0)
    assert iter(generation) is generation
    assert generation.prompt_tokens == len(prompt)
    assert list(itertools.islice(generation, 3)) == greedy[:3]
    assert generation.finish_reason is None
    assert list(generation) == greedy[3:]
    assert generation.finish_reason == "length"
    assert next(generation, None) is None
    assert list(model.generate(prompt, max_new_tokens=2, temperature=0)) == greedy[:2]


def test_the_same_seed_gives_the_same_tokens(model, prompt):
    def sample(seed):
        return list(model.generate(prompt, max_new_tokens=16, temperature=1.5, seed=seed))

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)
    assert len(sample(2**64 - 1)) == 16


def test_a_drawn_seed_is_reported_and_repeats_the_text(model, prompt):
    tokens = list(model.generate(prompt, max_new_tokens=12, temperature=1.5))
    seed = model.stats()["seed"]
    again = list(model.generate(prompt, max_new_tokens=12, temperature=1.5, seed=seed))
    assert tokens == again
    list(model.generate(prompt, max_new_tokens=1, temperature=0))
    assert model.stats()["seed"] != seed


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_sampling_among_one_token_is_greedy(model, prompt, greedy, narrow):
    sampled = model.generate(prompt, max_new_tokens=24, temperature=2.0, seed=3, **narrow)
    assert list(sampled) == greedy


def test_a_repetition_penalty_changes_a_text_that_repeats(model, tokenizer):
    prompt = tokenizer.encode("import os\nimport os\nimport os\n")
    plain = list(model.generate(prompt, max_new_tokens=8, temperature=0))
    assert (
        list(model.generate(prompt, max_new_tokens=8, repetition_penalty=3.0, temperature=0))
        != plain
    )


def test_a_stop_token_ends_the_text_and_is_part_of_it(model, prompt, greedy):
    stop = greedy[5]
    expected = greedy[: greedy.index(stop) + 1]
    for value in (stop, [stop], (stop,), {stop}, np.array(greedy)[5]):
        generation = model.generate(prompt, max_new_tokens=24, stop=value, temperature=0)
        assert list(generation) == expected
        assert generation.finish_reason == "stop"


def test_a_stop_string_ends_the_text_with_the_token_that_completes_it(model, tokenizer, prompt):
    greedy = list(model.generate(prompt, max_new_tokens=24, temperature=0))
    whole = tokenizer.decode(greedy)
    needle = whole[len(whole) // 2 : len(whole) // 2 + 6]
    for stop in (needle, [needle], ["not in the text", needle]):
        generation = model.generate(prompt, max_new_tokens=24, stop=stop, temperature=0)
        tokens = list(generation)
        assert tokens == greedy[: len(tokens)]
        assert needle in tokenizer.decode(tokens)
        assert needle not in tokenizer.decode(tokens[:-1])
        assert generation.finish_reason == "stop"


@pytest.mark.parametrize("stops", [["caab"], ["xyzxyzxyz", "aab"], ["d"], ["abcaabcd"], ["none"]])
def test_a_stop_string_is_seen_however_tokens_cut_it(stops):
    whole = "abcaabcd"
    for cuts in itertools.product(["", " "], repeat=len(whole) - 1):
        marked = "".join(itertools.chain(*zip(whole, [*cuts, ""], strict=True)))
        pieces = ["", *marked.split()]
        watched = StopStrings(stops, SimpleNamespace(push=pieces.__getitem__))
        for idx in range(len(pieces)):
            text = "".join(pieces[: idx + 1])
            found = any(stop in text for stop in stops)
            assert watched.push(idx) == found
            if found:
                break


def test_a_stop_string_in_the_prompt_does_not_count(model, prompt):
    assert len(list(model.generate(prompt, max_new_tokens=3, stop=PROMPT[:20], temperature=0))) == 3


def test_the_end_of_text_token_ends_the_text_unless_ignored(model_copy, prompt, greedy):
    eos = greedy[5]
    change_json(model_copy / "config.json", eos_token_id=eos)
    change_json(model_copy / "generation_config.json", eos_token_id=eos)
    with Model.load(model_copy) as model:
        assert eos in model.config["eos_token_ids"]
        generation = model.generate(prompt, max_new_tokens=24, temperature=0)
        assert list(generation) == greedy[: greedy.index(eos) + 1]
        assert generation.finish_reason == "eos"
        assert (
            list(model.generate(prompt, max_new_tokens=24, ignore_eos=True, temperature=0))
            == greedy
        )


def test_generation_ends_when_the_context_is_full(default_path, prompt):
    with Model.load(default_path, context_length=len(prompt) + 5) as model:
        assert model.context_length == len(prompt) + 5
        for max_new_tokens in (None, 100):
            generation = model.generate(prompt, max_new_tokens, ignore_eos=True, temperature=0)
            assert len(list(generation)) == 5
            assert generation.finish_reason == "context"
        generation = model.generate(prompt, 5, ignore_eos=True, temperature=0)
        assert len(list(generation)) == 5
        assert generation.finish_reason == "length"


def test_a_prompt_longer_than_the_context_names_both_numbers(default_path):
    with Model.load(default_path, context_length=16) as model:
        assert model.forward([5] * 16).shape[0] == 16
        with pytest.raises(errors.InvalidArgumentError, match=r"17 tokens.*context of 16"):
            model.forward([5] * 17)
        with pytest.raises(errors.InvalidArgumentError, match=r"16 tokens.*at most 15"):
            model.generate([5] * 16, temperature=0)


def test_several_models_run_side_by_side(default_path, model, prompt, greedy):
    with Model.load(default_path, threads=1) as second:
        pairs = zip(
            model.generate(prompt, max_new_tokens=12, temperature=0),
            second.generate(prompt, max_new_tokens=12, temperature=0),
            strict=True,
        )
        assert list(pairs) == [(token, token) for token in greedy[:12]]
    assert list(model.generate(prompt, max_new_tokens=3, temperature=0)) == greedy[:3]


def test_several_generations_of_one_model_run_side_by_side(model, prompt, greedy):
    first = model.generate(prompt, max_new_tokens=12, temperature=0)
    second = model.generate(prompt[:4], max_new_tokens=12, temperature=0)
    alone = list(model.generate(prompt[:4], max_new_tokens=12, temperature=0))
    assert list(zip(first, second, strict=True)) == list(zip(greedy[:12], alone, strict=True))


def test_logits_are_bit_identical_for_any_number_of_threads(default_path, model, prompt):
    expected = model.forward(prompt)
    for threads in (1, 3):
        with Model.load(default_path, device=model.device, threads=threads) as other:
            np.testing.assert_array_equal(other.forward(prompt), expected)


def test_a_prompt_may_be_computed_in_chunks(default_path, model, prompt):
    with Model.load(default_path, device=model.device, prefill_chunk=5) as other:
        np.testing.assert_allclose(other.forward(prompt), model.forward(prompt), rtol=0, atol=1e-3)


def test_statistics_start_empty_and_then_describe_the_last_generation(default_path, prompt):
    with Model.load(default_path, threads=2) as model:
        fresh = model.stats()
        assert fresh["load"]["bytes"] > 20e6
        assert fresh["load"]["seconds"] > 0
        assert fresh["threads"] == 2
        assert set(fresh["memory"]) == {
            "resident_bytes",
            "expert_bytes",
            "kv_cache_bytes",
            "scratch_bytes",
        }
        measured = [
            "ttft_s",
            "prefill_tokens_per_s",
            "decode_tokens_per_s",
            "decode_gb_per_s",
            "logits_hash",
            "seed",
            "finish_reason",
        ]
        assert all(fresh[name] is None for name in measured)
        list(model.generate(prompt, max_new_tokens=4, seed=5, temperature=0))
        stats = model.stats()
        assert all(stats[name] is not None for name in measured)
        assert stats["prompt_tokens"] == len(prompt)
        assert stats["generated_tokens"] == 4
        assert stats["seed"] == 5
        assert stats["finish_reason"] == "length"


def test_the_hash_of_the_logits_tells_runs_apart(model, prompt):
    def logits_hash(token_ids):
        list(model.generate(token_ids, max_new_tokens=2, temperature=0))
        return model.stats()["logits_hash"]

    assert logits_hash(prompt) == logits_hash(prompt)
    assert logits_hash(prompt) != logits_hash(prompt[1:])


def test_progress_grows_to_the_size_of_the_model(default_path):
    seen = []
    Model.load(default_path, progress=lambda done, total: seen.append((done, total))).close()
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert seen[-1] == (totals[0], totals[0])
    assert len(set(totals)) == 1


def test_an_exception_of_progress_ends_the_loading(default_path):
    class StoppedError(Exception):
        pass

    def stop(done, total):
        raise StoppedError

    with pytest.raises(StoppedError):
        Model.load(default_path, progress=stop)


def test_a_closed_model_says_so(default_path, prompt):
    model = Model.load(default_path)
    model.close()
    model.close()
    assert "closed" in repr(model)
    for call in (
        lambda: model.forward(prompt),
        lambda: model.generate(prompt, temperature=0),
        model.stats,
        lambda: model.config,
        lambda: model.context_length,
    ):
        with pytest.raises(errors.MoerunError, match="closed"):
            call()


def test_a_model_without_a_tokenizer_still_computes(model_copy, prompt, greedy):
    (model_copy / "tokenizer.json").unlink()
    with Model.load(model_copy) as model:
        assert list(model.generate(prompt, max_new_tokens=3, temperature=0)) == greedy[:3]
        with pytest.raises(errors.MissingFileError, match=r"tokenizer\.json"):
            _ = model.tokenizer
        with pytest.raises(errors.MissingFileError, match=r"tokenizer\.json"):
            model.generate(prompt, stop="text", temperature=0)


def test_the_representation_says_what_the_model_is(model):
    assert "olmoe" in repr(model)
    assert "num_experts=32" in repr(model)
    assert str(model.path) in repr(model)


def test_the_configuration_is_a_copy(model):
    config = model.config
    assert (config["num_experts"], config["top_k"], config["eos_token_ids"]) == (32, 4, [0])
    config.clear()
    assert model.config["vocab_size"] == 4096


def test_the_build_says_what_is_in_it():
    info = moerun.build_info()
    assert info["version"] == moerun.__version__
    assert info["cpu_kernels"]["chosen"] in info["cpu_kernels"]["compiled"]
    assert info["cuda"]["compiled"] in (True, False)
    assert isinstance(info["cuda_architectures"], list)


def test_auto_takes_cuda_where_the_build_says_that_it_can_be_had(model, default_path):
    cuda = moerun.build_info()["cuda"]
    sizes = moerun.dry_run(default_path)
    assert sizes["device"] == ("cuda" if cuda["available"] else "cpu")
    assert sizes["device_reason"].startswith("found " if cuda["available"] else "no CUDA: ")
    assert cuda["reason"] in sizes["device_reason"]
    assert 0 < sizes["device_free_bytes"] <= sizes["device_total_bytes"]
    assert model.stats()["device_reason"] == "asked for"


def test_cuda_that_cannot_be_had_is_refused_with_the_reason(default_path):
    cuda = moerun.build_info()["cuda"]
    if cuda["available"]:
        pytest.skip("it can be had here")
    for call in (Model.load, moerun.dry_run):
        with pytest.raises(errors.InvalidArgumentError, match=re.escape(cuda["reason"])):
            call(default_path, device="cuda")


def test_a_device_error_says_what_to_do_about_it():
    assert "load the model again" in errors.DeviceError.__doc__


def test_every_exported_name_exists():
    for name in moerun.__all__:
        assert hasattr(moerun, name)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidArgumentError, ValueError),
        (errors.FormatError, ValueError),
        (errors.UnsupportedModelError, ValueError),
        (errors.OutOfMemoryError, MemoryError),
        (errors.DeviceError, RuntimeError),
        (errors.FileError, OSError),
        (errors.MissingFileError, FileNotFoundError),
    ],
)
def test_every_error_is_a_moerun_error_and_a_builtin_one(kind, builtin):
    assert issubclass(kind, errors.MoerunError)
    assert issubclass(kind, builtin)
    assert str(kind("a message")) == "a message"
