"""Fixtures: the shipped model, copies of it to spoil, and moe-run as a real process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cached import PROMPT, run_resident
from cpp_build import build_everything
from hypothesis import settings

import moerun

# What a script starts in the background ignores Ctrl-C, and so would all that is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def moe_run_command():
    """The installed console script, or the module where the package is not installed."""
    script = Path(sys.executable).with_name("moe-run")
    return [str(script)] if script.exists() else [sys.executable, "-m", "moerun_tools.run"]


def offline_environment(**variables):
    plain = {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "", "PYTHONUNBUFFERED": ""}
    return {**os.environ, **plain, **variables}


@pytest.fixture(scope="session")
def run_cli():
    """Runs moe-run to its end; standard input is empty unless given, output is bytes as text.

    Texts are greedy unless the arguments say otherwise, so that they can be compared.
    """

    def run(*args, stdin=b"", env=None, **options):
        options.setdefault("stdout", subprocess.PIPE)
        if not isinstance(stdin, bytes | str):
            options["stdin"] = stdin
        else:
            options["input"] = stdin if isinstance(stdin, bytes) else stdin.encode()
        done = subprocess.run(
            [*moe_run_command(), "--temperature", "0", *args],
            stderr=subprocess.PIPE,
            env=env or offline_environment(),
            timeout=60,
            **options,
        )
        done.stdout = None if done.stdout is None else done.stdout.decode()
        done.stderr = done.stderr.decode()
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def cpp_build():
    """The folder with everything built from C++."""
    return build_everything()


@pytest.fixture(scope="session")
def default_path():
    return moerun.default_model()


@pytest.fixture(scope="session")
def model(default_path):
    with moerun.Model.load(default_path, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tokenizer(model):
    return model.tokenizer


@pytest.fixture(scope="session")
def shipped(default_path, tokenizer):
    """What the shipped model gives with every expert in memory."""
    return run_resident(default_path, tokenizer.encode(PROMPT))


@pytest.fixture
def model_copy(tmp_path, default_path):
    """A copy of the shipped model whose small files may be changed; the weights are a link."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for file in default_path.iterdir():
        if file.suffix == ".safetensors":
            (directory / file.name).symlink_to(file)
        else:
            shutil.copy(file, directory)
    return directory


@pytest.fixture
def own_weights(model_copy):
    """The weights of `model_copy` as a file of its own, which may be changed."""
    weights = model_copy / "model.safetensors"
    shipped = weights.resolve()
    weights.unlink()
    shutil.copy(shipped, weights)
    return weights


@pytest.fixture(scope="session", autouse=True)
def shipped_weights_stay(default_path):
    """No test writes to the shipped model, whose weights copies of it are links to."""
    weights = default_path / "model.safetensors"
    before = weights.stat()
    yield
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def change_json(path, **changes):
    """Set fields of a JSON object in a file."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def assert_failed(done, *expected, code=1):
    """One readable paragraph on standard error, nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert not done.stdout
    assert done.stderr.startswith("moe-run: error: ")
    assert done.stderr.count("\n") == 1
    for text in expected:
        assert text in done.stderr


def as_json(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)
