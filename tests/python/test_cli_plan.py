"""moe-plan as a user runs it: a process, its output, its files, its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_json, offline_environment
from traces import random_trace

import moerun
from moerun import Trace
from moerun.planning import (
    CostModel,
    Geometry,
    budget_curve,
    find_plan,
    layer_curves,
    make_plan,
)

COSTS = CostModel(
    attention_s=(1e-5,) * 8,
    moe_s=(5e-5,) * 8,
    prompt_s=(2e-5,) * 8,
    head_s=1e-4,
    link_fixed_s=2e-5,
    link_bytes_per_s=1e9,
)
FEW = "that 192 tokens of a trace are like all others (record some thousands)"
SIMPLE = ("--link-gb-per-s", "1", "--token-ms", "0.5")


def run(*args):
    script = Path(sys.executable).with_name("moe-plan")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "moerun_tools.plan"]
    done = subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env=offline_environment(),
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


def record(path, *options):
    """Record a trace of the shipped model."""
    command = [sys.executable, "-m", "moerun_tools.trace", "record", "-q", *options]
    environment = offline_environment()
    done = subprocess.run(
        [*command, "-o", str(path)], capture_output=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr


def assert_failed(done, *expected, code=1):
    """A readable message on standard error, nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert not done.stdout
    assert "error: " in done.stderr.lower().splitlines()[-1]
    assert code == 2 or done.stderr.count("\n") == 1
    for text in expected:
        assert text in done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def trace(folder):
    path = folder / "t.safetensors"
    record(path, "--length", "48", "--samples", "2", "--with-prefetch")
    return path


@pytest.fixture(scope="module")
def costs(folder):
    path = folder / "costs.json"
    path.write_text(COSTS.to_json())
    return path


@pytest.fixture(scope="module")
def geometry(default_path):
    return Geometry.of_model(default_path)


@pytest.fixture(scope="module")
def other(folder):
    """A trace of a model of another shape."""
    path = folder / "other.safetensors"
    random_trace(path)
    return path


@pytest.fixture(scope="module")
def made(folder, trace, costs):
    """The plan file, and what --json said of it."""
    path = folder / "plan.json"
    options = ("--budget", "40%", "--costs", costs, "-o", path, "--json")
    return path, as_json(run("make", "--trace", trace, *options))


def test_a_plan_is_that_of_python(made, trace, geometry):
    path, value = made
    budget = int(0.4 * geometry.total_bytes)
    with Trace.open(trace) as opened:
        expected, tried = find_plan(opened, costs=COSTS, budget_bytes=budget)
    assert json.loads(path.read_text()) == json.loads(expected.to_json())
    assert value["budget_bytes"] == budget
    assert value["predicted"] == expected.predicted.as_dict()
    assert [trial["name"] for trial in value["tried"]] == [trial.name for trial in tried]
    assert value["predicted"]["tpot_ms"] == min(trial["tpot_ms"] for trial in value["tried"])
    assert value["simulated"] is True
    assert value["assumed"] == [FEW]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert not list(path.parent.glob(".plan.json*"))  # no temporary file is left


def test_moe_run_takes_the_plan(made, run_cli):
    path, value = made
    dry = as_json(run_cli("--dry-run", "--json", "--plan", str(path)))
    assert [layer["slots"] for layer in dry["layers"]] == [
        layer["slots"] for layer in value["layers"]
    ]
    assert dry["arena_bytes"] == value["arena_bytes"]
    assert (dry["policy"], dry["prefetch"]) == (value["policy"], value["prefetch"])


def test_without_a_simulation_the_cost_model_decides(folder, trace, costs, geometry):
    path = folder / "quick.json"
    options = ("--budget", "40%", "--costs", costs, "--quick", "--policy", "lfu", "-o", path)
    value = as_json(run("make", "--trace", trace, *options, "--json"))
    with Trace.open(trace) as opened:
        expected = make_plan(
            layer_curves(opened, "lfu"), COSTS, geometry, int(0.4 * geometry.total_bytes)
        )
    assert json.loads(path.read_text()) == json.loads(expected.to_json())
    assert value["predicted"] == expected.predicted.as_dict()
    assert value["simulated"] is False
    assert "by the cost model" in run("make", "--trace", trace, *options).stdout


def test_a_static_plan_names_its_experts(folder, trace, run_cli):
    path = folder / "static.json"
    options = ("--budget", "3MB", "--policy", "static", "--split", "0.5", "--prefetch", "off")
    done = run("make", "--trace", trace, *options, *SIMPLE, "-o", path)
    assert done.returncode == 0, done.stderr
    layers = json.loads(path.read_text())["layers"]
    assert all(len(layer["experts"]) == layer["slots"] for layer in layers)
    dry = as_json(run_cli("--dry-run", "--json", "--plan", str(path)))
    assert (dry["policy"], dry["prefetch"]) == ("static", "off")
    assert {layer["split"] for layer in dry["layers"]} == {0.5}


def test_what_was_not_measured_is_said(folder, trace):
    path = folder / "simple.json"
    options = ("make", "--trace", trace, "--budget", "40%", "-o", path)
    done = run(*options, *SIMPLE)
    for text in ("plan", "uniform", "hit rate (%)", "TPOT (ms)", "TTFT with a prompt", str(path)):
        assert text in done.stdout
    assert "assumed, not measured: all layers take the same time" in done.stdout
    assert "experts are 70% of a token's time" in done.stdout
    more = ("--expert-share", "0.5", "--link-fixed-us", "9", "--prompt-token-ms", "0.1")
    value = as_json(run(*options, *SIMPLE, *more, "--json"))
    assert value["assumed"] == ["all layers take the same time, and the head none", FEW]
    assert value["predicted"]["ttft_ms"] == pytest.approx(51.2, rel=0.2)  # 512 tokens of 0.1 ms


def test_without_predictions_the_guesses_are_assumed(folder, trace):
    bare = folder / "bare.safetensors"
    record(bare, "--length", "32", "--samples", "1")
    curve = ("curve", "--points", "3", *SIMPLE)
    assert "--with-prefetch" in run(*curve, "--trace", bare).stdout
    assert "prefetch is right" in as_json(run(*curve, "--trace", bare, "--json"))["assumed"][-2]
    assert "--with-prefetch" not in run(*curve, "--trace", bare, "--prefetch", "off").stdout
    assert "--with-prefetch" not in run(*curve, "--trace", trace).stdout


def test_a_simulation_is_that_of_python(trace, costs, default_path):
    options = ("--budget", "25%", "--policy", "lru", "--split", "0.5", "--prefetch", "on")
    more = ("--prompt-tokens", "8", "--pack")
    value = as_json(run("simulate", "--trace", trace, *options, *more, "--costs", costs, "--json"))
    expected = moerun.simulate(
        trace,
        default_path,
        costs=COSTS,
        expert_budget="25%",
        policy="lru",
        split=0.5,
        prefetch=True,
        prompt_tokens=8,
        pack=True,
    ).to_dict()
    assert value.pop("assumed") == []
    assert value == json.loads(json.dumps(expected))


def test_the_cache_of_a_plan_does_what_was_predicted(made, trace, costs):
    path, value = made
    options = ("--plan", path, "--prefetch", "off", "--costs", costs)
    done = as_json(run("simulate", "--trace", trace, *options, "--json"))
    assert done["cache"]["total"]["hit_rate"] == pytest.approx(value["predicted"]["hit_rate"])
    table = run("simulate", "--trace", trace, *options).stdout
    assert f"hit rate    {100 * value['predicted']['hit_rate']:.1f} %\n" in table
    assert len(table.splitlines()) == 6 + 1 + 8


@pytest.mark.parametrize("options", [("100%",), ("40%", "--policy", "off")], ids=str)
def test_without_a_cache_there_is_no_hit_rate(trace, options):
    done = run("simulate", "--trace", trace, *SIMPLE, "--budget", *options)
    assert done.returncode == 0, done.stderr
    value = as_json(run("simulate", "--trace", trace, *SIMPLE, "--json", "--budget", *options))
    hit_rate = value["cache"]["total"]["hit_rate"]
    expected = "-" if hit_rate is None else f"{100 * hit_rate:.1f} %"
    assert f"hit rate    {expected}\n" in done.stdout


def test_no_policy_beats_belady(trace):
    options = ("--trace", trace, "--budget", "40%", *SIMPLE, "--json")
    rates = {}
    for policy in ("lru", "lcp", "belady"):
        value = as_json(run("simulate", *options, "--policy", policy))
        rates[policy] = value["cache"]["total"]["hit_rate"]
    assert rates["belady"] > max(rates["lru"], rates["lcp"])


def test_a_curve_is_that_of_python_and_is_drawn(folder, trace, costs, geometry):
    picture = folder / "curve.png"
    options = ("curve", "--trace", trace, "--costs", costs, "--points", "9")
    value = as_json(run(*options, "--json", "-o", picture))
    with Trace.open(trace) as opened:
        expected = budget_curve(
            layer_curves(opened), COSTS, geometry, points=9, here_bytes=geometry.total_bytes
        )
    assert value["knee"] == expected.knee > 0
    assert value["here"] == expected.here == 8  # all of it fits on any machine
    for point, found in zip(expected.points, value["points"], strict=True):
        assert found["budget_bytes"] == point.budget_bytes
        assert found["tpot_ms"] == point.plan.predicted.tpot_ms
        assert found["optimal_hit_rate"] == point.optimal_hit_rate
    assert picture.read_bytes().startswith(b"\x89PNG")
    knee = expected.points[expected.knee].budget_bytes
    assert value["advice"].startswith("Every expert fits here")
    assert f"--expert-budget {knee}" in value["advice"]

    text = run(*options, "-o", folder / "curve.svg").stdout
    lines = text.splitlines()
    marked = [index for index, line in enumerate(lines) if line.endswith("<- knee")]
    assert marked == [3 + expected.knee]
    assert value["advice"] in lines
    drawn = (folder / "curve.svg").read_text()
    assert 'id="plan"' in drawn
    assert "knee: " in drawn


def test_where_no_memory_helps_the_curve_says_so(folder, trace):
    fast = ("--link-gb-per-s", "1000000", "--token-ms", "1000000", "--link-fixed-us", "0")
    text = run("curve", "--trace", trace, *fast, "--points", "3", "-o", folder / "f.png").stdout
    assert "<- knee" not in text
    assert "saves no time" in text


@pytest.mark.parametrize("command", ["make", "simulate", "curve"])
def test_a_trace_of_another_model_is_refused(command, folder, other):
    options = {
        "make": ("--budget", "40%", "-o", folder / "x.json"),
        "simulate": ("--budget", "40%"),
        "curve": (),
    }[command]
    assert_failed(run(command, "--trace", other, *options, *SIMPLE), "trace", "model")
    assert not (folder / "x.json").exists()


def test_costs_of_another_model_are_refused(folder, trace):
    path = folder / "short.json"
    path.write_text(CostModel((1e-5,) * 3, (1e-5,) * 3, (1e-5,) * 3, 0.0, 0.0, 1e9).to_json())
    for command in (("curve",), ("simulate", "--budget", "40%")):
        assert_failed(run(*command, "--trace", trace, "--costs", path), "3", "8")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--budget", "10kB"), ("9.76 KiB", "288 KiB")),
        (("--budget", "lots"), ("lots", "25%")),
        (("--budget", "100%"), ("every expert fits", "--expert-budget 100%")),
        (("--budget", "40%", "-m", "no/such/model/here"), ("no/such/model/here",)),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_one_line(folder, trace, options, expected):
    path = folder / "never.json"
    assert_failed(run("make", "--trace", trace, *options, *SIMPLE, "-o", path), *expected)
    assert not path.exists()


def test_a_trace_of_a_few_tokens_is_too_little(folder):
    short = folder / "short.safetensors"
    record(short, "--length", "16", "--samples", "1")
    for command in (
        ("curve",),
        ("make", "--budget", "40%", "-o", folder / "no.json"),
        ("make", "--budget", "40%", "-o", folder / "no.json", "--quick"),
    ):
        done = run(*command, "--trace", short, *SIMPLE)
        assert_failed(done, "has 32 tokens", "record at least 64")
    assert not (folder / "no.json").exists()


def test_files_that_cannot_be_read_or_written_are_one_line(folder, trace, costs):
    make = ("make", "--budget", "40%", "-o")
    good = ("--trace", trace, *SIMPLE)
    before = trace.read_bytes()
    assert_failed(run(*make, trace, *good), "reads from it")
    assert_failed(run(*make, costs, "--trace", trace, "--costs", costs), "reads from it")
    assert trace.read_bytes() == before
    assert_failed(run(*make, folder, *good), "not a plain file")
    assert_failed(run(*make, folder / "no" / "p.json", *good), "no folder")
    path = folder / "p.json"
    assert_failed(run(*make, path, "--trace", folder / "no", *SIMPLE), "no trace")
    assert_failed(run(*make, path, "--trace", trace, "--costs", folder / "no"), "there is no file")
    assert_failed(run(*make, path, "--trace", trace, "--costs", trace), "not")
    assert_failed(run("simulate", *good, "--plan", folder / "no.json"), "no.json")
    assert not path.exists()


@pytest.mark.parametrize(
    "args",
    [
        ("curve",),
        ("curve", "--trace", "t", "--expert-share", "1"),
        ("curve", "--trace", "t", "--token-ms", "1"),
        ("curve", "--trace", "t", "--token-ms", "nan", "--link-gb-per-s", "1"),
        ("curve", "--trace", "t", "--token-ms", "1", "--link-gb-per-s", "0"),
        ("curve", "--trace", "t", "--costs", "c", "--expert-share", "1"),
        ("curve", "--trace", "t", *SIMPLE, "-o", "curve.pdf"),
        ("curve", "--trace", "t", *SIMPLE, "--points", "1"),
        ("make", "--trace", "t", "--budget", "40%", *SIMPLE),
        ("make", "--trace", "t", "--budget", "40%", *SIMPLE, "-o", ""),
        ("make", "--trace", "t", *SIMPLE, "-o", "p"),
        ("simulate", "--trace", "t", *SIMPLE),
        ("simulate", "--trace", "t", *SIMPLE, "--plan", "p", "--budget", "40%"),
        ("simulate", "--trace", "t", *SIMPLE, "--plan", "p", "--split", "1"),
        ("simulate", "--trace", "t", *SIMPLE, "--budget", "40%", "--policy", "mru"),
    ],
    ids=lambda args: " ".join(args),
)
def test_wrong_usage_ends_with_2(args):
    assert_failed(run(*args), code=2)


@pytest.mark.parametrize("command", ["make", "simulate", "curve"])
def test_help_has_examples(command):
    text = run(command, "--help").stdout
    assert f"moe-plan {command} --trace" in text
    assert "--link-gb-per-s" in text
    assert run("--version").stdout == f"moe-plan {moerun.__version__}\n"
