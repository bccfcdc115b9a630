"""Plans, costs and predictors of unknown origin: an answer or a sentence, no wait and no crash."""

import contextlib
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import offline_environment
from hostile import VALUES, mutate_json, mutations, seconds_of_mutations
from predictors import predictor_of_shipped_model, random_predictor, random_weights, ruled_trace

import moerun
from moerun.errors import FileError, FormatError, InvalidArgumentError, MoerunError
from moerun.planning import CostModel, find_plan, fit_transfer, layer_curves, make_plan
from moerun.planning.costs import read_costs
from moerun.planning.geometry import Geometry
from moerun.predictor import PathPredictor, evaluate, read_info
from moerun.predictor.files import write_predictor
from moerun.simulation import SimulationCosts, simulate
from moerun.trace import Trace

COSTS = CostModel(
    attention_s=(1e-4,) * 8,
    moe_s=(1e-4,) * 8,
    prompt_s=(1e-5,) * 8,
    head_s=1e-4,
    link_fixed_s=1e-5,
    link_bytes_per_s=1e9,
    device="cpu",
    link_error=0.1,
)
PLAN = {
    "version": 1,
    "model": "tiny-olmoe",
    "policy": "lru",
    "budget_bytes": 8 << 20,
    "prefetch": "off",
    "layers": [{"layer": n, "slots": 8, "split": 1.0, "warm": [1, 2]} for n in range(8)],
    "predicted": {"hit_rate": 0.5, "tpot_ms": 1.0, "prompt_tokens": 512},
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    return ruled_trace(path, tokens=80, vocab_size=4096)


@pytest.fixture(scope="module")
def geometry():
    return Geometry.of_model(None, "cpu")


@pytest.fixture(scope="module")
def curves(trace):
    return layer_curves(Trace.open(trace), "lru")


def run_tool(tool, *args, limit=8 << 30):
    """Run a tool with so much address space; it must not hang, and end with a sentence."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit},) * 2)\n"
        f"import moerun_tools.{tool} as tool; tool.main(prog_name='moe-{tool}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=offline_environment(),
        timeout=100,
    )
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr, done.stderr
    return done


# Pipes, devices, large files


@pytest.fixture(params=["pipe", "device", "folder", "large"])
def no_file(request, tmp_path):
    path = tmp_path / "x.safetensors"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.write(b" ")
            file.truncate(10 << 30)
    return path


def test_what_is_no_regular_file_of_some_size_is_refused_at_once(no_file, trace):
    for read in (
        lambda: moerun.dry_run(plan=no_file),
        lambda: simulate(trace, costs=COSTS, plan=no_file),
        lambda: read_costs(no_file),
        lambda: read_info(no_file),
        lambda: PathPredictor.open(no_file),
    ):
        with pytest.raises((FileError, FormatError), match=no_file.name):
            read()


def test_the_tools_do_not_wait_for_a_pipe(tmp_path, trace):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    numbers = ("--link-gb-per-s", "1", "--token-ms", "1")
    for command in (
        ("run", "--plan", pipe, "-n", "1", "x"),
        ("plan", "make", "--trace", trace, "--costs", pipe, "--budget", "40%", "-o", "p.json"),
        ("plan", "simulate", "--trace", trace, "--plan", pipe, *numbers),
        ("predictor", "info", pipe),
        ("predictor", "eval", pipe, trace),
    ):
        done = run_tool(*command)
        assert done.returncode == 1, (command, done.stderr)
        assert str(pipe) in done.stderr, (command, done.stderr)


def test_stored_costs_that_are_a_pipe_are_refused_or_measured_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    identity = moerun.identity.ModelIdentity(None)
    mine = {"machine": moerun.identity.machine_name(), "sizes_id": identity.sizes_id}
    file = moerun.planning.store_costs(replace(COSTS, **mine, store="checkpoint"))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(FileError, match="a pipe"):
        moerun.planning.stored_costs(None, "cpu")
    assert [costs for _, costs in moerun.planning.all_stored_costs()] == [None]


# Numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("link_bytes_per_s", 5e-324),
        ("link_bytes_per_s", 0.5),
        ("link_bytes_per_s", 1e300),
        ("link_fixed_s", 1e308),
        ("head_s", 1e308),
        ("head_s", 10**400),
        ("head_s", math.nan),
        ("slowdown", 1e308),
        ("wake_s", 1e7),
        ("moe_s", (1e308,) * 8),
        ("attention_s", [[[[0.1]]]] * 8),
        ("link_error", 1e308),
    ],
)
def test_costs_with_which_no_time_is_a_number_are_refused(
    tmp_path, trace, curves, geometry, name, value
):
    with pytest.raises(InvalidArgumentError, match=name):
        replace(COSTS, **{name: value})
    file = tmp_path / "c.json"
    file.write_text(json.dumps({**json.loads(COSTS.to_json()), name: value}))
    with pytest.raises(FormatError, match=rf"c\.json: {name}"):
        read_costs(file)
    if name != "link_error":
        numbers = {"attention_s": 1e-4, "moe_s": 1e-4, "prompt_s": 1e-5, "head_s": 1e-4}
        costs = SimulationCosts(**{**numbers, "link_bytes_per_s": 1e9, name: value})
        with pytest.raises(InvalidArgumentError, match=name):
            simulate(trace, costs=costs, expert_budget="40%")


def test_the_commands_refuse_such_costs_with_a_sentence(tmp_path, trace):
    file = tmp_path / "c.json"
    for change, command in (
        ({"link_bytes_per_s": 5e-324}, ("make", "--budget", "40%", "-o", tmp_path / "p.json")),
        ({"link_fixed_s": 1e308}, ("simulate", "--budget", "40%")),
        ({"head_s": 10**400}, ("curve",)),
    ):
        file.write_text(json.dumps({**json.loads(COSTS.to_json()), **change}))
        done = run_tool("plan", *command, "--trace", trace, "--costs", file)
        assert done.returncode == 1
        assert f"c.json: {next(iter(change))} must be at" in done.stderr


def test_the_extremes_that_are_allowed_have_plans(curves, geometry, trace):
    small = {"attention_s": (0.0,) * 8, "moe_s": (0.0,) * 8, "prompt_s": (0.0,) * 8}
    large = {name: (1e6,) * 8 for name in small}
    for costs in (
        replace(COSTS, **small, head_s=0.0, link_fixed_s=0.0, link_bytes_per_s=1e18),
        replace(COSTS, **large, head_s=1e6, link_fixed_s=1e6, link_bytes_per_s=1.0, slowdown=1e6),
        replace(COSTS, **small, head_s=0.0, link_fixed_s=5e-324, link_bytes_per_s=1.0),
    ):
        plan = make_plan(curves, costs, geometry, geometry.total_bytes // 2)
        assert math.isfinite(plan.predicted.tpot_ms)
        found = simulate(trace, costs=costs, expert_budget="40%")
        assert math.isfinite(found.seconds)
        assert find_plan(Trace.open(trace), costs=costs, budget_bytes=geometry.total_bytes // 2)


def test_transfers_from_which_no_line_follows_are_refused():
    for samples in (
        [(1e308, 1e-308), (1, 5e-324)],
        [(5e-324, 5e-324), (1e308, 1e308)],
        [(1, 1e308), (2, 1e-308)],
        [(1e-300, 1.0), (1e-299, 1.1)],
    ):
        with contextlib.suppress(InvalidArgumentError):
            fixed, rate = fit_transfer(samples)
            assert 0 <= fixed <= 1e6
            assert 1 <= rate <= 1e18


# Predictors


def huge(scale, tmp_path):
    """A predictor of finite weights whose sums are none."""
    sizes = {"vocab_size": 4096, "layers": 8, "experts": 32, "top_k": 4}
    file = tmp_path / "huge.safetensors"
    own = {"trained_sequences": np.zeros(0, np.int64)}
    identity = moerun.identity.ModelIdentity(None)
    own |= {"model_id": identity.model_id, "tokenizer_hash": identity.tokenizer_hash}
    info, _ = random_predictor(file, **sizes, **own)
    weights = random_weights(info.shape, 4096, 8 * 32)
    write_predictor(
        file, info, {name: (w * scale).clip(-3e38, 3e38) for name, w in weights.items()}
    )
    return file


def test_a_predictor_of_finite_but_huge_weights_is_refused(tmp_path, trace):
    file = huge(1e38, tmp_path)
    predictor = PathPredictor.open(file, None)
    with pytest.raises(FormatError, match=r"huge\.safetensors.*not numbers.*train it again"):
        predictor.predict([1, 2, 3])
    state = predictor.state()
    with pytest.raises(FormatError, match="not numbers"):
        predictor.advance([state], [[1, 2]])
    assert state.num_tokens == 0
    with pytest.raises(FormatError, match="not numbers"):
        evaluate(file, trace)
    done = run_tool("predictor", "eval", file, trace)
    assert done.returncode == 1
    assert "huge.safetensors" in done.stderr
    with moerun.Model.load(device="cpu") as model, pytest.raises(FormatError, match="not numbers"):
        list(
            model.generate_batch(
                [[1, 2]] * 8, batch_size=2, predictor=file, max_new_tokens=4, temperature=0
            )
        )


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e20])
def test_a_predictor_that_is_only_too_sure_is_evaluated(tmp_path, trace, scale):
    file = huge(scale, tmp_path)
    with contextlib.suppress(FormatError):
        probabilities = PathPredictor.open(file).predict([1, 2, 3])
        assert np.isfinite(probabilities).all()
        assert math.isfinite(evaluate(file, trace).calibration_error)


# Mutations


def test_mutated_plans_are_plans_or_refused_with_their_name(tmp_path):
    path = tmp_path / "plan.json"
    rng = random.Random(0)
    accepted = 0
    with seconds_of_mutations(2.0) as more:
        while more():
            if rng.random() < 0.6:
                data = json.dumps(mutate_json(rng, PLAN)).encode()
            else:
                data = mutations(rng, json.dumps(PLAN).encode())
            path.write_bytes(data)
            try:
                moerun.dry_run(device="cpu", plan=path)
                accepted += 1
            except MoerunError as error:
                str(error).encode()
                assert len(str(error)) < 2000
    assert accepted > 0


def test_plans_with_any_value_in_any_field_are_plans_or_refused(tmp_path):
    path = tmp_path / "plan.json"
    for name in (*PLAN, "model_id", "resident"):
        for value in VALUES:
            path.write_text(json.dumps({**PLAN, name: value}))
            with contextlib.suppress(MoerunError):
                moerun.dry_run(device="cpu", plan=path)


def test_mutated_costs_are_costs_or_refused_with_their_name(tmp_path, curves, geometry):
    path = tmp_path / "costs.json"
    whole = json.loads(COSTS.to_json())
    rng = random.Random(0)
    accepted = 0
    with seconds_of_mutations(2.0) as more:
        while more():
            if rng.random() < 0.6:
                data = json.dumps(mutate_json(rng, whole)).encode()
            else:
                data = mutations(rng, json.dumps(whole).encode())
            path.write_bytes(data)
            try:
                costs = read_costs(path)
            except MoerunError as error:
                assert "costs.json" in str(error)
                str(error).encode()
                continue
            accepted += 1
            assert read_costs(path) == CostModel.from_json(costs.to_json())
            with contextlib.suppress(MoerunError):
                plan = make_plan(curves, costs, geometry, geometry.total_bytes // 2)
                assert math.isfinite(plan.predicted.tpot_ms)
    assert accepted > 0


def test_costs_with_any_value_in_any_field_are_costs_or_refused(tmp_path):
    whole = json.loads(COSTS.to_json())
    for name in whole:
        for value in VALUES:
            with contextlib.suppress(FormatError):
                CostModel.from_json(json.dumps({**whole, name: value}), "costs")


def test_mutated_predictors_predict_or_are_refused_with_their_name(tmp_path, trace):
    whole = predictor_of_shipped_model(tmp_path / "whole.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "predictor.safetensors"
    rng = random.Random(0)
    with seconds_of_mutations(3.0) as more:
        while more():
            kind = rng.randrange(3)
            if kind == 0:  # of the header, whose length stays right
                text = mutations(rng, whole[8:header])
                data = len(text).to_bytes(8, "little") + text + whole[header:]
            elif kind == 1:
                value = json.loads(whole[8:header])
                value["__metadata__"] = {
                    key: each if isinstance(each, str) else json.dumps(each)
                    for key, each in mutate_json(rng, value["__metadata__"]).items()
                }
                text = json.dumps(value).encode()
                data = len(text).to_bytes(8, "little") + text + whole[header:]
            else:
                data = mutations(rng, whole)
            path.write_bytes(data)
            for use in (
                read_info,
                lambda file: PathPredictor.open(file, threads=1).predict([1, 2]),
            ):
                try:
                    use(path)
                except MoerunError as error:
                    assert "predictor.safetensors" in str(error)
                    str(error).encode()


@pytest.mark.parametrize(
    "value", ["[]", "{}", '{"domains": 5}', '{"domains": [null], "tokens": []}']
)
def test_what_a_predictor_says_of_its_training_may_be_anything(tmp_path, value):
    file = predictor_of_shipped_model(tmp_path / "p.safetensors")
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:header])
    fields["__metadata__"]["training"] = value
    text = json.dumps(fields).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[header:])
    for more in ((), ("--json",)):
        done = run_tool("predictor", "info", file, *more)
        assert done.returncode == (1 if value == "[]" else 0), done.stderr
