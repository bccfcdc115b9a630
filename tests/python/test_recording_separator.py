"""What stands between the documents of a recording: one rule, the same in both engines."""

import json

import numpy as np
import pytest
import router_families as families
import tokenizers
from conftest import change_json

from moerun import Model, Trace
from moerun.errors import FormatError
from moerun.recording import NativeEngine, TextData, load_transformers, record

WORDS = ["<pad>", "<s>", "</s>", "<end>", "a", "b", "c", "d"]
BOS, EOS, END = 1, 2, 3
DOCUMENTS = TextData("d", ["a b c", "d", "", "c c a b d"])
TOKENS = [[4, 5, 6], [7], [6, 6, 4, 5, 7]]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def weights(tmp_path_factory, request):
    """Models of families with and without class defaults for the token that ends a text."""
    folder = tmp_path_factory.mktemp(request.param)
    families.tiny_model(request.param).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def model_folder(folder, weights, *, config=None, generation=None, template=None, **files):
    """Write a model with a tokenizer of words; `files` are JSON files by name."""
    for file in weights.iterdir():
        if file.name == "config.json":
            (folder / file.name).write_text(file.read_text())
        else:
            (folder / file.name).symlink_to(file)
    change_json(folder / "config.json", eos_token_id=config, bos_token_id=None)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:4])
    if template is not None:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def token_ids(engine, path, length):
    record(engine, [DOCUMENTS], path, length=length, samples=1)
    return next(Trace.open(path).shards()).tensor("token_ids")[0].tolist()


def expected_ids(separator):
    between = [] if separator is None else [separator]
    return [token for document in TOKENS for token in [*document, *between]]


CASES = {
    "bos only": ({"tokenizer_config": {"bos_token": "<s>"}}, BOS),
    "eos only": ({"tokenizer_config": {"eos_token": "</s>"}}, EOS),
    "both": ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, EOS),
    "neither": ({}, None),
    "neither, null": ({"tokenizer_config": {"bos_token": None, "eos_token": None}}, None),
    "with properties": ({"tokenizer_config": {"eos_token": {"content": "</s>"}}}, EOS),
    "another file": ({"special_tokens_map": {"eos_token": "</s>"}}, EOS),
    "two files": (
        {
            "tokenizer_config": {"eos_token": "</s>"},
            "special_tokens_map": {"eos_token": "<end>", "bos_token": "<s>"},
        },
        END,  # as transformers reads them
    ),
    "bos template": ({"tokenizer_config": {"bos_token": "<s>"}, "template": "<s> $A"}, BOS),
    "both template": (
        {
            "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"},
            "template": "<s> $A </s>",
        },
        EOS,
    ),
    "template alone": ({"template": "<s> $A </s>"}, None),
    "config": ({"config": END}, END),
    "config list": ({"config": [END, EOS]}, END),
    "generation config first": ({"config": EOS, "generation": [END, EOS]}, END),
    "tokenizer before config": ({"config": END, "tokenizer_config": {"eos_token": "</s>"}}, EOS),
    "config before bos": ({"config": END, "tokenizer_config": {"bos_token": "<s>"}}, END),
}


@pytest.mark.parametrize("name", CASES)
def test_both_engines_put_the_same_token_between_documents(tmp_path, weights, name):
    options, separator = CASES[name]
    (tmp_path / "m").mkdir()
    folder = model_folder(tmp_path / "m", weights, **options)
    expected = expected_ids(separator)
    with Model.load(folder, device="cpu", threads=1) as model:
        native = token_ids(NativeEngine(model, "m"), tmp_path / "a.safetensors", len(expected))
    engine = load_transformers(folder, device="cpu", threads=1)
    other = token_ids(engine, tmp_path / "b.safetensors", len(expected))
    engine.close()
    assert native == other == expected
    settings = json.loads(Trace.open(tmp_path / "a.safetensors").metadata["recording"])
    assert settings["separator"] == separator


def test_class_defaults_of_a_model_type_are_the_same_in_both_engines(tmp_path, weights):
    folder = model_folder(tmp_path, weights)
    config = json.loads((folder / "config.json").read_text())
    for key in ("eos_token_id", "bos_token_id"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with Model.load(folder, device="cpu", threads=1) as model:
        native = NativeEngine(model, "m").separator
    engine = load_transformers(folder, device="cpu", threads=1)
    assert native == engine.separator
    engine.close()


def test_a_model_without_a_tokenizer_has_its_own_token_between_token_ids(tmp_path, weights):
    folder = model_folder(tmp_path, weights, config=END, tokenizer_config={"eos_token": "</s>"})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with Model.load(folder, device="cpu", threads=1) as model:
        assert NativeEngine(model, "m").separator == END
    engine = load_transformers(folder, device="cpu", threads=1)
    assert engine.separator == END
    engine.close()


@pytest.mark.parametrize("text", ["{", "[]", '{"a":' * 5000])
def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path, weights, text):
    folder = model_folder(tmp_path, weights)
    (folder / "special_tokens_map.json").write_text(text)
    with Model.load(folder, device="cpu", threads=1) as model:
        engine = NativeEngine(model, "m")
        with pytest.raises(FormatError, match=r"special_tokens_map\.json"):
            np.array(engine.separator)
