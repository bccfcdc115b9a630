"""Prompts and models that are refused, with the cause and before the weights are loaded."""

import os
import time

import pytest
from conftest import as_json, assert_failed, change_json

BOM = b"\xef\xbb\xbf"
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 4949453792\n"
)


def ids_of(run_cli, *args, **options):
    return as_json(run_cli("--json", "-n", "1", *args, **options))["prompt_token_ids"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(run_cli, tmp_path):
    text = b"import os\nimport sys\n"
    (tmp_path / "bom.txt").write_bytes(BOM + text)
    plain = ids_of(run_cli, stdin=text)
    assert ids_of(run_cli, "-f", str(tmp_path / "bom.txt")) == plain
    assert ids_of(run_cli, stdin=BOM + text) == plain
    (tmp_path / "only.txt").write_bytes(BOM)
    assert_failed(run_cli("-f", str(tmp_path / "only.txt")), "the prompt is empty")


def test_a_utf_16_prompt_says_how_to_convert_it(run_cli, tmp_path):
    (tmp_path / "p.txt").write_text("import os", encoding="utf-16")
    assert_failed(run_cli("-f", str(tmp_path / "p.txt")), "UTF-16", "iconv")


def test_a_pipe_in_place_of_a_prompt_file_is_refused_at_once(run_cli, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    begin = time.monotonic()
    assert_failed(run_cli("-f", str(tmp_path / "pipe")), "is a pipe", "-f -")
    assert_failed(run_cli("-f", "/dev/zero"), "is a device")
    assert time.monotonic() - begin < 30


def test_a_prompt_that_no_context_holds_is_refused_before_it_is_tokenised(run_cli, tmp_path):
    size = 40 << 20
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(size)
    done = run_cli("-f", str(tmp_path / "large.txt"))
    assert_failed(done, "the prompt has 40 MiB of text", "1024 tokens")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)
    assert_failed(run_cli("-f", str(tmp_path / "huge.txt")), "too large")


@pytest.fixture
def without_weights(model_copy):
    """Nothing that gets as far as the weights can succeed."""
    (model_copy / "model.safetensors").unlink()
    return model_copy


def test_a_prompt_with_too_many_tokens_is_refused_before_the_weights(run_cli, without_weights):
    assert_failed(run_cli("-m", str(without_weights), "word " * 2000), "tokens", "1024")


def test_a_model_without_a_tokenizer_is_refused_before_the_weights(run_cli, without_weights):
    (without_weights / "tokenizer.json").unlink()
    assert_failed(run_cli("-m", str(without_weights), "x"), "no tokenizer.json")
    assert_failed(run_cli("-i", "-m", str(without_weights)), "no tokenizer.json")


def test_the_dry_run_says_that_there_is_no_tokenizer(run_cli, model_copy):
    assert "tokenizer.json" not in run_cli("--dry-run", "-m", str(model_copy)).stdout
    (model_copy / "tokenizer.json").unlink()
    assert "no tokenizer.json" in run_cli("--dry-run", "-m", str(model_copy)).stdout
    assert as_json(run_cli("--dry-run", "--json", "-m", str(model_copy)))["has_tokenizer"] is False


def test_a_model_without_a_chat_template_is_refused_before_the_weights(run_cli, without_weights):
    assert_failed(run_cli("--chat", "-m", str(without_weights), "x"), "no chat template")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_git_lfs_pointer_is_called_one(run_cli, model_copy, name):
    (model_copy / name).write_text(POINTER)
    assert_failed(run_cli("-m", str(model_copy), "x"), name, "git-lfs pointer", "git lfs pull")


def test_a_git_lfs_pointer_in_place_of_weights_is_called_one(run_cli, model_copy):
    (model_copy / "model.safetensors").unlink()
    (model_copy / "model.safetensors").write_text(POINTER)
    done = run_cli("-m", str(model_copy), "x")
    assert_failed(done, "model.safetensors", "git-lfs pointer", "4.61 GiB")


def test_a_tokenizer_larger_than_the_model_names_both_files_and_numbers(run_cli, model_copy):
    change_json(model_copy / "config.json", vocab_size=300)
    done = run_cli("-m", str(model_copy), "import os")
    assert_failed(done, "tokenizer.json has 4096 tokens", "config.json says vocab_size 300")


def test_lines_of_other_batch_formats_say_what_a_line_is(run_cli):
    lines = '{"messages": [{"role": "user"}]}\n{"custom_id": "a", "body": {}}\n{"text": "x"}\n'
    done = run_cli("--batch", "-", stdin=lines)
    assert done.returncode == 1
    chat, openai, other = done.stdout.splitlines()
    for line in (chat, openai):
        assert '{\\"prompt\\": \\"a text\\"}' in line
    assert "--chat" in chat
    assert "custom_id" in openai
    assert "`prompt`" in other


# Interactive use


def test_commands_of_the_conversation(run_cli):
    done = run_cli("-i", "-n", "2", stdin="/help\n/foo\nimport os\n/bye\nimport sys\n")
    assert done.returncode == 0
    for command in ("/clear", "/bye", "/help"):
        assert command in done.stderr
    assert "no command /foo" in done.stderr
    assert done.stderr.count("first token after") == 1


def test_clear_begins_a_new_conversation(run_cli, model_copy):
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    change_json(model_copy / "tokenizer_config.json", chat_template=template)
    options = ["-i", "--chat", "--system", "s", "-q", "-n", "6", "-m", str(model_copy)]
    forgotten = run_cli(*options, stdin="one\n/clear\ntwo\n").stdout.splitlines()
    alone = run_cli(*options, stdin="two\n").stdout.splitlines()
    assert forgotten[-len(alone) :] == alone
