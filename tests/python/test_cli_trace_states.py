"""What moe-trace says of recordings that are complete, incomplete, or ended by an error."""

import json
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli_trace import SMALL, as_json, assert_failed, run, run_here
from traces import random_trace

from moerun import Trace
from moerun_tools.trace_options import Progress
from moerun_tools.units import as_binary, counted

EXPERTS = {"top_k": 1, "experts": 4, "layers": 1, "lengths": (3,)}


def info(path):
    done = run_here("info", path)
    assert done.exit_code == 0, done.output
    return done.stdout


def recorded(path, domains, **recording):
    """A trace of so many sequences of each domain, recorded with these settings."""
    labels = [name for name, count in domains.items() for _ in range(count)]
    metadata = {"recording": json.dumps(recording)}
    options = {**EXPERTS, "lengths": (3,) * len(labels), "metadata": metadata}
    return random_trace(path, domains=labels, **options)


@pytest.mark.parametrize(
    ("domains", "line", "state"),
    [
        ({"a": 3, "b": 3}, None, "complete"),
        ({"a": 1, "b": 3}, None, "complete"),  # the text of a was over: b came after it
        ({"a": 3}, "incomplete  3 of 6 sequences\n", "incomplete"),
        (
            {"a": 3, "b": 2},
            "asked for   6 sequences: ended early or ran out of text\n",
            "ended early or ran out of text",
        ),
    ],
)
def test_info_says_whether_all_that_was_asked_for_is_there(tmp_path, domains, line, state):
    path = recorded(tmp_path / "t.safetensors", domains, samples=3, data={"a": "x", "b": "y"})
    text = info(path)
    assert line in text if line else "incomplete" not in text and "asked for" not in text
    facts = json.loads(run_here("info", "--json", path).stdout)
    assert (facts["planned_sequences"], facts["state"]) == (6, state)


@pytest.mark.parametrize(
    "recording",
    [
        {},
        {"samples": 3},
        {"samples": "3", "data": {"a": 1}},
        {"samples": 10**4000, "data": {"a": 1}},
        {"samples": -1, "data": {"a": 1}},
        {"samples": 3, "data": ["a"]},
        {"samples": 3, "data": {"other": 1}},
    ],
)
def test_info_of_settings_that_say_nothing_says_nothing(tmp_path, recording):
    path = recorded(tmp_path / "t.safetensors", {"a": 1}, **recording)
    assert "asked for" not in info(path)
    assert json.loads(run_here("info", "--json", path).stdout)["state"] is None


def test_one_of_each_is_written_in_the_singular_and_sizes_in_binary_units(tmp_path):
    metadata = {"expert_bytes": str(3 * 2**19)}
    text = info(random_trace(tmp_path / "t.safetensors", metadata=metadata, **EXPERTS))
    assert "1 of 4 a token, in 1 layer (0)" in text
    assert "all: 1 sequence, 3 tokens" in text
    assert "1.5 MiB, 6 MiB all of them" in text
    assert " KiB)" in text or " B)" in text
    assert (counted(1, "row"), counted(2000, "row")) == ("1 row", "2,000 rows")
    assert as_binary(2**10) == "1 KiB"


def test_resuming_what_is_complete_says_so(tmp_path):
    args = ("record", *SMALL, "--random-tokens", "-o", tmp_path / "t.safetensors")
    assert run_here(*args).exit_code == 0
    done = run_here(*args, "--resume")
    assert done.exit_code == 0
    assert done.stdout == f"nothing to do: {tmp_path / 't.safetensors'} is complete\n"


def test_an_error_in_the_middle_says_what_is_there_and_that_resume_goes_on(tmp_path):
    path, data = tmp_path / "t.safetensors", tmp_path / "d.jsonl"
    good = json.dumps({"text": "one two three four five six seven eight nine ten " * 40})
    data.write_text(f"{good}\n{{\n")
    args = ("record", "--length", "16", "--samples", "999", "--data", f"d={data}", "-o", path)
    done = run_here(*args)
    assert done.exit_code == 1
    count = Trace.open(path).num_sequences
    first, last = done.stderr.splitlines()
    assert f"{count} sequences of tiny-olmoe: {path}; the same command with --resume" in first
    assert "error: " in last and "line 2 is not JSON" in last


def test_a_configuration_alone_is_told_what_it_needs(tmp_path):
    config = tmp_path / "x.json"
    config.write_text("{}")
    args = ("record", *SMALL, "--random-tokens", "-m", config, "-o", tmp_path / "t.safetensors")
    assert_failed(run(*args), "x.json is a file", "--engine transformers --random-init")
    done = run(*args, "--engine", "transformers")
    assert_failed(done, "x.json is a configuration alone: add --random-init")


# --- import


@pytest.fixture
def dumps(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    for layer in (0, 2, 5):
        logits = np.random.default_rng(layer).normal(size=(2, 3, 8)).astype(np.float32)
        save_file({"wiki": logits}, folder / f"olmoe_{layer:02d}.safetensors")
    return folder


def test_import_offers_to_overwrite_and_not_to_resume(tmp_path, dumps):
    (tmp_path / "t.safetensors").touch()
    done = run_here("import", dumps, "--top-k", "2", "-o", tmp_path / "t.safetensors")
    assert done.exit_code == 1
    assert "exists already: --overwrite replaces it" in done.stderr
    assert "--resume" not in done.stderr


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_an_interrupted_import_writes_nothing_and_harms_nothing(
    tmp_path, dumps, monkeypatch, there
):
    path = tmp_path / "t.safetensors"
    args = ("import", dumps, "--top-k", "2", "--shard-size", "1", "-o", path, "-q")
    if there:
        random_trace(path)
    before = path.read_bytes() if there else None
    monkeypatch.setattr(Progress, "show", lambda *_: signal.raise_signal(signal.SIGINT))
    done = run_here(*args, "--overwrite")
    assert done.exit_code == 130
    assert done.output == "interrupted, nothing was written\n"
    assert (path.read_bytes() if there else None) == before
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"dumps", *(["t.safetensors"] if there else [])}


def test_import_notes_layers_without_dumps_unless_it_is_to_be_quiet(tmp_path, dumps):
    args = ("import", dumps, "--top-k", "2", "-o", tmp_path / "t.safetensors", "--overwrite")
    done = run_here(*args, "--json")
    assert as_json_here(done) == {"files": [str(tmp_path / "t.safetensors")]}
    assert done.stderr.startswith("note: no dumps of layers 1, 3, 4: right only if ")
    assert run_here(*args, "-q").stderr == ""


def as_json_here(done):
    done.returncode = done.exit_code
    return as_json(done)


# --- help


def test_the_help_of_record_shows_cache_events_and_token_ids():
    text = run_here("record", "--help").output
    assert "--generate 64 --expert-budget 25% --cache-events" in text
    assert "--data ids=tokens.npy" in text
    assert "rows of exactly --length tokens are sequences" in " ".join(text.split())
    assert "moerun[transformers]" not in text
