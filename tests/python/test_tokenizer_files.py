"""Tokens and template variables of many folders are those of transformers."""

import json
import random
import re
import warnings

import pytest
import tokenizer_folders
from tokenizer_folders import TEXTS, random_folder, some

import moerun
from moerun import errors


@pytest.fixture(scope="module")
def auto_tokenizer():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoTokenizer


def facts_of_transformers(auto_tokenizer, folder):
    theirs = auto_tokenizer.from_pretrained(folder)
    ids = [theirs(text)["input_ids"] for text in TEXTS]
    plain = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    texts = [
        theirs.decode(each, skip_special_tokens=skip) for each in ids for skip in (True, False)
    ]
    theirs.chat_template = "{{ messages[0].content }}"
    variables = {name: text for name, text in theirs.special_tokens_map.items()}
    return {"ids": ids, "plain": plain, "texts": texts, "variables": variables}


def facts_of_moerun(folder):
    ours = moerun.Tokenizer(folder)
    ids = [ours.encode(text) for text in TEXTS]
    plain = [ours.encode(text, add_special_tokens=False) for text in TEXTS]
    texts = [ours.decode(each, skip_special_tokens=skip) for each in ids for skip in (True, False)]
    return {"ids": ids, "plain": plain, "texts": texts, "variables": ours._special_tokens}


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_ids_texts_and_special_tokens_are_those_of_transformers(auto_tokenizer, tmp_path, first):
    compared = 0
    for seed in range(first, first + 50):
        folder = random_folder(seed, tmp_path / str(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = facts_of_transformers(auto_tokenizer, folder)
            except Exception:
                theirs = None
        try:
            ours = facts_of_moerun(folder)
        except errors.MoerunError as error:
            assert theirs is None or is_a_contradiction(str(error), auto_tokenizer, folder), seed
            continue
        if theirs is not None:
            for name in theirs:
                assert ours[name] == theirs[name], (seed, name)
            compared += 1
    assert compared > 25


def is_a_contradiction(message, auto_tokenizer, folder):
    """Whether a file gives a token an id that transformers does not give it."""
    found = re.search(r"gives the token '(.*)' the id (\d+), but .* has (\w+) for it", message)
    if found is None:
        return False
    there = auto_tokenizer.from_pretrained(folder).get_vocab().get(found[1])
    return str(there) == found[3] != found[2]


CONVERSATION = [
    {"role": "system", "content": "Be <brief> & 'kind'.", "name": None},
    {"role": "user", "content": "Hi", "extra": [1, 2.5, True, None, {"a": "ü"}]},
    {"role": "assistant", "content": "A", "reasoning": "why", "tool_calls": None},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": [2]}}}]
DOCUMENTS = [{"title": "T", "text": "<text>"}]
NAMES = [*tokenizer_folders.NAMES, *tokenizer_folders.OTHER_NAMES, "name_0_token", "name_1_token"]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "".join(f"{name}={{{{ {name} }}}} {{{{ {name} is defined }}}}\n" for name in NAMES),
    "{% if tools is none %}none{% elif tools is defined %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{{ documents | tojson }}{{ documents is none }}",
    "{{ messages | tojson }}{{ messages[1].extra }}{{ messages[2] }}"
    "{{ messages[0].name is defined }}",
    "{% generation %}{% for n in range(5) %}{% if n == 1 %}{% continue %}{% endif %}"
    "{% if n > 3 %}{% break %}{% endif %}{{ n }}{{ loop.last }}{% endfor %}{% endgeneration %}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ dict(x=1) }}"
    "{{ '%s-%05d' | format('a', 7) }}{{ [3, 1, 2] | sort | join(',') }}{{ 'ab'[::-1] }}",
    "{% set ns = namespace(_a=1) %}",
    "{% macro m(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}{{ m(1, y=3) }}"
    "{{ strftime_now('%Y') }}",
    "  {%- if true %}\n  x\n  {%- endif %}\n{{ messages[2].reasoning_content }}"
    "{{ messages[2].thinking }}",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ undefined_name }}{{ messages[0].nothing }}{{ messages[0].nothing is defined }}",
    "{{ messages[0].nothing.more }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_sees_what_transformers_shows_it(auto_tokenizer, tmp_path, template):
    for seed in (30, 31, 33, 34, 35, 37):
        folder = random_folder(seed, tmp_path / str(seed))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        theirs, ours = auto_tokenizer.from_pretrained(folder), moerun.Tokenizer(folder)
        for options in (
            {},
            {"tools": TOOLS},
            {"documents": DOCUMENTS, "add_generation_prompt": True},
        ):
            assert of_moerun(ours, options) == of_transformers(theirs, options), seed


def of_transformers(tokenizer, options):
    try:
        return tokenizer.apply_chat_template(CONVERSATION, tokenize=False, **options)
    except Exception:
        return "an error"


def of_moerun(tokenizer, options):
    try:
        return tokenizer.chat_template.render(
            CONVERSATION, **{"add_generation_prompt": False, **options}
        )
    except errors.MoerunError:
        return "an error"


@pytest.mark.parametrize("seed", range(40))
def test_the_template_is_the_one_that_transformers_takes(auto_tokenizer, tmp_path, seed):
    rng = random.Random(seed)
    folder = random_folder(30, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = some(rng, ["default", "tool_use", "rag"], 0.6)
    config["chat_template"] = rng.choice(
        [
            None,
            "config",
            [{"name": name, "template": f"config {name}"} for name in named],
            {name: f"config {name}" for name in named},
        ]
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if rng.random() < 0.4:
        (folder / "chat_template.jinja").write_text("file")
    if rng.random() < 0.4:
        (folder / "additional_chat_templates").mkdir()
        for name in some(rng, ["default", "tool_use", "rag"], 0.5):
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"folder {name}")
    theirs, ours = auto_tokenizer.from_pretrained(folder), moerun.Tokenizer(folder)
    try:
        has_one = ours.chat_template is not None
    except errors.FormatError as error:
        assert "no template named 'default'" in str(error)
        assert of_transformers(theirs, {}) == "an error"
        return
    for options in ({}, {"tools": TOOLS}):
        expected = of_transformers(theirs, options)
        assert (of_moerun(ours, options) if has_one else "an error") == expected
