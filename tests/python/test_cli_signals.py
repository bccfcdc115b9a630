"""Ctrl-C and SIGTERM end every tool the same way: quietly, with an exit code of their own."""

import os
import signal
import subprocess
import sys

import pytest
from traces import random_trace

from moerun import Trace

SIGNALS = [signal.SIGINT, signal.SIGTERM]
# Runs a tool that gets a signal when it imports a module, or calls a function for the nth time.
DRIVER = """
import os, sys
tool, number, module, function, calls = sys.argv[1:6]
sys.argv = ["moe-" + tool, *sys.argv[6:]]

def strike():
    os.kill(os.getpid(), int(number))

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module and not function:
            sys.meta_path.remove(self)
            strike()

sys.meta_path.insert(0, Finder())
import importlib
main = importlib.import_module("moerun_tools." + tool).main
if function:
    owner = importlib.import_module(module)
    *parts, name = function.split(".")
    for part in parts:
        owner = getattr(owner, part)
    wrapped, left = getattr(owner, name), [int(calls)]
    def call(*args, **options):
        result = wrapped(*args, **options)
        left[0] -= 1
        if left[0] == 0:
            strike()
        return result
    setattr(owner, name, call)
sys.exit(main())
"""


def run_struck(tool, number, at, *args, function="", calls=1):
    """Run a tool that gets the signal `number` when it imports the module `at`."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, tool, str(int(number)), at, function, str(calls), *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "Error" not in done.stderr, done.stderr
    return done


def codes_of(number):
    return (128 + number, -number)  # of both, a shell makes 128 + number


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("tool", ["run", "trace", "metrics", "plan", "predictor"])
@pytest.mark.parametrize("module", ["no_such_module", "click", "moerun_tools.command"])
def test_a_signal_while_a_tool_is_imported_ends_it_without_a_word(tool, number, module):
    if module == "no_such_module":  # no signal at all: the driver itself is fine
        assert run_struck(tool, number, module, "--version").returncode == 0
        return
    done = run_struck(tool, number, module, "--version")
    assert done.returncode in codes_of(number)
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("tool", "module", "args"),
    [
        ("run", "moerun.model", ["hello"]),
        ("run", "numpy", ["hello"]),
        ("trace", "moerun.recording", ["record", "-o", "{}/o.safetensors"]),
        ("trace", "numpy", ["info", "{}/t.safetensors"]),
        ("trace", "torch", ["record", "--engine", "transformers", "-o", "{}/o.safetensors"]),
        ("metrics", "polars", ["{}/t.safetensors"]),
        ("plan", "moerun.planning", ["curve", "--trace", "{}/t.safetensors"]),
        ("predictor", "torch", ["train", "{}/t.safetensors", "-o", "{}/p.safetensors"]),
    ],
)
def test_a_signal_while_a_tool_imports_what_it_works_with_ends_it_in_one_line(
    tmp_path, tool, number, module, args
):
    random_trace(tmp_path / "t.safetensors")
    done = run_struck(tool, number, module, *(arg.format(tmp_path) for arg in args))
    assert done.returncode == 128 + number, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") <= 1
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle_of_a_recording_leaves_a_trace_that_can_be_resumed(tmp_path, number):
    path = tmp_path / "t.safetensors"
    done = run_struck(
        "trace",
        number,
        "moerun.trace",
        *("record", "-o", str(path), "--random-tokens", "--samples", "4", "--length", "8"),
        function="TraceWriter.append",
        calls=2,
    )
    assert done.returncode == 128 + number
    assert "interrupted: this is a valid trace" in done.stderr
    assert Trace.open(path).num_sequences == 2
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_sigterm_ends_a_conversation_that_ctrl_c_would_go_on_with(tmp_path):
    done = run_struck(
        "run",
        signal.SIGTERM,
        "moerun_tools.interactive",
        *("--interactive", "-n", "50", "hello"),
        function="write_out",
        calls=3,
    )
    assert done.returncode == 143


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path):
    driver = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + DRIVER
    done = subprocess.run(
        [sys.executable, "-c", driver, "run", "2", "click", "", "1", "--version"],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"moe-run ")
