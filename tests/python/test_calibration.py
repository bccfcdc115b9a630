"""Measuring a machine, keeping what was found, and finding it again."""

import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import offline_environment
from test_cli_plan import record

import moerun
from moerun import Model, _moerun
from moerun.errors import FormatError, InvalidArgumentError, OutOfMemoryError
from moerun.identity import ModelIdentity
from moerun.planning import (
    CostModel,
    all_stored_costs,
    calibrate,
    costs_folder,
    forget_costs,
    machine_name,
    store_costs,
    stored_costs,
)
from moerun.planning.layer_costs import Routing, layer_costs


@pytest.fixture(scope="module")
def costs(default_path):
    steps = []
    found = calibrate(
        default_path, device="cpu", threads=1, progress=lambda *step: steps.append(step)
    )
    assert {name for name, _ in steps} == {"loading", "prompt", "decoding", "link"}
    assert all(0 <= share <= 1 for _, share in steps)
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nothing that is stored on the machine is seen or touched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moerun" / "costs"


def run(*args, cache=None, **options):
    variables = {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "moerun_tools.plan", *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=offline_environment(**variables),
        **options,
    )
    assert "Traceback" not in done.stderr
    return done


# What is measured


def test_what_is_measured_makes_sense(costs, default_path):
    for times in (costs.attention_s, costs.moe_s, costs.prompt_s):
        assert len(times) == 8
        assert all(0 < each < 1 for each in times)
    assert 0 < costs.head_s < 1
    assert costs.link_bytes_per_s > 1e6
    assert 0 <= costs.link_fixed_s < 1
    assert 0 <= costs.link_error <= costs.link_error_worst
    assert costs.slowdown >= 0
    assert costs.wake_s >= 0
    assert (costs.device, costs.store, costs.threads) == ("cpu", "checkpoint", 1)
    assert (costs.context_tokens, costs.model) == (256, "tiny-olmoe")
    assert costs.sizes_id == ModelIdentity(default_path).sizes_id
    assert costs.machine == machine_name()
    assert costs.moerun_version == moerun.__version__
    assert costs.direct_io in (True, False)
    assert costs.cpu_kernels in moerun.build_info()["cpu_kernels"]["supported"]
    assert CostModel.from_json(costs.to_json()) == costs


def test_a_token_is_the_sum_of_its_layers_and_the_head(default_path):
    with Model.load(default_path, device="cpu", expert_budget="40%", prefetch=False) as model:
        list(model.generate(range(20), 13, ignore_eos=True, temperature=0))
        times = _moerun.layer_times(model._native)
        stalled = model.stats()["cache"]["total"]["stalled_s"]
        assert times["attention_s"].shape == times["moe_s"].shape == (12, 8)
        assert times["prompt_tokens"].tolist() == [20]
        assert times["prompt_moe_s"].shape == (1, 8)
        assert (times["attention_s"] > 0).all()
        assert (times["moe_s"] > 0).all()
        assert times["waited_s"].sum() == pytest.approx(stalled)
        layers = (times["attention_s"] + times["moe_s"] + times["waited_s"]).sum(axis=1)
        assert np.isnan(times["token_s"][-1])
        assert (layers[:-1] < times["token_s"][:-1]).all()
        # A second text begins anew; what records the routing is not timed.
        list(model.generate([1, 2], 3, ignore_eos=True, temperature=0))
        model.trace([1, 2, 3])
        times = _moerun.layer_times(model._native)
        assert np.isnan(times["token_s"]).nonzero()[0].tolist() == [11, 13]
        assert times["prompt_tokens"].tolist() == [20, 2]


def test_a_record_file_is_another_store(default_path, tmp_path):
    costs = calibrate(default_path, device="cpu", pack=tmp_path, context_tokens=40)
    assert (costs.store, costs.context_tokens) == ("record file", 40)
    assert list(tmp_path.iterdir())


def test_a_model_of_which_nothing_can_be_left_out_is_refused(default_path):
    with pytest.raises(InvalidArgumentError, match="every expert fits in expert_budget='100%'"):
        calibrate(default_path, device="cpu", expert_budget="100%")
    with pytest.raises(OutOfMemoryError, match="smallest"):
        calibrate(default_path, device="cpu", expert_budget=1000)
    with pytest.raises(InvalidArgumentError, match="context_tokens"):
        calibrate(default_path, context_tokens=0)


def test_what_progress_raises_ends_it(default_path):
    def stop(step, share):
        if step == "link":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(default_path, device="cpu", progress=stop)


def test_a_small_budget_is_measured_as_well(default_path):
    """Where a token's experts have no room in a layer, it always waits."""
    smallest = moerun.dry_run(default_path, "cpu")["smallest_budget_bytes"]
    costs = calibrate(default_path, device="cpu", expert_budget=smallest, context_tokens=20)
    assert all(each > 0 for each in costs.moe_s)


# Arithmetic on made-up times


def test_costs_come_out_of_times_that_were_made_of_them():
    config = {"num_experts": 16, "top_k": 2}
    routing = Routing.make([6, 8], config)
    assert (routing.expert_ids[: routing.first_mixed] < [[[6], [8]]]).all()
    for phase, ids, guesses in zip(
        routing.phases, routing.expert_ids, routing.predicted_ids, strict=True
    ):
        for used, named, slots in zip(ids, guesses, (6, 8), strict=True):
            assert len(set(used)) == len(set(named)) == 2
            if phase == 2:  # the link moves guesses that nobody uses
                assert (named >= slots).all()
    count = routing.num_tokens
    rng = np.random.default_rng(0)
    waits = (routing.phases == 3)[:, None] & (rng.random((count, 2)) < 0.7)
    busy = 1 + 0.5 * (routing.phases == 2)[:, None]
    moe = np.array([3e-3, 4e-3]) * (busy + 0.5 * waits) + 2e-4 * waits
    attention = np.array([1e-3, 2e-3]) * busy
    waited = 5e-3 * waits
    times = {
        "attention_s": attention,
        "moe_s": moe,
        "waited_s": waited,
        "token_s": (attention + moe + waited).sum(axis=1) + 7e-4,
        "prompt_attention_s": np.full((2, 2), 1e-2) * [[2], [1]],
        "prompt_moe_s": np.full((2, 2), 3e-2) * [[2], [1]],
        "prompt_tokens": np.array([10, 10]),
    }
    found = layer_costs(times, routing)
    expected = {
        "attention_s": (1e-3, 2e-3),
        "moe_s": (3e-3, 4e-3),
        "prompt_s": (4e-3, 4e-3),
        "head_s": 7e-4,
        "slowdown": 0.5,
        "wake_s": 2e-4,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_a_segment_of_a_link_is_as_many_pieces_as_reads(costs):
    link = replace(costs, link_fixed_s=1e-5, link_bytes_per_s=1e9)
    assert link.link_of_segments(2**20) == (pytest.approx(3e-5), pytest.approx(1e9))
    packed = replace(link, store="record file")
    assert packed.link_of_segments(2**20) == (pytest.approx(1e-5), pytest.approx(1e9))
    fixed_s, rate = packed.link_of_segments(2**25)  # 32 pieces
    assert fixed_s + 2**25 / rate == pytest.approx(32 * 1e-5 + 2**25 / 1e9, rel=0.01)
    for change in ({"store": ""}, {"device": "cuda"}):
        assert replace(link, **change).link_of_segments(2**25) == (1e-5, 1e9)


# Keeping


def test_what_is_stored_is_found_again(costs, default_path, folder):
    assert stored_costs(default_path, "cpu") is None
    path = store_costs(costs)
    assert path.parent == costs_folder() == folder
    assert stored_costs(default_path, "cpu") == costs
    assert stored_costs(default_path, "cpu", pack=True) is None
    newer = replace(costs, head_s=1.0)
    assert store_costs(newer) == path
    assert stored_costs(default_path, "cpu") == newer
    assert list(folder.iterdir()) == [path]  # no temporary file is left
    packed = replace(costs, store="record file")
    store_costs(packed)
    assert stored_costs(default_path, "cpu", pack=True) == packed
    assert [each for _, each in all_stored_costs()].count(newer) == 1
    assert forget_costs(default_path) == 2
    assert stored_costs(default_path, "cpu") is None
    assert forget_costs(default_path) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another"},
        {"sizes_id": "0" * 16},
        {"device": "cuda"},
        {"moerun_version": "99.0.0"},
    ],
    ids=str,
)
def test_what_is_of_something_else_is_not_returned(costs, default_path, change):
    changed = replace(costs, **change)
    store_costs(changed)
    assert stored_costs(default_path, "cpu") is None
    store_costs(costs).write_text(changed.to_json())  # under a name that is not its own
    assert stored_costs(default_path, "cpu") is None


def test_a_patch_version_measures_alike(costs, default_path):
    major, minor, *_ = moerun.__version__.split(".")
    store_costs(replace(costs, moerun_version=f"{major}.{minor}.999"))
    assert stored_costs(default_path, "cpu") is not None


def test_costs_that_say_nothing_of_their_origin_cannot_be_stored(costs):
    for name in ("machine", "sizes_id", "device", "store"):
        with pytest.raises(InvalidArgumentError, match=name):
            store_costs(replace(costs, **{name: ""}))


def test_a_damaged_file_is_named_and_replaced(costs, default_path):
    path = store_costs(costs)
    for text in (b"{", b"\xff\xfe", costs.to_json().replace("head_s", "head").encode()):
        path.write_bytes(text)
        with pytest.raises(FormatError, match=f"{path.name}.*moe-plan calibrate"):
            stored_costs(default_path, "cpu")
        assert [each for _, each in all_stored_costs()] == [None]
        store_costs(costs)
        assert stored_costs(default_path, "cpu") == costs


def test_costs_of_version_2_do_not_say_of_which_sizes_they_are(costs):
    value = json.loads(costs.to_json())
    del value["sizes_id"]
    old = CostModel.from_json(json.dumps({**value, "version": 2, "model_id": "0" * 16}))
    assert old == replace(costs, sizes_id="")


# moe-plan


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    record(path, "--length", "32", "--samples", "1")
    return path


def test_the_commands_find_what_calibrate_stored(tmp_path, trace, default_path):
    cache = tmp_path / "cache"
    for command in (("curve",), ("make", "--budget", "40%", "-o", tmp_path / "p.json")):
        done = run(*command, "--trace", trace, cache=cache)
        assert done.returncode == 1
        assert "moe-plan calibrate" in done.stderr
    file = tmp_path / "costs.json"
    done = run("calibrate", "--device", "cpu", "--json", "-o", file, cache=cache)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    costs = CostModel.from_json(file.read_text())
    assert stored_costs(default_path, "cpu") == costs
    assert value["head_s"] == costs.head_s
    assert value["stored"].startswith(str(cache))

    commands = {
        "curve": ("--device", "cpu", "--points", "3"),
        "make": ("--device", "cpu", "--budget", "40%", "-o", tmp_path / "p.json"),
        "simulate": ("--budget", "40%"),
    }
    for command, options in commands.items():
        arguments = (command, "--trace", trace, *options)
        text = run(*arguments, cache=cache).stdout
        assert "costs: measured on this machine " in text
        assert "assumed, not measured: all layers" not in text
        stored = json.loads(run(*arguments, "--json", cache=cache).stdout)
        assert stored.pop("costs").startswith("measured on this machine")
        given = json.loads(run(*arguments, "--json", "--costs", file, cache=cache).stdout)
        assert stored == given
    done = run("simulate", "--trace", trace, "--budget", "40%", "--pack", cache=cache)
    assert "moe-plan calibrate --pack" in done.stderr


def test_calibrate_lists_and_forgets(tmp_path, costs):
    cache = tmp_path / "cache"
    assert "nothing is stored" in run("calibrate", "--list", cache=cache).stdout
    path = store_costs(replace(costs, measured_at="2020-01-01T00:00:00+00:00"))
    text = run("calibrate", "--list", cache=cache).stdout
    for part in ("tiny-olmoe", "checkpoint", "days ago", machine_name(), path.name):
        assert part in text
    value = json.loads(run("calibrate", "--list", "--json", cache=cache).stdout)
    assert value["stored"][0]["costs"]["sizes_id"] == costs.sizes_id
    assert run("calibrate", "--forget", cache=cache).stdout == "1 measurement removed\n"
    assert "nothing is stored" in run("calibrate", "--list", cache=cache).stdout


def test_costs_of_another_machine_or_model(tmp_path, trace, costs):
    file = tmp_path / "c.json"
    file.write_text(replace(costs, machine="a supercomputer").to_json())
    command = ("simulate", "--trace", trace, "--budget", "40%", "--costs", file)
    done = run(*command)
    assert done.returncode == 1
    assert "another machine (a supercomputer" in done.stderr
    assert "--other-machine" in done.stderr
    assert run(*command, "--other-machine").returncode == 0
    file.write_text(replace(costs, sizes_id="0" * 16).to_json())
    for more in ((), ("--other-machine",)):
        done = run(*command, *more)
        assert done.returncode == 1
        assert "measured with another model" in done.stderr
    file.write_text(replace(costs, machine="", sizes_id="").to_json())
    assert run(*command).returncode == 0


def test_wrong_usage_of_calibrate(tmp_path):
    for args in (
        ("--list", "--forget"),
        ("--list", "-o", "x"),
        ("--context", "0"),
        ("--threads", "0"),
        ("-o", ""),
    ):
        assert run("calibrate", *args).returncode == 2, args
    done = run("calibrate", "-o", tmp_path / "no" / "c.json")
    assert done.returncode == 1
    assert "no folder" in done.stderr
    assert run("curve", "--trace", "t", "--other-machine").returncode == 2
    text = run("calibrate", "--help").stdout
    assert "moe-plan calibrate --list" in text


def test_calibrate_ends_quietly_at_ctrl_c(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "moerun_tools.plan", "calibrate", "--context", "200"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=offline_environment(XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONUNBUFFERED="1"),
    )
    for _ in itertools.repeat(None, 600):
        try:
            process.wait(0.05)
            break
        except subprocess.TimeoutExpired:
            if "_moerun" in Path(f"/proc/{process.pid}/maps").read_text():
                break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, 0)  # 0: it was done before the key was pressed
    assert "Traceback" not in err
    assert (process.returncode == 0) == bool(out)
