"""moe-run --batch, as a real process."""

import fcntl
import json
import os
import signal
import subprocess
import time

import pytest
from conftest import as_json, assert_failed, moe_run_command, offline_environment

import moerun

LINES = [
    {"prompt": "import os\n", "id": "first"},
    "def read_file(path):\n",
    {"prompt": "NAME\n       ls", "max_new_tokens": 4, "id": 7},
    {"prompt": "class A:\n", "temperature": 0.9, "seed": 3},
]


def write_lines(path, lines):
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", LINES)


def test_every_line_gets_the_text_that_it_gets_alone(run_cli, tmp_path, prompts, model):
    out = tmp_path / "texts.jsonl"
    done = run_cli("--batch", prompts, "-o", str(out), "-n", "12", "--batch-size", "3")
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.startswith("4 texts: ")
    assert done.stderr.count("\n") == 1
    results = read_lines(out)
    assert [result["line"] for result in results] == [1, 2, 3, 4]
    assert [result.get("id") for result in results] == ["first", None, 7, None]
    for line, result in zip(LINES, results, strict=True):
        line = {"prompt": line} if isinstance(line, str) else dict(line)
        line.pop("id", None)
        ids = model.tokenizer.encode(line.pop("prompt"))
        generation = model.generate(ids, **{"max_new_tokens": 12, "temperature": 0, **line})
        tokens = list(generation)
        assert result["text"] == model.tokenizer.decode(tokens)
        assert result["generated_tokens"] == len(tokens)
        assert result["prompt_tokens"] == len(ids)
        assert result["finish_reason"] == generation.finish_reason
    assert sorted(os.listdir(tmp_path)) == ["prompts.jsonl", "texts.jsonl"]


def test_standard_output_has_the_results_in_the_order_of_the_lines(run_cli, prompts):
    done = run_cli("--batch", prompts, "-n", "12", "-q", "--batch-size", "2")
    assert done.returncode == 0
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2, 3, 4]
    assert done.stderr == ""


def test_json_is_about_the_run(run_cli, tmp_path, prompts):
    out = str(tmp_path / "texts.jsonl")
    summary = as_json(run_cli("--batch", prompts, "-o", out, "-n", "8", "--json"))
    assert summary["lines"] == 4
    assert summary["failed_lines"] == []
    assert summary["stats"]["batch"]["finished"] == 4


def test_bad_lines_are_named_and_the_rest_completes(run_cli, tmp_path):
    lines = [
        "import os\n",
        b"{not json",
        b"\xff\xfe",
        {"text": "x"},
        {"prompt": ""},
        b"",
        {"prompt": "x", "temperature": "hot", "id": "t"},
        {"prompt": "x", "max_new_tokens": 0},
        {"prompt": "x " * 2000},
        [1, 2],
        b'{"prompt": "\\ud800"}',
        {"prompt": "import sys\n", "colour": "red"},
        b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}",
        {"prompt": "x", "top_k": 2**63},
        {"prompt": "x", "ignore_eos": "no"},
        b'{"prompt": "x", "id": 1e999}',
        b'{"prompt": "x", "id": "\\ud800"}',
        {"prompt": "import sys\n", "max_new_tokens": None},
    ]
    out = tmp_path / "texts.jsonl"
    done = run_cli("--batch", write_lines(tmp_path / "p.jsonl", lines), "-o", str(out), "-n", "6")
    assert done.returncode == 1
    assert "14 lines failed: 2, 3, 4, 5, 7, 8, 9, 10, 11, 13 and 4 more" in done.stderr
    assert "colour" in done.stderr
    results = {result["line"]: result for result in read_lines(out)}
    assert list(results) == [1, 2, 3, 4, 5, *range(7, 19)]
    assert all(("text" in results[n]) == (n in (1, 12, 18)) for n in results)
    for number, part in {
        2: "JSON",
        3: "UTF-8",
        4: "`prompt`",
        5: "`prompt`",
        7: "temperature",
        8: "max_new_tokens",
        9: "1024",
        10: "list",
        11: "surrogate",
        13: "temperature",
        14: "top_k",
        15: "ignore_eos",
        16: "`id`",
        17: "`id`",
    }.items():
        assert part in results[number]["error"]
    assert results[7]["id"] == "t"


def test_what_is_there_is_not_replaced_unasked(run_cli, tmp_path, prompts):
    out = tmp_path / "texts.jsonl"
    out.write_text("mine")
    arguments = ("--batch", prompts, "-o", str(out), "-n", "4")
    assert_failed(run_cli(*arguments), "texts.jsonl", "--overwrite")
    assert_failed(run_cli(*arguments, "--resume"), "texts.jsonl", "--overwrite")
    assert out.read_text() == "mine"
    assert run_cli(*arguments, "--overwrite").returncode == 0
    assert len(read_lines(out)) == 4
    assert_failed(run_cli("--batch", prompts, "-o", prompts, "--overwrite"), "reads from it")
    partial = tmp_path / "q.partial"
    partial.write_text('"import os"\n')
    arguments = ("--batch", str(partial), "-o", str(tmp_path / "q"), "--overwrite")
    assert_failed(run_cli(*arguments), "reads from it")
    assert_failed(run_cli("--batch", prompts, "-o", str(tmp_path / "q"), "--overwrite"), "remove")
    assert partial.read_text() == '"import os"\n'


def test_a_refused_batch_leaves_nothing(run_cli, tmp_path, prompts):
    arguments = ("--batch", prompts, "-o", str(tmp_path / "t"), "-n", "4")
    assert_failed(run_cli(*arguments, "--batch-size", "100000"), "batch_size")
    assert os.listdir(tmp_path) == ["prompts.jsonl"]
    (tmp_path / "link").symlink_to("nowhere/else")
    assert_failed(run_cli("--batch", prompts, "-o", str(tmp_path / "link")), "no folder")


def test_two_runs_do_not_write_the_same_results(run_cli, tmp_path, prompts):
    partial = tmp_path / "t.partial"
    with partial.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        arguments = ("--batch", prompts, "-o", str(tmp_path / "t"), "-n", "4")
        assert_failed(run_cli(*arguments), "another run is writing")
    assert run_cli(*arguments).returncode == 0


def test_prompts_may_come_from_standard_input(run_cli):
    text = "\ufeff" + json.dumps(LINES[0]) + "\r\n" + json.dumps(LINES[1])
    done = run_cli("--batch", "-", "-o", "-", "-n", "4", stdin=text)
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2]


def test_resuming_keeps_the_seed_and_wants_the_same_model(
    run_cli, tmp_path, model_copy, own_weights
):
    prompts = write_lines(tmp_path / "p.jsonl", ["a\n", "b\n", "c\n"])
    out = tmp_path / "t"
    sampled = ("--batch", prompts, "-o", str(out), "-n", "6", "--temperature", "1")
    assert run_cli(*sampled, "-m", str(model_copy)).returncode == 0
    whole = read_lines(out)
    seeds = [result["seed"] for result in whole]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
    again = (*sampled, "-m", str(model_copy), "--overwrite", "--seed", str(seeds[0]))
    assert run_cli(*again).returncode == 0
    assert read_lines(out) == whole

    process = subprocess.Popen(
        [*moe_run_command(), *sampled, "-m", str(model_copy), "--overwrite", "-n", "900"],
        stderr=subprocess.PIPE,
        env=offline_environment(),
    )
    partial = tmp_path / "t.partial"
    while not partial.exists() or not partial.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    seed = json.loads(partial.read_text().splitlines()[0])["seed"]
    process.kill()
    process.communicate()
    long = (*sampled, "-m", str(model_copy), "-n", "900", "--resume")
    data = bytearray(own_weights.read_bytes())
    data[-1] ^= 1
    own_weights.write_bytes(data)
    assert_failed(run_cli(*long), "with other weights")
    data[-1] ^= 1
    own_weights.write_bytes(data)
    assert_failed(run_cli(*long, "--context-length", "64"), "other options")
    assert run_cli(*long).returncode == 0
    assert [result["seed"] for result in read_lines(out)] == [seed, seed + 1, seed + 2]


def test_ctrl_c_keeps_what_is_done_and_another_run_goes_on(run_cli, tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", [f"import os  # {n}\n" for n in range(100)])
    out = tmp_path / "texts.jsonl"
    partial = tmp_path / "texts.jsonl.partial"
    arguments = ["--batch", prompts, "-o", str(out), "-n", "30", "--batch-size", "4"]
    arguments += ["--temperature", "0"]
    process = subprocess.Popen(
        [*moe_run_command(), *arguments],
        stderr=subprocess.PIPE,
        env=offline_environment(),
        text=True,
    )
    while not (partial.exists() and len(partial.read_text().splitlines()) > 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "of 100 lines are in" in stderr and "--resume" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    kept = read_lines(partial)[1:]
    assert 0 < len(kept) < 100
    with partial.open("a") as file:
        file.write('{"line": 99, "te')  # as a crash leaves it

    assert_failed(run_cli(*arguments), "--resume", "--overwrite")
    assert_failed(run_cli(*arguments, "--resume", "--temperature", "0.5"), "other options")
    done = run_cli(*arguments, "--resume")
    assert done.returncode == 0
    assert f"{len(kept)} of them before" in done.stderr
    results = read_lines(out)
    assert [result["line"] for result in results] == list(range(1, 101))
    assert all(result in results for result in kept)
    assert not partial.exists()


def test_a_file_that_is_no_partial_result_is_left_alone(run_cli, tmp_path, prompts):
    partial = tmp_path / "texts.jsonl.partial"
    partial.write_text("something else\n")
    arguments = ("--batch", prompts, "-o", str(tmp_path / "texts.jsonl"), "-n", "4")
    assert_failed(run_cli(*arguments, "--resume"), "texts.jsonl.partial", "remove it")
    assert partial.read_text() == "something else\n"


def test_a_batch_runs_under_a_budget_and_says_what_the_cache_did(run_cli, tmp_path, prompts):
    out = tmp_path / "texts.jsonl"
    arguments = ("--batch", prompts, "-n", "12", "--batch-size", "3")
    assert run_cli(*arguments, "-o", str(out), "--seed", "1").returncode == 0
    small = tmp_path / "small.jsonl"
    done = run_cli(*arguments, "-o", str(small), "--seed", "1", "--expert-budget", "25%", "--stats")
    assert small.read_text() == out.read_text()
    for part in ("% hits", "read a token", "policy lcp"):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--batch", "p", "text"), "--batch takes the place"),
        (("--batch", "p", "-i"), "--batch takes the place"),
        (("-o", "x", "text"), "need --batch"),
        (("--batch-size", "4", "text"), "need --batch"),
        (("--batch", "p", "--dry-run"), "--dry-run"),
        (("--batch", "p", "--schedule", "on"), "--predictor"),
        (("--predictor", "p", "text"), "need --batch"),
        (("--batch", "p", "--json"), "--output"),
        (("--batch", "p", "--resume"), "--output"),
        (("--batch", "p", "-o", "x", "--resume", "--overwrite"), "exclude"),
    ],
)
def test_wrong_usage_of_a_batch(run_cli, arguments, part):
    done = run_cli(*arguments)
    assert done.returncode == 2
    assert part in done.stderr


def test_files_that_cannot_be_read_or_have_no_lines_are_refused(run_cli, tmp_path):
    assert_failed(run_cli("--batch", str(tmp_path / "none")), "does not exist")
    assert_failed(run_cli("--batch", str(tmp_path)), "cannot be read")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    assert_failed(run_cli("--batch", str(empty)), "empty", '"prompt"')


def test_a_chat_batch_needs_a_template(run_cli, prompts):
    assert_failed(run_cli("--batch", prompts, "--chat", "-n", "2"), "no chat template")
    assert moerun.default_model().exists()
