"""Files of tokenizers of unknown origin: they work, or a FormatError names the file."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moerun import Tokenizer, errors
from moerun.chat import ChatTemplate
from moerun.guarded_calls import guarded_closely
from moerun.json_text import parse_json, read_json_object
from moerun.tokenizer_checks import is_steady, is_steady_regex


def split(regex):
    return {
        "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def replace(text, content):
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def template(special, *pieces):
    return {
        "type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": special,
    }  # fmt: skip


PANICS = {
    "a table that is none": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAP////8="}
    },
    "a table that ends early": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAAAAAAA"}
    },
    "length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "backtracking": {"pre_tokenizer": split("(a+)+$")},
    "nothing replaced": {"normalizer": replace("", "x" * 1000)},
    "a template without its token": {
        "post_processor": template({}, {"SpecialToken": {"id": "<x>", "type_id": 0}})
    },
    "a template of the second text": {
        "post_processor": template({}, {"Sequence": {"id": "B", "type_id": 0}})
    },
    "a decoder that cuts more than there is": {
        "decoder": {"type": "Strip", "content": ".", "start": 3, "stop": 3}
    },
}
FAILURES = {
    "an unknown token that is not there": {
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<nope>"},
    },
    "growth": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [replace("b", ""), *[replace("a", "a" * 99)] * 9],
        }
    },
    "bytes of bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
            ] * 30,
        }
    },
    "dropout": {"model": {"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []}},
    "no model": {"model": None},
    "merges that are none": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}},
    "a prefix that its merges lack": {
        "added_tokens": [],
        "model": {
            "type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": [["a", "é"]],
            "continuing_subword_prefix": "#",
        },
    },
    "another id": {
        "added_tokens": [
            {
                "id": 77777, "content": "<x>", "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
        ]
    },
}  # fmt: skip


@pytest.fixture
def changed(model_copy):
    def change(**parts):
        file = model_copy / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
        return model_copy

    return change


@pytest.mark.parametrize("parts", [*PANICS.values(), *FAILURES.values()], ids=[*PANICS, *FAILURES])
def test_a_tokenizer_that_does_not_work_is_a_format_error(changed, capfd, parts):
    folder = changed(**parts)
    with pytest.raises(errors.FormatError, match=r"tokenizer\.json"):
        tokenizer = Tokenizer(folder)
        tokenizer.encode("a" * 40 + "b", add_special_tokens=True)
        for token_id in range(300):
            tokenizer.stream().push(token_id)
            tokenizer.decode([token_id])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("backtracking", "a" * 40 + "b"), ("a decoder that cuts more than there is", "import os")],
)
def test_moe_run_ends_with_one_line_where_the_library_panics(changed, run_cli, name, prompt):
    done = run_cli("-m", str(changed(**PANICS[name])), "-n", "4", "--device", "cpu", prompt)
    assert done.returncode == 1
    assert "tokenizer.json" in done.stderr.splitlines()[-1]
    assert not any(word in done.stderr for word in ("Traceback", "panicked", "internal error"))


@pytest.mark.parametrize(
    "parts",
    [
        {
            "padding": {
                "strategy": {"Fixed": 10**11}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>",
            }
        },
        {
            "truncation": {
                "direction": "Right", "max_length": 1, "strategy": "OnlySecond", "stride": 7,
            }
        },
    ],
    ids=["padding", "truncation"],
)  # fmt: skip
def test_padding_and_truncation_are_off(changed, tokenizer, parts):
    text = "a text of more than one token"
    assert Tokenizer(changed(**parts)).encode(text) == tokenizer.encode(text)


def test_a_text_that_takes_too_long_is_a_format_error():
    start = time.perf_counter()
    with pytest.raises(errors.FormatError, match=r"here is not a tokenizer.*longer"):
        guarded_closely(lambda: time.sleep(5), "here", 0.1)
    assert time.perf_counter() - start < 3


def test_what_others_write_to_standard_error_meanwhile_is_not_lost(capfd):
    assert guarded_closely(lambda: os.write(2, b"a line\n"), "here", 10.0) == 7
    assert capfd.readouterr().err == "a line\n"


def test_a_closed_standard_error_changes_nothing(default_path):
    program = "import os, sys; os.close(2); import moerun; " + (
        "print(len(moerun.Tokenizer(sys.argv[1]).encode('import os')))"
    )
    command = [sys.executable, "-c", program, str(default_path)]
    assert int(subprocess.run(command, capture_output=True, timeout=60).stdout) > 0


REAL = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"[一-龥]+",
]
ENDLESS = [
    "(a+)+$",
    "(a|aa)*b",
    "(a*)*",
    r"((a)\2)+",
    "(?:a+b?)+c",
    "(a{1,})+",
    "(?:(?:a)|b)*",
    "(",
]


def test_the_patterns_of_real_models_run_without_a_guard():
    assert all(map(is_steady_regex, REAL))
    assert not any(map(is_steady_regex, ENDLESS))


def test_the_shipped_tokenizer_runs_without_a_guard(default_path):
    assert is_steady(read_json_object(default_path / "tokenizer.json"))


BAD_JSON = {
    "a long number": b'{"a": ' + b"1" * 5000 + b"}",
    "900 levels": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "150 levels": b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}",
    "100,000 levels": b"[" * 100000,
    "half a character": b'{"a": "\\ud800"}',
    "half a character in a name": b'{"\\uDFFF": [{"b": 1}]}',
    "no UTF-8": b'{"a": "\xff"}',
    "nothing": b"",
    "a list": b"[1]",
}
READ_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
]


@pytest.mark.parametrize("name", READ_FILES)
@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_cannot_be_read_is_a_format_error_that_names_the_file(model_copy, name, content):
    (model_copy / name).write_bytes(content)
    with pytest.raises(errors.FormatError) as caught:
        Tokenizer(model_copy)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", [*READ_FILES, "chat_template.jinja"])
def test_a_pipe_or_a_folder_is_no_file_of_a_tokenizer(model_copy, name):
    path = model_copy / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(errors.FileError, match=name):
        _ = Tokenizer(model_copy).chat_template
    path.unlink()
    path.mkdir()
    with pytest.raises(errors.FileError, match=name):
        _ = Tokenizer(model_copy).chat_template


def test_a_whole_character_of_two_halves_is_read():
    assert parse_json('"\\ud83d\\ude43"', "here") == "🙃"


@pytest.mark.parametrize("folder", ["a\0b", "\udcff", "/" + "x" * 300, "~nouser", "", None, 5])
def test_a_folder_that_cannot_be_is_an_error_of_moerun(folder):
    with pytest.raises(errors.MoerunError):
        Tokenizer(folder)
    if isinstance(folder, str):
        try:
            assert ChatTemplate.from_directory(Path(folder)) is None
        except errors.MoerunError as error:
            assert "chat_template" in str(error)
