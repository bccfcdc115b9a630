"""Text that continues a prompt: its first space, stop strings, and special tokens in a chat."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import moerun

PROMPT = "w10 w20 w31"
TEMPLATE = (
    "{% for message in messages %} {{ message.role }} {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def words(vocab_size):
    """Words as SentencePiece has them; every third is a special token without a space."""
    named = ["<|endoftext|>", "<|pad|>", "▁user", "▁assistant"]
    return named + [
        f"<m{number}>" if number % 3 == 0 else f"▁w{number}"
        for number in range(len(named), vocab_size)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, default_path):
    """The shipped model with a tokenizer whose decoder strips the first space of a text."""
    folder = tmp_path_factory.mktemp("left") / "model"
    folder.mkdir()
    for file in default_path.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    vocab_size = json.loads((default_path / "config.json").read_text())["vocab_size"]
    names = words(vocab_size)
    library = tokenizers.Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<|pad|>")
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([name for name in names if name.startswith("<")])
    library.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def own(folder):
    with moerun.Model.load(folder, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def answer(own):
    """Tokens of a sampled answer that begins with a word and has special tokens inside."""
    prompt = own.tokenizer.encode(PROMPT)
    for seed in range(1000):
        options = {"max_new_tokens": 8, "temperature": 3.0, "seed": seed, "ignore_eos": True}
        token_ids = list(own.generate(prompt, **options))
        texts = [own.tokenizer.decode([each], skip_special_tokens=False) for each in token_ids]
        if texts[0].startswith("w") and texts[1].startswith("w") and texts[2].startswith("<m"):
            return prompt, token_ids, options
    raise AssertionError("no seed gives such an answer")


def test_an_answer_keeps_its_first_space_wherever_it_is_shown(
    run_cli, folder, own, answer, tmp_path
):
    prompt, token_ids, options = answer
    whole = own.tokenizer.decode(prompt + token_ids)
    assert whole.startswith(PROMPT + " w")
    text = whole[len(PROMPT) :]
    assert own.tokenizer.decode(token_ids, after=prompt) == text
    stream = own.tokenizer.stream(after=prompt)
    assert "".join([*map(stream.push, token_ids), stream.finish()]) == text
    arguments = ["-m", folder, "-n", "8", "--temperature", "3", "--seed", str(options["seed"])]
    arguments += ["--ignore-eos", "--device", "cpu"]
    assert run_cli("-q", *arguments, PROMPT).stdout == whole + "\n"
    assert json.loads(run_cli("--json", *arguments, PROMPT).stdout)["text"] == text
    batch = tmp_path / "prompts.jsonl"
    batch.write_text(json.dumps(PROMPT) + "\n")
    assert json.loads(run_cli("--batch", batch, "-q", *arguments).stdout)["text"] == text


def test_a_stop_string_that_begins_with_a_space_ends_at_its_token(own, answer):
    prompt, token_ids, options = answer
    first = own.tokenizer.decode(token_ids[:1], after=prompt)
    assert first.startswith(" w")
    generation = own.generate(prompt, stop=first, **options)
    assert list(generation) == token_ids[:1]
    assert generation.finish_reason == "stop"
    (result,) = own.generate_batch([prompt], stop=first, **options).results()
    assert result.token_ids == token_ids[:1]


def test_a_remembered_answer_keeps_its_special_tokens_but_not_the_last(own, answer):
    from moerun_tools.answer import Answer

    prompt, token_ids, options = answer
    found = Answer(own, prompt, **options)
    for _ in found:
        pass
    assert "<m" not in found.text
    assert found.message == own.tokenizer.decode(
        prompt + token_ids, skip_special_tokens=False
    ).removeprefix(PROMPT)
    assert found.message.count("<m") == sum(
        own.tokenizer.decode([each], skip_special_tokens=False).startswith("<m")
        for each in token_ids
    )


def test_the_next_prompt_of_a_chat_has_the_tokens_of_the_answer(run_cli, folder, own):
    tokenizer = own.tokenizer
    arguments = ["-m", folder, "-n", "6", "--temperature", "3", "--ignore-eos", "--device", "cpu"]
    for seed in range(50):
        messages = [{"role": "user", "content": "w10"}]
        prompt = tokenizer.encode(tokenizer.chat_template.render(messages), False)
        first = list(own.generate(prompt, 6, temperature=3.0, seed=seed, ignore_eos=True))
        message = tokenizer.decode(first, skip_special_tokens=False, after=prompt)
        if "<m" in message:
            break
    messages += [{"role": "assistant", "content": message}, {"role": "user", "content": "w20"}]
    prompt = tokenizer.encode(tokenizer.chat_template.render(messages), False)
    assert [each for each in first if each in prompt]
    second = list(own.generate(prompt, 6, temperature=3.0, seed=seed, ignore_eos=True))
    done = run_cli("-i", "--chat", "-q", *arguments, "--seed", str(seed), "w10", stdin="w20\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == tokenizer.decode(second, after=prompt)


def test_the_token_that_ends_an_answer_is_not_remembered(own, folder, answer, tmp_path):
    from moerun_tools.answer import Answer

    prompt, token_ids, options = answer
    assert token_ids[2] not in token_ids[:2]  # a special token, which shall end the text
    for file in folder.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = token_ids[2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    sampling = json.loads((folder / "generation_config.json").read_text())
    sampling.pop("eos_token_id", None)
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    with moerun.Model.load(tmp_path, device="cpu") as model:
        found = Answer(model, prompt, **{**options, "ignore_eos": False})
        assert "".join(found) == found.message == own.tokenizer.decode(token_ids[:2], after=prompt)
    assert found.token_ids == token_ids[:3]
