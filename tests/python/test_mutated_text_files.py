"""Mutants of the files of a tokenizer: each works, or a MoerunError says what is wrong.

MOERUN_MUTATION_SECONDS gives the seconds for each target; without it there are a few mutants.
"""

import json
import random
import resource
import shutil
import time

import pytest
from mutations import mutate_json, mutate_template, mutations, seeds
from tokenizer_folders import sentencepiece

from moerun import Tokenizer, errors
from moerun.chat import ChatTemplate

TEXT = "import os\n  def f(x): return x  # the cat, <|endoftext|> é 🙃 12.5"
MOST_SECONDS = 40.0  # of one mutant, on a machine with other work
MOST_MIB = 600  # that all mutants of a target may add
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif loop.last %}"
    "{% set ns = namespace(n=loop.index0) %}{{ message.content.split('x')[-1] ~ ns.n }}"
    "{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}"
    "{%- if tools is not none %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% macro f(a, b=1) %}{{ a }}{{ b }}{% endmacro %}{{ f(1, b=[1, 2][::-1]) }}"
)
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "special": True},
    "eos_token": "</s>",
    "eot_token": "<x>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "added_tokens_decoder": {"99999": {"content": "<y>", "special": True}},
    "add_prefix_space": False,
    "chat_template": [{"name": "default", "template": TEMPLATE}],
}
MAP = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<z>"]}


@pytest.fixture(autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown >> 10 < MOST_MIB


def small(state):
    """tokenizer.json with the vocabulary of bytes alone, so that a mutant takes milliseconds."""
    vocab = {token: number for token, number in state["model"]["vocab"].items() if len(token) < 3}
    words = sorted(vocab, key=vocab.get)
    vocab = {token: number for number, token in enumerate(words)}
    merges = [merge for merge in state["model"]["merges"] if fits(merge, vocab)][:20]
    return {**state, "model": {**state["model"], "vocab": vocab, "merges": merges}}


def fits(merge, vocab):
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return all(part in vocab for part in [*pair, "".join(pair)])


@pytest.fixture(scope="module")
def states(default_path):
    """A byte-level and a SentencePiece tokenizer.json."""
    shipped = json.loads((default_path / "tokenizer.json").read_text())
    other = json.loads(sentencepiece(random.Random(1), ["<s>", "</s>", "<unk>"]).to_str())
    return [small(shipped), other]


def use(folder):
    """Do everything that a tokenizer can do; the errors that it may raise are fine."""
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode(TEXT)
        tokenizer.encode(TEXT * 20, add_special_tokens=False)
        tokenizer.decode(ids)
        stream = tokenizer.stream(skip_special_tokens=False, after=ids[:5])
        for token_id in [*ids[5:50], *range(20)]:
            stream.push(token_id)
        stream.finish()
        template = tokenizer.chat_template
        if template is not None:
            use_template(template)
    except errors.MoerunError as error:
        str(error).encode()
    assert time.perf_counter() - start < MOST_SECONDS


def use_template(template):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "axb"}]
    template.render(turns, tools=[{"name": "f"}])


def write(folder, name, value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    (folder / name).write_bytes(data)


def test_mutants_of_tokenizer_json_work_or_say_what_is_wrong(states, tmp_path, capfd):
    for rng in seeds("tokenizer.json", 150):
        state = rng.choice(states)
        # Vocabulary and merges are most of the file, and the least of its rules.
        part = rng.choice([*[key for key in state if key != "model"], "model", None])
        if rng.random() < 0.2:
            write(tmp_path, "tokenizer.json", mutations(rng, json.dumps(state).encode()))
        elif part is None:
            write(tmp_path, "tokenizer.json", mutate_json(rng, state))
        else:
            write(tmp_path, "tokenizer.json", {**state, part: mutate_json(rng, state[part])})
        use(tmp_path)
    assert "panicked" not in capfd.readouterr().err


def test_mutants_with_parts_of_other_tokenizers_work_or_say_what_is_wrong(states, tmp_path, capfd):
    for rng in seeds("parts", 150):
        state = dict(rng.choice(states))
        for _ in range(rng.choice([1, 2])):
            part = rng.choice(list(PARTS))
            state[part] = rng.choice(PARTS[part])
            if rng.random() < 0.7:
                state[part] = mutate_json(rng, state[part])
        write(tmp_path, "tokenizer.json", state)
        use(tmp_path)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_mutants_of_the_other_files_work_or_say_what_is_wrong(states, tmp_path, name):
    value = {"tokenizer_config.json": CONFIG, "special_tokens_map.json": MAP}[name]
    for rng in seeds(name, 60):
        write(tmp_path, "tokenizer.json", rng.choice(states))
        write(tmp_path, "config.json", {"model_type": rng.choice(["olmoe", "qwen3_moe", 3])})
        is_raw = rng.random() < 0.25
        base = {key: item for key, item in value.items() if rng.random() < 0.7}
        mutant = mutations(rng, json.dumps(base).encode()) if is_raw else mutate_json(rng, base)
        write(tmp_path, name, mutant)
        if rng.random() < 0.2:
            write(tmp_path, "added_tokens.json", mutate_json(rng, {"<x>": 300, "<y>": 301}))
        use(tmp_path)


def test_mutants_of_templates_work_or_say_what_is_wrong():
    for rng in seeds("template", 150):
        source = mutate_template(rng, TEMPLATE)
        start = time.perf_counter()
        try:
            use_template(ChatTemplate(source, "mutant", {"bos_token": "<s>"}))
        except errors.MoerunError as error:
            str(error).encode()
        assert time.perf_counter() - start < MOST_SECONDS


def test_folders_of_tokenizers_are_left_as_they_were(states, tmp_path):
    write(tmp_path, "tokenizer.json", states[0])
    before = (tmp_path / "tokenizer.json").read_bytes()
    use(tmp_path)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == before


REGEX = {"Regex": r"\p{N}{1,3}|\s+(?!\S)|(?i:'s|'t)| ?[^\s]+"}
PARTS = {
    "normalizer": [
        {"type": "NFKC"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
         "strip_accents": None, "lowercase": True},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
         {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "Nmt"},
         {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "StripAccents"}]},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAA"},
        {"type": "ByteLevel"},
        {"type": "Replace", "pattern": REGEX, "content": "xy"},
    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": REGEX, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
         {"type": "Punctuation", "behavior": "Contiguous"}, {"type": "WhitespaceSplit"},
         {"type": "CharDelimiterSplit", "delimiter": "x"}, {"type": "UnicodeScripts"},
         {"type": "BertPreTokenizer"}, {"type": "FixedLength", "length": 4}]},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ],
    "post_processor": [
        {"type": "TemplateProcessing",
         "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]},
        {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0],
         "trim_offsets": True, "add_prefix_space": True},
        {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True,
         "trim_offsets": False, "use_regex": True}]},
    ],
    "decoder": [
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"},
         "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
         {"type": "Strip", "content": " ", "start": 1, "stop": 1}]},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ],
    "model": [
        {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "<s>"},
        {"type": "WordPiece", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "##b": 3},
         "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9},
        {"type": "Unigram", "vocab": [["<s>", 0.0], ["</s>", 0.0], ["a", -1.0], ["b", -2.0]],
         "unk_id": 0, "byte_fallback": False},
        {"type": "BPE", "dropout": None, "unk_token": "<s>", "continuing_subword_prefix": "##",
         "end_of_word_suffix": "</w>", "fuse_unk": True, "byte_fallback": True,
         "vocab": {"<s>": 0, "</s>": 1, "a": 2, "##b": 3, "ab": 4}, "merges": [["a", "##b"]]},
    ],
    "added_tokens": [
        [{"id": 0, "content": "<s>", "single_word": True, "lstrip": True, "rstrip": True,
          "normalized": True, "special": True}],
    ],
    "truncation": [{"direction": "Left", "max_length": 2, "strategy": "OnlyFirst", "stride": 1}],
}  # fmt: skip
