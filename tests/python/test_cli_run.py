import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from conftest import as_json, assert_failed, change_json, moe_run_command, offline_environment

import moerun
from moerun_tools.answer import Answer
from moerun_tools.prompt import BUILT_IN_PROMPT
from moerun_tools.run import main

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def greedy(run_cli):
    return as_json(run_cli("--json", "-n", "24", "import os\n"))


@pytest.fixture
def chat_copy(model_copy):
    change_json(model_copy / "tokenizer_config.json", chat_template=TEMPLATE)
    return str(model_copy)


# What goes where


def test_json_is_one_object_with_the_text_the_tokens_and_the_statistics(greedy, tokenizer):
    assert set(greedy) == {"text", "token_ids", "prompt_token_ids", "stats"}
    assert greedy["prompt_token_ids"] == tokenizer.encode("import os\n")
    assert len(greedy["token_ids"]) == 24
    assert greedy["text"] == tokenizer.decode(greedy["token_ids"])
    stats = greedy["stats"]
    assert stats["generated_tokens"] == 24
    assert stats["prompt_tokens"] == len(greedy["prompt_token_ids"])
    assert stats["load"]["gb_per_s"] > 0
    assert stats["decode_tokens_per_s"] > 0
    assert stats["memory"]["expert_bytes"] > 0
    assert stats["finish_reason"] == "length"


def test_text_goes_to_standard_output_and_the_rest_to_standard_error(run_cli, greedy):
    done = run_cli("-n", "24", "import os\n")
    assert done.returncode == 0
    assert done.stdout == "import os\n" + greedy["text"] + "\n"
    assert re.fullmatch(
        r"24 tokens, [\d,.]+ tok/s; prompt 3 tokens, first token after [\d.]+ m?s( \(cuda\))?\n",
        done.stderr,
    )


def test_everything_else_comes_with_stats(run_cli):
    done = run_cli("-n", "24", "--stats", "--device", "cpu", "import os\n")
    labels = [line.split(" ", 1)[0] for line in done.stderr.splitlines()[1:]]
    assert labels == ["load", "memory", "speed", "sampling", "logits", "experts"]
    assert "CUDA" not in done.stderr
    assert "kernels" in done.stderr
    assert "fingerprint" in done.stderr


def test_quiet_leaves_standard_error_empty(run_cli):
    done = run_cli("-q", "-n", "2", "import os")
    assert done.returncode == 0
    assert done.stderr == ""


def test_text_is_utf_8_whatever_the_locale_says(run_cli):
    for locale in ({"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        env = offline_environment(LC_ALL="C", **locale)
        done = run_cli("-q", "-n", "1", "Größe 🙂".encode(), env=env)
        assert done.stdout.startswith("Größe 🙂")


def test_a_progress_bar_is_shown_at_a_terminal(default_path):
    def standard_error(*args):
        controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        done = subprocess.run(
            [*moe_run_command(), *args, "-n", "1", "import os"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal,
            timeout=60,
            env=offline_environment(),
        )
        os.write(terminal, b"|")  # so that there is something to read
        os.close(terminal)
        text = os.read(controller, 100000).decode()
        os.close(controller)
        assert done.returncode == 0
        return text

    assert "loading" in standard_error()
    assert standard_error("-q") == "|"


def test_an_answer_that_ends_inside_a_character_says_so(tokenizer):
    token_ids = tokenizer.encode("a🙃")[:-1]
    model = SimpleNamespace(tokenizer=tokenizer, generate=lambda prompt: iter(token_ids))
    answer = Answer(model, [1])
    assert "".join(answer) == answer.text == "a\ufffd"
    assert answer.token_ids == token_ids


# Where the prompt comes from


def test_the_prompt_can_be_piped_in(run_cli, greedy):
    value = as_json(run_cli("--json", "-n", "24", stdin="import os\n"))
    assert value["token_ids"] == greedy["token_ids"]


@pytest.mark.parametrize("option", ["-f", "--file"])
def test_the_prompt_can_be_a_file(run_cli, tmp_path, greedy, option):
    file = tmp_path / "prompt.txt"
    file.write_text("import os\n")
    value = as_json(run_cli("--json", "-n", "24", option, str(file)))
    assert value["token_ids"] == greedy["token_ids"]


def test_a_dash_as_the_file_is_standard_input(run_cli):
    assert run_cli("-q", "-n", "1", "-f", "-", stdin="import os").stdout.startswith("import os")


def test_at_a_terminal_without_a_prompt_the_built_in_one_is_used(run_cli):
    controller, terminal = pty.openpty()
    done = run_cli("-q", "-n", "60", stdin=terminal)
    os.close(terminal)
    os.close(controller)
    assert done.stdout.startswith(BUILT_IN_PROMPT)
    assert "http://www.apache.org/licenses/LICENSE-2.0" in done.stdout


def test_an_empty_prompt_is_an_error_that_says_which(run_cli, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert_failed(run_cli(""), "the prompt is empty", "PROMPT")
    assert_failed(run_cli("-f", str(empty)), "the prompt is empty", str(empty))
    assert_failed(run_cli(stdin=""), "the prompt is empty", "standard input")


def test_a_prompt_that_is_not_utf_8_is_an_error_that_names_its_source(run_cli, tmp_path):
    file = tmp_path / "latin-1.txt"
    file.write_bytes("Größe".encode("latin-1"))
    assert_failed(run_cli("-f", str(file)), str(file), "UTF-8", "offset 2")
    assert_failed(run_cli(stdin=b"ab\xff"), "standard input", "UTF-8", "offset 2")
    assert_failed(run_cli(b"ab\xff"), "PROMPT", "UTF-8")
    assert_failed(run_cli("x", "--chat", "--system", b"ab\xff"), "--system", "UTF-8")


def test_a_prompt_file_that_cannot_be_read_is_named(run_cli, tmp_path):
    assert_failed(run_cli("-f", str(tmp_path / "none")), "none does not exist")
    assert_failed(run_cli("-f", str(tmp_path)), str(tmp_path), "is a directory")


def test_a_prompt_longer_than_the_context_names_both_numbers(run_cli):
    assert_failed(run_cli("--context-length", "8", "a b c d e f g h i j"), "10 tokens", "of 8")
    assert_failed(run_cli("word " * 2000), "tokens", "1024")


# Options


def test_the_default_number_of_tokens_is_128(run_cli):
    value = as_json(run_cli("--json", "--ignore-eos", "import os\n"))
    assert len(value["token_ids"]) == 128


def test_every_option_is_in_the_help_with_a_sentence(run_cli):
    text = run_cli("--help").stdout
    for param in main.params:
        if isinstance(param, click.Option):
            assert param.help and param.help.rstrip("]").split("  [")[0].endswith(".")
            assert getattr(param, "group", None)
            for name in param.opts:
                assert re.search(rf"{name}\b", text)
    assert "Examples:" in text
    assert run_cli("-h").stdout == text


def test_the_version_is_that_of_the_package(run_cli):
    assert run_cli("--version").stdout == f"moe-run {moerun.__version__}\n"


@pytest.mark.parametrize("narrow", [["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]])
def test_sampling_options_reach_the_sampler(run_cli, greedy, narrow):
    options = ["--temperature", "2", "--seed", "3", "--repetition-penalty", "1"]
    free = as_json(run_cli("--json", "-n", "24", *options, "import os\n"))
    narrowed = as_json(run_cli("--json", "-n", "24", *options, *narrow, "import os\n"))
    assert free["token_ids"] != greedy["token_ids"]
    assert free["stats"]["seed"] == 3
    assert narrowed["token_ids"] == greedy["token_ids"]


def test_the_reported_seed_repeats_the_text(run_cli):
    options = ["--json", "-n", "12", "--temperature", "1.5", "import os\n"]
    first = as_json(run_cli(*options))
    again = as_json(run_cli("--seed", str(first["stats"]["seed"]), *options))
    assert again["token_ids"] == first["token_ids"]


def test_a_repetition_penalty_changes_the_text(run_cli, greedy):
    value = as_json(run_cli("--json", "-n", "24", "--repetition-penalty", "3", "import os\n"))
    assert value["token_ids"] != greedy["token_ids"]


def test_the_text_ends_with_the_first_stop_text(run_cli, greedy):
    text = greedy["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    value = as_json(run_cli("--json", "--stop", "never there", "--stop", stop, "import os\n"))
    assert value["stats"]["finish_reason"] == "stop"
    assert stop in value["text"]
    assert text.startswith(value["text"])


def test_the_end_of_text_token_can_be_ignored(run_cli, model_copy, greedy):
    eos = greedy["token_ids"][3]
    for name in ("config.json", "generation_config.json"):
        change_json(model_copy / name, eos_token_id=eos)
    options = ["--json", "-n", "24", "-m", str(model_copy), "import os\n"]
    ended = as_json(run_cli(*options))
    assert ended["stats"]["finish_reason"] == "eos"
    assert ended["token_ids"][-1] == eos
    assert len(ended["token_ids"]) < 24
    assert as_json(run_cli("--ignore-eos", *options))["token_ids"] == greedy["token_ids"]


def test_machine_options_reach_the_runtime(run_cli, greedy):
    room = 4
    context_length = str(len(greedy["prompt_token_ids"]) + room)
    options = ["--threads", "1", "--device", "cpu", "--cpu-kernels", "portable"]
    value = as_json(run_cli("--json", *options, "--context-length", context_length, "import os\n"))
    assert value["stats"]["threads"] == 1
    assert value["stats"]["device"] == "cpu"
    assert value["stats"]["cpu_kernels"] == "portable"
    assert value["stats"]["finish_reason"] == "context"
    assert len(value["token_ids"]) == room


@pytest.mark.parametrize(
    "args",
    [
        ["--nonsense"],
        ["one", "two"],
        ["-f", "file", "prompt"],
        ["--system", "text", "prompt"],
        ["-i", "--json"],
        ["-n", "0", "x"],
        ["-n", "many", "x"],
        ["--temperature", "-1", "x"],
        ["--temperature", "nan", "x"],
        ["--top-k", "-1", "x"],
        ["--top-p", "0", "x"],
        ["--top-p", "inf", "x"],
        ["--min-p", "1.5", "x"],
        ["--repetition-penalty", "0", "x"],
        ["--seed", "-1", "x"],
        ["--seed", str(2**64), "x"],
        ["--stop", "", "x"],
        ["--device", "toaster", "x"],
        ["--threads", "0", "x"],
        ["--context-length", "0", "x"],
        ["--cpu-kernels", "abacus", "x"],
    ],
)
def test_wrong_usage_exits_with_2_and_shows_how_to_get_help(run_cli, args):
    done = run_cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: moe-run" in done.stderr
    assert "--help" in done.stderr
    assert "Error: " in done.stderr


# Chat and interactive use


def test_chat_renders_the_template_and_prints_only_the_answer(run_cli, chat_copy, tokenizer):
    options = ["-m", chat_copy, "-n", "5", "--chat", "--system", "Be brief.", "Hello"]
    value = as_json(run_cli("--json", *options))
    expected = "[system] Be brief.\n[user] Hello\n[assistant]"
    assert value["prompt_token_ids"] == tokenizer.encode(expected, add_special_tokens=False)
    assert run_cli("-q", *options).stdout == value["text"] + "\n"


def test_chat_adds_no_special_tokens_to_those_of_the_template(run_cli, chat_copy):
    begin = {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}}
    change_json(
        Path(chat_copy, "tokenizer.json"),
        post_processor={
            "type": "TemplateProcessing",
            "single": [begin, sequence],
            "pair": [begin, sequence],
            "special_tokens": tokens,
        },
    )
    options = ["--json", "-n", "1", "-m", chat_copy, "Hello"]
    plain = as_json(run_cli(*options))["prompt_token_ids"]
    chat = as_json(run_cli("--chat", *options))["prompt_token_ids"]
    assert plain[0] == 1
    assert 1 not in chat


def test_chat_without_a_template_says_that_the_model_has_none(run_cli):
    assert_failed(run_cli("--chat", "Hello"), "no chat template", "tokenizer_config.json")


def test_interactive_mode_answers_each_line_until_exit(run_cli):
    done = run_cli("-i", "-q", "-n", "4", stdin="import os\n\nimport sys\nexit\nimport re\n")
    answers = [
        as_json(run_cli("--json", "-n", "4", line))["text"] for line in ("import os", "import sys")
    ]
    assert done.returncode == 0
    assert done.stdout == "".join(answer + "\n" for answer in answers)
    assert done.stderr == ""


def test_interactive_chat_remembers_the_conversation(run_cli, chat_copy):
    options = ["-m", chat_copy, "-n", "6", "--chat"]
    done = run_cli("-i", "-q", *options, "one", stdin="two\n")
    first = as_json(run_cli("--json", *options, "one"))["text"]
    conversation = f"[user] one\n[assistant] {first}\n[user] two\n[assistant]"
    second = as_json(run_cli("--json", "-m", chat_copy, "-n", "6", conversation))["text"]
    assert done.returncode == 0
    assert done.stdout == first + "\n" + second + "\n"


def test_interactive_mode_goes_on_after_a_line_that_fails(run_cli):
    lines = "word " * 2000 + "\nimport os\n"
    done = run_cli("-i", "-q", "-n", "4", stdin=lines)
    assert done.returncode == 0
    assert done.stderr.startswith("moe-run: error: the prompt has ")
    assert done.stderr.count("\n") == 1
    assert len(done.stdout) > 4


def start(*args):
    return subprocess.Popen(
        [*moe_run_command(), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env=offline_environment(),
    )


def test_ctrl_c_ends_an_answer_but_not_the_conversation(model, tokenizer):
    whole = model.generate(tokenizer.encode("import os"), 1000, ignore_eos=True, temperature=0)
    whole_length = len(tokenizer.decode(list(whole)))
    with start("-i", "--ignore-eos", "-n", "1000") as process:
        assert b"Ctrl-C" in process.stderr.readline()
        for _ in range(2):
            process.stdin.write(b"import os\n")
            first = process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline().startswith(b"interrupted: ")
            answer = first + os.read(process.stdout.fileno(), 100000)
            assert answer.endswith(b"\n")
            assert len(answer) < whole_length // 2
        rest, error = process.communicate(b"exit\n", timeout=60)
        assert (process.returncode, rest, error) == (0, b"", b"")


# Interruptions and outputs that fail


def test_ctrl_c_ends_with_130_and_no_traceback():
    with start("--ignore-eos", "-n", "1000", "import os") as process:
        assert process.stdout.read(len("import os") + 1)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert re.fullmatch(rb"\ninterrupted: \d+ tokens?[^\n]*\n", error)
        assert len(rest) < 1000


def test_ctrl_c_leaves_nothing_on_standard_output_with_json():
    with start("--json", "--ignore-eos", "-n", "1000", "import os") as process:
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert output == b""
        assert process.returncode != 0


def test_a_reader_that_leaves_early_is_no_error():
    with start("--ignore-eos", "-n", "1000", "import os") as process:
        assert process.stdout.read(3) == b"imp"
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 0
        assert error == b""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_an_error(run_cli, options):
    with open("/dev/full", "wb") as full:
        done = run_cli("-q", "-n", "3", *options, "import os", stdout=full)
    assert_failed(done, "cannot write to standard output", "No space left on device")


# Models that are none, or broken ones


def test_a_directory_that_is_no_model_is_named(run_cli, tmp_path):
    assert_failed(run_cli("-m", str(tmp_path), "x"), str(tmp_path), "config.json")
    assert_failed(run_cli("-m", str(tmp_path / "none"), "x"), "there is no directory", "none")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(run_cli, model_copy, missing):
    (model_copy / missing).unlink()
    assert_failed(run_cli("-m", str(model_copy), "x"), missing, str(model_copy))


def test_a_configuration_that_lies_is_one_paragraph(run_cli, model_copy):
    change_json(model_copy / "config.json", num_experts_per_tok=33)
    assert_failed(run_cli("-m", str(model_copy), "x"), "config.json", "num_experts_per_tok")


def test_damaged_weights_are_one_paragraph(run_cli, model_copy):
    path = model_copy / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])
    assert_failed(run_cli("-m", str(model_copy), "x"), str(path))


def test_a_corrupt_tokenizer_is_named(run_cli, model_copy):
    (model_copy / "tokenizer.json").write_text("{}")
    assert_failed(run_cli("-m", str(model_copy), "x"), str(model_copy / "tokenizer.json"))
