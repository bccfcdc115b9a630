"""Two recordings with the same arguments are the same bytes; what is no file is no trace."""

import os
import signal
import socket

import pytest
from click.testing import CliRunner
from test_cli_signals import run_struck
from test_trace_writing import written

from moerun import Trace
from moerun.errors import FileError, InvalidArgumentError
from moerun.predictor import read_info
from moerun_tools.metrics import main as moe_metrics
from moerun_tools.trace import main

SIZE = ("--samples", "5", "--length", "12", "--shard-size", "1KB")


def moe_trace(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("def main():\n    return 0\n" * 60)
    return path


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--weights", "--logits", "--with-prefetch"),
        ("--generate", "6", "--temperature", "0.8"),
    ],
)
def test_the_bytes_depend_on_arguments_and_data_alone(tmp_path, text, options):
    def record(name, *others, data=text):
        path = tmp_path / name / "t.safetensors"
        path.parent.mkdir(exist_ok=True)
        fixed = ("-o", path, "--data", f"x={data}", *SIZE, *options)
        done = moe_trace("record", *fixed, *others)
        assert done.exit_code == 0, done.output
        return written(path)

    whole = record("whole", "--threads", 1)
    assert len(whole) > 1
    assert record("threads", "--threads", 2) == whole
    assert record("budget", "--expert-budget", "30%") == whole
    copy = tmp_path / "elsewhere" / "a.txt"
    copy.parent.mkdir()
    copy.write_bytes(text.read_bytes())
    os.utime(copy, (0, 0))
    assert record("copy", data=copy) == whole
    path = tmp_path / "struck" / "t.safetensors"
    path.parent.mkdir()
    done = run_struck(
        "trace",
        signal.SIGTERM,
        "moerun.trace",
        *("record", "-o", str(path), "--data", f"x={text}", *SIZE, *options),
        function="TraceWriter.append",
        calls=2,
    )
    assert done.returncode == 143
    assert Trace.open(path).num_sequences == 2
    assert record("struck", "--resume") == whole
    for content in whole.values():
        assert str(tmp_path).encode() not in content
        assert str(text.parent).encode() not in content


@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "device"])
def test_what_is_no_regular_file_is_no_trace_and_no_predictor(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name = "t.safetensors"
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    elif kind == "directory":
        os.mkdir("d")
        os.mkdir("d/t.safetensors")
        os.chdir("d")
    else:
        os.symlink("/dev/zero", name)
    if kind != "directory":
        with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
            Trace.open(name)
    with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
        Trace.open(".") if kind != "directory" else read_info(name)
    with pytest.raises(FileError, match=f"is a {kind}, expected a regular file"):
        read_info(name)
    for tool in (main, moe_metrics):
        args = ["info", name] if tool is main else [name]
        done = CliRunner().invoke(tool, args)
        assert done.exit_code == 1
        assert "internal error" not in done.output


@pytest.mark.parametrize("option", ["--length", "--samples", "--generate", "--shard-size"])
@pytest.mark.parametrize("number", ["999999999999999999999", "9" * 400, "9" * 5000, "-1", "1e3"])
def test_numbers_that_no_machine_has_are_wrong_usage(tmp_path, option, number):
    done = moe_trace("record", "-o", tmp_path / "t.safetensors", option, number)
    assert done.exit_code == 2, done.output
    assert option in done.output
    done = moe_trace("import", tmp_path, "-o", tmp_path / "t.safetensors", "--top-k", number)
    assert done.exit_code == 2, done.output


def test_names_that_no_file_can_have_are_said_in_one_line(tmp_path):
    for name in ("~nouser-at-all/x", "x" * 5000):
        for args in (
            ("record", "--data", f"a={name}", "-o", tmp_path / "t.safetensors"),
            ("record", "-o", f"{name}.safetensors"),
            ("info", name),
            ("import", name, "--top-k", "1", "-o", tmp_path / "t.safetensors"),
        ):
            done = moe_trace(*args)
            assert done.exit_code == 1, done.output
            assert "internal error" not in done.output
    with pytest.raises(InvalidArgumentError):
        Trace.open("~nouser-at-all/x")
