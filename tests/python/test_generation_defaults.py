"""Sampling as generation_config.json says: in Python, on the command line, in batches."""

import json
import warnings

import pytest
from conftest import as_json, assert_failed, change_json, moe_run_command, offline_environment

import moerun
from moerun.errors import FormatError, MoerunWarning
from moerun.generation_defaults import GenerationDefaults


def defaults_of(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return GenerationDefaults.of_model(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"top_k": 20}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": None, "top_k": None},
            {"temperature": 1.0, "top_k": 50},
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 0, "min_p": 0.1},
            {"temperature": 0.6, "top_k": 0, "min_p": 0.1},
        ),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"max_new_tokens": 7, "stop_strings": "END"}, {"max_new_tokens": 7, "stop": ("END",)}),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "max_time": None}, {}),
    ],
)
def test_the_file_means_what_it_means_to_transformers(tmp_path, fields, expected):
    assert defaults_of(tmp_path, **fields) == GenerationDefaults(**expected)


def test_sampling_settings_are_those_that_transformers_would_take(tmp_path):
    transformers = pytest.importorskip("transformers")
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
    ours = defaults_of(tmp_path, **fields)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    theirs.update(
        **transformers.GenerationConfig._get_default_generation_params(), defaults_only=True
    )
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_model_without_the_file_takes_the_likeliest_token(tmp_path):
    assert GenerationDefaults.of_model(tmp_path) == GenerationDefaults()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"num_beams": 4}, ["num_beams = 4 is left out"]),
        (
            {"penalty_alpha": 0.6, "no_repeat_ngram_size": 3, "typical_p": 0.9},
            ["penalty_alpha = 0.6", "typical_p = 0.9", "no_repeat_ngram_size = 3", "are left out"],
        ),
        ({"bad_words_ids": [[1]], "suppress_tokens": [2]}, ["bad_words_ids", "suppress_tokens"]),
    ],
)
def test_what_is_not_computed_is_said_in_one_note_that_names_file_and_fields(
    tmp_path, fields, parts
):
    (note,) = defaults_of(tmp_path, **fields).notes
    for part in (str(tmp_path / "generation_config.json"), *parts):
        assert part in note


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": True},
        {"temperature": 10**400},
        {"top_k": 1.5},
        {"top_k": -1},
        {"top_k": 2**40},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"do_sample": "yes"},
        {"max_new_tokens": 0},
        {"stop_strings": [1]},
        {"stop_strings": [""]},
    ],
    ids=str,
)
def test_a_value_that_means_nothing_is_refused_by_name(tmp_path, fields):
    with pytest.raises(FormatError, match=rf"generation_config.json.*'{next(iter(fields))}'"):
        defaults_of(tmp_path, **fields)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"temperature": NaN}', "[" * 2000, "\ufeff{}x"])
def test_a_file_that_cannot_be_understood_is_named(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(FormatError, match=r"generation_config\.json"):
        GenerationDefaults.of_model(tmp_path)


# In Python


@pytest.fixture
def sampling(model_copy):
    """The shipped model with settings of its own."""
    fields = {"do_sample": True, "temperature": 0.9, "top_k": 5, "repetition_penalty": 1.3}
    (model_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **fields}))
    return model_copy


def test_arguments_that_are_left_out_are_those_of_the_model(sampling):
    prompt = [1, 2, 3]
    with moerun.Model.load(sampling, device="cpu") as model:
        own = list(model.generate(prompt, 8, seed=4))
        assert model.stats()["sampling"] == {
            "temperature": 0.9,
            "top_k": 5,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.3,
        }
        given = {"temperature": 0.9, "top_k": 5, "repetition_penalty": 1.3}
        assert own == list(model.generate(prompt, 8, seed=4, **given))
        (result,) = model.generate_batch([prompt], max_new_tokens=8, seed=4).results()
        assert result.token_ids == own
        list(model.generate(prompt, 2, temperature=0))
        assert model.stats()["sampling"]["temperature"] == 0
        assert model.stats()["sampling"]["repetition_penalty"] == 1.0
        list(model.generate(prompt, 2, temperature=0, repetition_penalty=1.2))
        assert model.stats()["sampling"]["repetition_penalty"] == 1.2


def test_temperature_0_is_greedy_whatever_the_model_says(sampling, model):
    with moerun.Model.load(sampling, device="cpu") as other:
        prompt = [5, 6, 7]
        text = list(other.generate(prompt, 12, temperature=0, ignore_eos=True))
        assert text == list(model.generate(prompt, 12, temperature=0, ignore_eos=True))
        logits = model.forward([*prompt, *text])
        assert text == logits[len(prompt) - 1 : -1].argmax(axis=1).tolist()


def test_the_length_and_the_ends_of_the_model_count_too(sampling, model):
    change_json(sampling / "generation_config.json", max_new_tokens=3, do_sample=False)
    with moerun.Model.load(sampling, device="cpu") as other:
        assert len(list(other.generate([5, 6], ignore_eos=True))) == 3
        assert len(list(other.generate([5, 6], 5, ignore_eos=True))) == 5


def test_a_note_is_a_warning_at_the_first_text_of_a_model(sampling):
    change_json(sampling / "generation_config.json", num_beams=3)
    with moerun.Model.load(sampling, device="cpu") as model:
        with pytest.warns(MoerunWarning, match="num_beams = 3") as caught:
            model.generate([1, 2], 1)
        assert [each.filename for each in caught] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate([1, 2], 1)


# On the command line


def run_plainly(*args):
    """moe-run without the greedy option that `run_cli` adds."""
    import subprocess

    return subprocess.run(
        [*moe_run_command(), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=offline_environment(),
        stdin=subprocess.DEVNULL,
    )


def test_the_command_line_samples_as_the_model_says(sampling, run_cli):
    options = ["--json", "-n", "8", "--seed", "4", "-m", str(sampling), "import os\n"]
    own = json.loads(run_plainly(*options).stdout)
    assert own["stats"]["sampling"]["temperature"] == 0.9
    same = ["--temperature", "0.9", "--top-k", "5", "--repetition-penalty", "1.3"]
    (sampling / "generation_config.json").unlink()
    assert as_json(run_cli(*same, *options))["token_ids"] == own["token_ids"]


def test_lines_of_a_batch_are_sampled_as_the_model_says(sampling, tmp_path, run_cli):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('"import os"\n{"prompt": "import os", "temperature": 0}\n')
    options = ["--batch", str(prompts), "-n", "8", "--seed", "4", "-m", str(sampling)]
    first, second = map(json.loads, run_plainly(*options).stdout.splitlines())
    one = ["--json", "-n", "8", "--seed", "4", "-m", str(sampling), "import os"]
    assert first["text"] == json.loads(run_plainly(*one).stdout)["text"]
    assert second["text"] == as_json(run_cli(*one))["text"]


def test_the_note_is_said_once_before_the_text_and_not_with_quiet(sampling, run_cli):
    change_json(sampling / "generation_config.json", num_beams=3)
    options = ["-n", "1", "-m", str(sampling), "import os"]
    assert run_cli(*options).stderr.count("num_beams = 3 is left out") == 1
    assert run_cli("-q", *options).stderr == ""


def test_a_wrong_setting_is_refused_before_the_weights_are_loaded(sampling, run_cli):
    change_json(sampling / "generation_config.json", top_p=7)
    (sampling / "model.safetensors").unlink()
    assert_failed(run_cli("-m", str(sampling), "x"), "generation_config.json", "'top_p'", "7")


def test_the_shipped_model_samples(default_path):
    defaults = GenerationDefaults.of_model(default_path)
    assert 0 < defaults.temperature < 1
    assert defaults.repetition_penalty > 1
    assert not defaults.notes
