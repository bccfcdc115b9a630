"""moe-trace as a user runs it: a process, its output, its exit codes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import router_families as families
from click.testing import CliRunner
from conftest import offline_environment
from safetensors.numpy import save_file

from moerun import Trace
from moerun_tools.trace import main
from moerun_tools.trace_info import ranges
from moerun_tools.trace_options import Size


def command():
    """The installed console script, or the module where the package is not installed."""
    script = Path(sys.executable).with_name("moe-trace")
    return [str(script)] if script.exists() else [sys.executable, "-m", "moerun_tools.trace"]


def run(*args, env=None):
    done = subprocess.run(
        [*command(), *map(str, args)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=env or offline_environment(),
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


def run_here(*args):
    """In this process, which is faster: nothing but the output is different."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def as_json(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def assert_failed(done, *expected, code=1):
    """One readable line on standard error, nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert not done.stdout
    assert "error: " in done.stderr.splitlines()[-1]
    for text in expected:
        assert text in done.stderr


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def main():\n    return 0\n" * 100)
    return path


SMALL = ("--length", "16", "--samples", "2")


def test_without_data_and_model_it_records_what_python_brings_along(tmp_path):
    path = tmp_path / "t.safetensors"
    done = run("record", *SMALL, "-o", path)
    assert done.returncode == 0
    assert not done.stderr
    assert done.stdout.startswith("recorded 4 sequences (64 tokens) of tiny-olmoe at ")
    assert done.stdout.rstrip().endswith(str(path))
    trace = Trace.open(path)
    assert trace.domain_names == ["python", "english"]
    assert trace.tensors == {"token_ids", "predicted_ids"}


def test_json_is_one_object_and_quiet_says_nothing(tmp_path, text_file):
    path = tmp_path / "t.safetensors"
    summary = as_json(run("record", *SMALL, "--data", f"d={text_file}", "-o", path, "--json"))
    assert summary["traces"] == [{"stack": None, "files": [str(path)]}]
    assert summary["domains"] == {"d": 2}
    assert summary["num_new_tokens"] == 32
    assert summary["interrupted"] is False
    done = run("record", *SMALL, "--data", f"d={text_file}", "-o", path, "--overwrite", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_asked_for_is_in_the_trace(tmp_path, text_file):
    path = tmp_path / "t.safetensors"
    options = ("--weights", "--logits", "--no-predictions", "--generate", "4", "--seed", "3")
    options += ("--expert-budget", "30%", "--cache-events", "--temperature", "0.5")
    as_json(run("record", *SMALL, *options, "--data", f"d={text_file}", "-o", path, "--json"))
    trace = Trace.open(path)
    assert trace.tensors == {"token_ids", "expert_weights", "router_logits", "cache_events"}
    assert trace.metadata["phase"] == "decode"
    assert trace.lengths.tolist() == [4, 4]
    recording = json.loads(trace.metadata["recording"])
    assert (recording["seed"], recording["temperature"], recording["generate"]) == (3, 0.5, 4)


def test_a_small_shard_size_gives_several_files(tmp_path):
    path = tmp_path / "t.safetensors"
    done = run("record", *SMALL, "--random-tokens", "-o", path, "--shard-size", "1kB")
    assert "t-00001-of-00002.safetensors and 1 more" in done.stdout
    assert len(Trace.open(path).files) == 2


def test_ctrl_c_leaves_a_valid_trace_that_resume_goes_on_with(tmp_path):
    path = tmp_path / "t.safetensors"
    args = ("record", "--random-tokens", "--length", "16", "--samples", "1000000", "-o", str(path))
    args += ("--shard-size", "20kB", "--threads", "1")
    counts = []
    for resume in ((), ("--resume",)):
        process = subprocess.Popen(
            [*command(), *args, *resume],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=offline_environment(),
        )
        folder = tmp_path / "t.safetensors.partial"
        wanted = len(list(folder.glob("*"))) if not resume else len(Trace.open(path).files)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.safetensors"))) <= wanted + 1:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert not stdout
        assert b"--resume goes on" in stderr
        assert b"Traceback" not in stderr
        assert not folder.exists()
        trace = Trace.open(path)
        list(trace.shards())
        counts.append(trace.num_sequences)
    assert 0 < counts[0] < counts[1]


def test_the_transformers_engine_gives_the_same_trace_as_the_native_one(tmp_path, text_file):
    ids = []
    for engine in ("native", "transformers"):
        path = tmp_path / f"{engine}.safetensors"
        extra = ("--dtype", "float32") if engine == "transformers" else ()
        args = ("record", *SMALL, "--engine", engine, *extra, "--data", f"d={text_file}")
        done = run(*args, "-o", path)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        trace = Trace.open(path)
        assert trace.metadata["engine"] == engine
        (shard,) = trace.shards()
        ids.append(shard.expert_ids)
    assert np.array_equal(*ids)


def test_a_config_alone_is_recorded_with_random_weights_and_tokens(tmp_path):
    config = tmp_path / "switch.json"
    config.write_text(json.dumps(families.config_of("switch_transformers").to_dict()))
    path = tmp_path / "t.safetensors"
    args = ("record", *SMALL, "--engine", "transformers", "--random-init", "-m", config)
    done = run(*args, "--layers", "2", "--random-tokens", "-o", path)
    assert done.returncode == 0, done.stderr
    for name in ("encoder", "decoder"):
        trace = Trace.open(tmp_path / f"t-{name}.safetensors")
        assert trace.model == "switch (random weights)"
        assert trace.moe_layers == [1]
    done = run(*args, "-o", tmp_path / "u.safetensors")
    assert_failed(done, "no tokenizer", "--data NAME=FILE.npy", "--random-tokens")


def test_a_model_that_the_native_engine_does_not_run_names_the_other_engine(tmp_path):
    directory = tmp_path / "model"
    families.tiny_model("dots1").save_pretrained(directory)
    done = run(
        "record", *SMALL, "-m", directory, "--random-tokens", "-o", tmp_path / "t.safetensors"
    )
    assert_failed(done, "Try --engine transformers")


def test_bad_data_are_named_and_skipped_only_with_skip_bad(tmp_path, text_file):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "good.txt").write_text(text_file.read_text())
    args = ("record", *SMALL, "--data", f"d={folder}", "-o", tmp_path / "t.safetensors")
    assert_failed(run(*args), "empty.txt is empty")
    done = run(*args, "--skip-bad")
    assert done.returncode == 0
    assert "empty.txt is empty" in done.stderr
    assert "good" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-o", "{}/t.safetensors", "--data", "d={}/nowhere"), "nowhere"),
        (("-o", "{}/t.bin"), "t.bin.safetensors"),
        (("-o", "{}/no/t.safetensors"), "no directory"),
        (("-o", "{}/t.safetensors", "-m", "{}/nomodel"), "nomodel"),
        (("-o", "{}/t.safetensors", "--data", "d={}/few.txt"), "'d' has only 3 tokens"),
        (("-o", "{}/there.safetensors"), "exists already"),
        (("-o", "{}/t.safetensors", "--length", "99999999"), "context"),
        (
            ("-o", "{}/t.safetensors", "--generate", "2", "--cache-events"),
            "smaller --expert-budget",
        ),
    ],
)
def test_what_fails_is_one_line_and_exit_code_1(tmp_path, args, message):
    (tmp_path / "few.txt").write_text("few")
    (tmp_path / "there.safetensors").touch()
    done = run("record", *(arg.format(tmp_path) for arg in args))
    assert_failed(done, message)
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.txt", "there.safetensors"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing option '-o'"),
        (("--data", "text.txt"), "--data needs NAME=FILE_OR_DIR"),
        (("--data", "=x"), "--data needs NAME=FILE_OR_DIR"),
        (("--data", "a=x", "--data", "a=y"), "two domains with the name 'a'"),
        (("--data", "random=x", "--random-tokens"), "two domains with the name 'random'"),
        (("--resume", "--overwrite"), "exclude each other"),
        (("--temperature", "1"), "--temperature needs --generate"),
        (("--cache-events",), "--cache-events needs --generate"),
        (("--random-init",), "--random-init needs --engine transformers"),
        (("--trust-remote-code",), "--trust-remote-code needs --engine transformers"),
        (("--dtype", "float32"), "--dtype needs --engine transformers"),
        (("--engine", "transformers", "--layers", "2"), "--layers needs --random-init"),
        (("--engine", "transformers", "--expert-budget", "1GiB"), "--expert-budget needs"),
        (("--engine", "transformers", "--pack"), "--pack needs --engine native"),
        (("--plan", "p.json", "--policy", "lru"), "--plan and --policy exclude each other"),
        (("--length", "0"), "--length"),
        (("--shard-size", "big"), "not a size"),
        (("--shard-size", "0"), "not a size"),
        (("--engine", "other"), "--engine"),
    ],
)
def test_wrong_usage_is_exit_code_2(tmp_path, args, message):
    output = () if not args else ("-o", tmp_path / "t.safetensors")
    done = run_here("record", *args, *output)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize("name", ["record", "info", "import"])
def test_every_command_has_help_with_examples(name):
    done = run_here(name, "--help")
    assert done.exit_code == 0
    assert "Examples:" in done.output
    assert f"moe-trace {name} " in done.output


def test_the_group_has_help_and_a_version():
    assert "Examples:" in run_here("--help").output
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("moe-trace ")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("256MiB", 2**28), ("1.5 kB", 1500), ("2GB", 2 * 10**9), ("3K", 3000)],
)
def test_sizes_are_bytes_with_units(text, size):
    assert Size().convert(text, None, None) == size


# --- info


def test_info_describes_a_trace_for_people_and_as_json(tmp_path, text_file):
    path = tmp_path / "t.safetensors"
    run("record", *SMALL, "--data", f"code={text_file}", "-o", path, "-q")
    facts = as_json(run("info", "--json", path))
    assert facts["model"] == "tiny-olmoe"
    assert (facts["num_experts"], facts["top_k"], facts["moe_layers"]) == (32, 4, list(range(8)))
    assert facts["domains"] == [{"name": "code", "num_sequences": 2, "num_tokens": 32}]
    assert facts["recording"]["length"] == 16
    assert facts["files"] == [{"file": str(path), "bytes": path.stat().st_size}]
    done = run("info", path)
    assert done.returncode == 0
    for text in ("tiny-olmoe", "4 of 32 a token, in 8 layers (0-7)", "native, prefill, moerun"):
        assert text in done.stdout
    assert "code: 2 sequences, 32 tokens" in done.stdout


def test_info_of_what_is_no_trace_is_an_error_that_names_it(tmp_path):
    assert_failed(run("info", tmp_path / "nowhere.safetensors"), "nowhere.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    assert_failed(run("info", tmp_path / "noise.safetensors"), "noise.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    assert_failed(run("info", tmp_path / "other.safetensors"), "other.safetensors", "not a trace")


def test_info_keeps_control_characters_of_a_file_out_of_the_terminal(tmp_path):
    path = tmp_path / "m\x1b[31m_00.safetensors"
    save_file({"d\x1b]0;x\x07": np.ones((1, 2, 4), np.float32)}, path)
    output = tmp_path / "t.safetensors"
    assert run("import", path, "--top-k", "1", "-o", output, "-q").returncode == 0
    done = run("info", output)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


def test_layer_numbers_are_written_in_short():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# --- import


def test_import_writes_a_trace_of_router_dumps(tmp_path):
    for layer in range(2):
        logits = np.random.default_rng(layer).normal(size=(2, 3, 8)).astype(np.float32)
        save_file({"wiki": logits}, tmp_path / f"olmoe_{layer:02d}.safetensors")
    output = tmp_path / "out.safetensors"
    done = run("import", tmp_path, "--top-k", "2", "-o", output)
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    assert Trace.open(output).domains == ["wiki", "wiki"]
    args = ("import", tmp_path, "--model", "olmoe", "--top-k", "2", "-o", output)
    assert_failed(run(*args), "out.safetensors exists already", "--overwrite")
    assert as_json(run(*args, "--overwrite", "--json")) == {"files": [str(output)]}
    assert_failed(
        run("import", tmp_path / "no", "--top-k", "2", "-o", tmp_path / "x.safetensors"), "no"
    )
    assert run_here("import", tmp_path, "-o", output).exit_code == 2
