"""Every public function with arguments that no library below can take: MoerunError or a result.

Functions and their parameters are found by introspection; the table only says what is in order.
"""

import importlib
import inspect
import math
import warnings

import numpy as np
import pytest
from predictors import predictor_of_shipped_model
from traces import random_routing, random_trace, write_trace

import moerun
from moerun import errors

PACKAGES = ("moerun", "moerun.metrics", "moerun.planning", "moerun.predictor", "moerun.recording")


class Odd:
    """Fails in every way in which a value can be looked at."""

    def __fspath__(self):
        return 5

    def __index__(self):
        return 2**80

    def __float__(self):
        raise OverflowError("not a float")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


NASTY = [
    None, True, -1, 0, 10**18, 2**63, 2**80, -(2**80), 1.5, math.nan, math.inf, 5e-324, 1e308,
    "", "x", "~nouser/x", "x" * 300, "a\0b", "\udcff", b"\xff", object(), Odd(), [], [None],
    [2**40], [-1], [1.5], ["\udcff"], {}, {"a": 1}, nested(900), np.zeros((0, 0)),
    np.array([2**40]), np.array(["x"]), np.full(3, np.nan),
]  # fmt: skip

# Of results: they are made by the package and hold what it gives them.
RESULTS = {
    "BatchResult", "CacheEvent", "Generation", "RoutingWindow", "Simulation", "Verdict",
    "BudgetCurve", "BudgetPoint", "LayerCurves", "Plan", "PlannedLayer", "Prediction", "Trial",
    "Evaluation", "PathState", "PredictorInfo", "TrainingProgress", "TrainingResult",
    "DataSource", "Engine", "RecordingInterrupted", "RecordingSummary", "Stack", "TraceOptions",
    "Batch", "TraceShard",
}  # fmt: skip
# These are made by functions of their own, such as `Model.load`.
MADE_INSIDE = {"Model", "Trace", "PathPredictor", "Geometry"}
# Of these, what is in order computes for long: the paths that they are given do not exist.
NEEDS_A_MISSING_FILE = {
    "calibrate",
    "find_plan",
    "train",
    "record",
    "import_study",
    "load_transformers",
}
# They take no argument, or look at thousands of files.
LEFT_OUT = {
    "all_stored_costs", "costs_folder", "default_model", "machine_name", "pack_folder",
    "default_data",
}  # fmt: skip


def public():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) and name not in LEFT_OUT:
                yield f"{package}.{name}", value, None
            elif inspect.isclass(value) and name not in RESULTS:
                if name not in MADE_INSIDE:
                    yield f"{package}.{name}", value, None
                for method, member in inspect.getmembers(value):
                    if method.startswith("_") or not callable(member):
                        continue
                    of_class = inspect.ismethod(member)
                    yield f"{package}.{name}.{method}", member, None if of_class else name


PUBLIC = list(public())


@pytest.fixture(scope="module")
def known(tmp_path_factory, default_path):
    """Values that parameters may have, by name."""
    folder = tmp_path_factory.mktemp("outside")
    random = np.random.default_rng(0)
    sequence = moerun.SequenceRouting(
        random_routing(random, 8, 20, 32, 4), np.arange(20, dtype=np.int32)
    )
    trace_path = write_trace(folder / "t.safetensors", [sequence], num_experts=32)
    trace = moerun.Trace.open(trace_path)
    small = moerun.Trace.open(random_trace(folder / "small.safetensors"))
    predictor = folder / "p.safetensors"
    predictor_of_shipped_model(predictor)
    planning = moerun.planning
    costs = planning.CostModel((1e-4,) * 8, (1e-4,) * 8, (1e-5,) * 8, 1e-4, 1e-5, 1e9, device="cpu")
    values = {
        "trace": small,
        "curves": planning.layer_curves(trace),
        "costs": costs,
        "geometry": planning.Geometry.of_model(),
        "budget_bytes": 6_000_000,
        "token_ids": [1, 2, 3],
        "prompts": [[1, 2, 3]],
        "text": "import os",
        "path": default_path,
        "directory": default_path,
        "model": default_path,
        "output": folder / "none" / "out.safetensors",
        "traces": [trace_path],
        "predictor": predictor,
        "expert_ids": np.zeros((1, 5, 2), np.uint16),
        "num_experts": 8,
        "top_k": 2,
        "moe_layers": [0, 1],
        "samples": [(1e6, 1e-3), (2e6, 2e-3)],
        "vocab_size": 100,
        "num_outputs": 64,
        "identity": "0" * 16,
        "device": "cpu",
        "domain": "code",
        "texts": ["one", "two"],
        "files": [trace_path],
        "root": folder,
        "paths": [folder / "missing.safetensors"],
        "plan": {"version": 1},
        "max_new_tokens": 2,
        "attention_s": 1e-4,
        "moe_s": 1e-4,
        "prompt_s": 1e-5,
        "head_s": 1e-4,
        "link_bytes_per_s": 1e9,
        "link_fixed_s": 1e-5,
        "model_name": "m",
        "sequence": 0,
        "rates": np.full((1, 8), 0.25),
        "share": 0.25,
        "tokens": 16,
        "segment_length": 16,
        "length": 16.0,
        "values": "{}",
        "where": "w",
        "q": 50,
        "states": [moerun.predictor.PathPredictor.open(predictor).state()],
        "state": moerun.predictor.PathPredictor.open(predictor).state(),
        "options": moerun.recording.TraceOptions(),
        "record_bytes": 1200,
        "engine": None,
        "sources": [],
        "new_tokens": [[1]],
        "expert_bytes": 70000,
        "seed": 0,
        "routing": sequence,
    }
    return values, folder, trace


@pytest.fixture(scope="module")
def instances(known, model):
    values, folder, trace = known
    writer = moerun.TraceWriter(
        folder / "w.safetensors", model="m", num_experts=8, top_k=2, moe_layers=[0, 1]
    )
    predictor = moerun.predictor.PathPredictor.open(values["predictor"])
    yield {
        "Model": model,
        "Tokenizer": model.tokenizer,
        "Trace": trace,
        "TraceWriter": writer,
        "CostModel": values["costs"],
        "Geometry": values["geometry"],
        "SimulationCosts": None,
        "SequenceRouting": None,
        "NetShape": moerun.predictor.NetShape(),
        "PathPredictor": predictor,
        "FileData": None,
        "NativeEngine": moerun.recording.NativeEngine(model, "m"),
        "RandomTokens": None,
        "TextData": None,
    }


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("MOERUN_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def call(function, arguments):
    result = function(**arguments)
    if isinstance(result, moerun.Model | moerun.Batch | moerun.Trace):
        result.close() if hasattr(result, "close") else None


@pytest.mark.parametrize(("name", "function", "owner"), PUBLIC, ids=[each[0] for each in PUBLIC])
def test_arguments_of_any_kind_raise_only_errors_of_the_package(
    known, instances, name, function, owner
):
    values, folder, _ = known
    short = name.rsplit(".", 1)[-1]
    if owner is not None:
        if instances.get(owner) is None or short in ("close", "discard", "shards", "pieces"):
            pytest.skip("needs no arguments of the caller")
        function = getattr(instances[owner], short)
    parameters = inspect.signature(function).parameters
    base = {
        each.name: values[each.name]
        for each in parameters.values()
        if each.default is inspect.Parameter.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    if short in NEEDS_A_MISSING_FILE:
        base = {key: folder / "missing" for key in base} | {
            "model" if "model" in parameters else "path": folder / "missing"
        }
        base = {key: value for key, value in base.items() if key in parameters}
    for param in parameters.values():
        if param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD):
            continue
        if short in NEEDS_A_MISSING_FILE and param.name in ("path", "model"):
            continue
        for value in NASTY:
            try:
                call(function, {**base, param.name: value})
            except errors.MoerunError as error:
                assert 0 < len(str(error)) < 2000, (name, param.name, value)
            except Exception as error:
                pytest.fail(f"{name}({param.name}={value!r:.60}): {type(error).__name__}: {error}")


def test_what_the_callers_own_code_raises_comes_back_as_it_is(default_path):
    def progress(done, total):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        moerun.Model.load(default_path, progress=progress)


def test_a_call_that_python_refuses_is_a_type_error(default_path):
    with pytest.raises(TypeError, match="nonsense"):
        moerun.Model.load(default_path, nonsense=1)
    with pytest.raises(TypeError, match="directory"):
        moerun.Tokenizer()


def test_guarded_functions_keep_their_signature_and_can_be_pickled():
    import pickle

    assert next(iter(inspect.signature(moerun.dry_run).parameters)) == "path"
    assert pickle.loads(pickle.dumps(moerun.dry_run)) is moerun.dry_run
