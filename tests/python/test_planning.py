"""Plans: held to uniform ones, to their budget, to the runtime that reads them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from cached import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import random_trace

import moerun
from moerun import Model, Trace, errors
from moerun.planning import (
    CostModel,
    Geometry,
    LayerCurves,
    budget_curve,
    fit_transfer,
    layer_curves,
    make_plan,
    replay_hits,
    uniform_plan,
)
from moerun.sizes import size_text

# Made-up models


def random_problem(seed, layers=None, experts=None):
    """Curves, costs and sizes that belong together."""
    random = np.random.default_rng(seed)
    layers = layers or int(random.integers(1, 13))
    experts = experts or int(random.integers(2, 25))
    top_k = int(random.integers(1, min(experts, 9)))
    records = int(random.integers(1, 300))
    geometry = Geometry(
        model="made up",
        moe_layers=tuple(range(1, layers + 1)),
        num_experts=experts,
        top_k=top_k,
        records=records,
        record_bytes=int(random.integers(1, 50)) * 192,
        ring_bytes=1,
    )
    ring = min(top_k * geometry.expert_bytes, geometry.total_bytes - 1)
    geometry = replace(geometry, ring_bytes=ring)
    share = np.arange(experts + 1) / experts
    smooth = share ** random.uniform(0.3, 2, (layers, 1))
    steps = np.where(random.random((layers, experts + 1)) < 0.3, smooth, 0)
    hit_rate = smooth if random.random() < 0.5 else np.maximum.accumulate(steps, axis=1)
    curves = LayerCurves(
        model="made up",
        policy=str(random.choice(["lru", "lfu", "lcp", "static"])),
        moe_layers=geometry.moe_layers,
        num_experts=experts,
        top_k=top_k,
        hit_rate=hit_rate,
        optimal=np.sqrt(hit_rate),
        static=hit_rate,
        ranking=np.stack([random.permutation(experts) for _ in range(layers)]),
        correctness=np.sort(random.random((layers, top_k)))[:, ::-1],
        correctness_measured=True,
    )
    expert_s = 10 ** random.uniform(-5, -2)
    costs = CostModel(
        attention_s=tuple(random.uniform(0, 1e-3, layers)),
        moe_s=tuple(random.uniform(0, 1e-3, layers)),
        prompt_s=tuple(random.uniform(0, 1e-4, layers)),
        head_s=random.uniform(0, 1e-3),
        link_fixed_s=random.choice([0.0, 1e-5]),
        link_bytes_per_s=geometry.expert_bytes / expert_s,
    )
    return curves, costs, geometry


def random_budget(geometry, share):
    return geometry.ring_bytes + int(share * (geometry.total_bytes - geometry.ring_bytes))


@given(seed=st.integers(0, 100_000), share=st.floats(0, 0.999), prefetch=st.booleans())
@settings(max_examples=150)
def test_a_plan_fits_and_is_never_slower_than_a_uniform_one(seed, share, prefetch):
    problem = random_problem(seed)
    curves, _, geometry = problem
    budget = random_budget(geometry, share)
    plan = make_plan(*problem, budget, prefetch=prefetch)
    assert plan.arena_bytes <= plan.budget_bytes == budget
    assert not plan.is_resident
    assert plan.prefetch == "off" or (prefetch and plan.prefetch == "auto")
    predicted = plan.predicted
    assert 0 <= predicted.hit_rate <= 1
    assert 0 <= predicted.stalled_ms <= predicted.tpot_ms
    assert predicted.ttft_ms > 0
    assert sum(layer.stalled_ms for layer in plan.layers) == pytest.approx(predicted.stalled_ms)
    for split in (0, 0.25, 0.4, 1):
        uniform = uniform_plan(*problem, budget, split, prefetch=prefetch)
        assert uniform.arena_bytes <= budget
        assert predicted.tpot_ms <= uniform.predicted.tpot_ms
    for index, layer in enumerate(plan.layers):
        assert layer.layer == index + 1
        if curves.policy == "static":
            assert layer.experts == tuple(curves.ranking[index, : layer.slots])
        else:
            assert layer.experts == ()


@given(seed=st.integers(0, 100_000), share=st.floats(0, 0.999))
def test_prefetch_and_foresight_are_never_predicted_to_cost_time(seed, share):
    curves, costs, geometry = random_problem(seed)
    budget = random_budget(geometry, share)
    ideal = replace(curves, hit_rate=curves.optimal)
    plain = make_plan(curves, costs, geometry, budget, prefetch=False).predicted.tpot_ms
    ahead = make_plan(curves, costs, geometry, budget).predicted.tpot_ms
    assert ahead <= plain * 1.01
    assert make_plan(ideal, costs, geometry, budget).predicted.tpot_ms <= ahead * 1.01


@given(seed=st.integers(0, 100_000))
@settings(max_examples=40)
def test_more_memory_is_never_slower(seed):
    problem = random_problem(seed)
    _, costs, geometry = problem
    curve = budget_curve(*problem, points=9)
    assert len(curve.points) == 9
    assert curve.points[0].budget_bytes == geometry.ring_bytes
    times = [point.plan.predicted.tpot_ms for point in curve.points]
    assert (np.diff(times) <= 1e-9 * times[0]).all()
    for point in curve.points:
        assert point.plan.arena_bytes <= point.budget_bytes
        assert point.plan.predicted.tpot_ms <= point.uniform_tpot_ms
        assert point.optimal_tpot_ms <= point.plan.predicted.tpot_ms * (1 + 1e-9)
    last = curve.points[-1]
    assert last.plan.is_resident
    assert last.budget_bytes == geometry.total_bytes
    assert last.plan.predicted.tpot_ms == pytest.approx(1e3 * costs.resident_s)
    assert (last.plan.predicted.hit_rate, last.plan.predicted.bytes_per_token) == (1, 0)
    assert last.optimal_hit_rate == 1


def test_the_knee_is_where_the_curve_bends():
    curves, costs, geometry = random_problem(3, layers=4, experts=16)
    share = np.arange(17) / 16
    bent = np.tile(np.where(share <= 0.25, 3.6 * share, 0.9 + 0.1 * (share - 0.25) / 0.75), (4, 1))
    slow = replace(costs, link_bytes_per_s=geometry.expert_bytes / 1.0)
    curve = budget_curve(
        replace(curves, hit_rate=bent, optimal=bent),
        slow,
        replace(geometry, ring_bytes=1),
        points=41,
        prefetch=False,
        split=1,
    )
    knee = curve.points[curve.knee].budget_bytes
    assert knee == pytest.approx(geometry.total_bytes / 4, rel=0.15)


def test_uneven_layers_get_uneven_budgets():
    curves, costs, geometry = random_problem(1, layers=2, experts=8)
    share = np.arange(9) / 8
    hit_rate = np.stack([np.minimum(1, 4 * share), share * 0.1])  # one layer wants a quarter
    slow = replace(costs, link_bytes_per_s=geometry.expert_bytes / 0.1)
    budget = geometry.ring_bytes + 6 * geometry.expert_bytes
    plan = make_plan(
        replace(curves, hit_rate=hit_rate), slow, geometry, budget, prefetch=False, split=1
    )
    assert [layer.slots for layer in plan.layers] == [2, 4]


# Plans and the runtime


@pytest.fixture(scope="module")
def tiny(default_path, tmp_path_factory):
    geometry = Geometry.of_model(default_path)
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    trace = Trace.open(
        random_trace(path, lengths=(60, 50), layers=8, experts=32, top_k=4, moe_layers=None)
    )
    costs = CostModel((1e-4,) * 8, (2e-4,) * 8, (1e-5,) * 8, 1e-4, 1e-5, 1e9)
    return trace, costs, geometry


def test_sizes_of_a_model_are_the_runtime_s_own(default_path, tiny):
    geometry, sizes = tiny[2], moerun.dry_run(default_path)
    assert geometry.model == default_path.name
    assert geometry.moe_layers == tuple(range(8))
    assert (geometry.num_experts, geometry.top_k) == (32, 4)
    assert geometry.expert_bytes == sizes["expert_bytes_each"]
    assert geometry.total_bytes == sizes["total_expert_bytes"]
    assert geometry.ring_bytes == sizes["smallest_budget_bytes"]


@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp", "static"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_the_runtime_takes_a_plan_as_it_was_meant(default_path, tiny, tmp_path, policy, share):
    trace, costs, geometry = tiny
    plan = make_plan(layer_curves(trace, policy), costs, geometry, random_budget(geometry, share))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    sizes = moerun.dry_run(default_path, plan=file)
    assert (sizes["policy"], sizes["prefetch"]) == (policy, "auto")
    assert sizes["budget_bytes"] == plan.budget_bytes
    assert sizes["arena_bytes"] == plan.arena_bytes
    assert [(layer["slots"], layer["split"]) for layer in sizes["layers"]] == [
        (layer.slots, layer.split) for layer in plan.layers
    ]
    predicted = json.loads(file.read_text())["predicted"]
    assert predicted["tpot_ms"] == plan.predicted.tpot_ms


@pytest.mark.parametrize("split", [1.0, 0.5])
@pytest.mark.parametrize("share", [0.1, 0.33, 0.8])
def test_uniform_is_what_the_runtime_does_without_a_plan(default_path, tiny, split, share):
    trace, costs, geometry = tiny
    budget = random_budget(geometry, share)
    plan = uniform_plan(layer_curves(trace), costs, geometry, budget, split)
    sizes = moerun.dry_run(default_path, expert_budget=budget, split=split)
    assert [(layer["slots"], layer["split"]) for layer in sizes["layers"]] == [
        (layer.slots, layer.split) for layer in plan.layers
    ]
    assert plan.arena_bytes == sizes["arena_bytes"]


def test_a_run_hits_as_its_plan_predicts(shipped, tiny, tmp_path):
    """On the routing that the plan was made from, but for what the prompt leaves in the slots."""
    _, costs, geometry = tiny
    with Model.load(shipped.directory, expert_budget="40%", prefetch=False) as model:
        ids = model.trace(shipped.prompt, generate=len(shipped.tokens)).expert_ids
    layers, tokens, top_k = ids.shape
    hits = replay_hits(ids, 32, "lcp")
    curves = replace(
        random_problem(0, layers=8, experts=32)[0],
        policy="lcp",
        moe_layers=geometry.moe_layers,
        top_k=4,
        hit_rate=hits / (tokens * top_k),
        correctness=np.zeros((8, 4)),
    )
    plan = make_plan(curves, costs, geometry, random_budget(geometry, 0.3), prefetch=False, split=1)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    with Model.load(shipped.directory, plan=file, cache_events=True) as model:
        assert generate(model, shipped.prompt, len(shipped.tokens)) == shipped.tokens
        events, cache = model.cache_events(), model.stats()["cache"]
    filled = 0
    for layer in range(layers):
        own = [event for event in events if event.layer == layer]
        filled += [event.kind for event in own].index("miss")
    measured = cache["total"]["hits"]
    assert measured > 0
    assert abs(measured / cache["total"]["lookups"] - plan.predicted.hit_rate) <= (
        filled / cache["total"]["lookups"] + 0.05
    )


def test_a_budget_that_holds_everything_gives_a_resident_plan(tiny, default_path, tmp_path):
    trace, costs, geometry = tiny
    curves = layer_curves(trace)
    for plan in (
        make_plan(curves, costs, geometry, geometry.total_bytes),
        uniform_plan(curves, costs, geometry, 2 * geometry.total_bytes),
    ):
        assert plan.is_resident
        assert plan.arena_bytes == geometry.total_bytes
        assert plan.predicted.stalled_ms == 0
        assert plan.predicted.ttft_ms == pytest.approx(1e3 * (8 * 512 * 1e-5 + 1e-4))
        file = tmp_path / "plan.json"
        file.write_text(plan.to_json())
        sizes = moerun.dry_run(default_path, plan=file)
        assert (sizes["state"], sizes["arena_bytes"]) == ("resident", geometry.total_bytes)


def test_time_to_first_token_is_moving_or_computing_whichever_is_longer(tiny):
    trace, costs, real = tiny
    geometry = replace(real, move_pieces=None, move_bytes=None)
    curves = layer_curves(trace)
    budget = geometry.ring_bytes  # no slots
    expert_s = 1e-5 + geometry.expert_bytes / 1e9
    moving = make_plan(curves, costs, geometry, budget, prompt_tokens=100).predicted
    assert moving.ttft_ms == pytest.approx(1e3 * (8 * 32 * expert_s + 1e-4))
    assert moving.prompt_tokens == 100
    chunks = make_plan(curves, costs, geometry, budget, prompt_tokens=100, prefill_chunk=50)
    assert chunks.predicted.ttft_ms == pytest.approx(1e3 * (2 * 8 * 32 * expert_s + 1e-4))
    long = make_plan(curves, costs, geometry, budget, prompt_tokens=3000, prefill_chunk=3000)
    assert long.predicted.ttft_ms == pytest.approx(1e3 * (8 * 3000 * 1e-5 + 1e-4))
    # The checkpoint's own files: three reads, of whole sectors.
    whole_s = 3e-5 + real.move_bytes[:, 0] / 1e9
    whole = make_plan(curves, costs, real, budget, prompt_tokens=100).predicted
    assert whole.ttft_ms == pytest.approx(1e3 * (32 * whole_s.sum() + 1e-4))
    assert (real.move_pieces[:, 0] == 3).all()
    assert (real.move_bytes[:, 0] >= real.expert_bytes * 0.99).all()


# Wrong arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget_bytes": 0}, "budget_bytes"),
        ({"budget_bytes": 1e9}, "budget_bytes"),
        ({"split": 1.5}, "split"),
        ({"split": "much"}, "split"),
        ({"prefetch": "auto"}, "prefetch"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"curves": None}, "LayerCurves"),
        ({"costs": {}}, "CostModel"),
        ({"geometry": 3}, "Geometry"),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_plan_are_named(options, expected):
    curves, costs, geometry = random_problem(2)
    arguments = {
        "curves": curves,
        "costs": costs,
        "geometry": geometry,
        "budget_bytes": geometry.ring_bytes,
    }
    with pytest.raises(errors.InvalidArgumentError, match=expected):
        make_plan(**arguments | options)


def test_inputs_of_different_models_are_refused():
    curves, costs, geometry = random_problem(2, layers=3, experts=8)
    budget = geometry.total_bytes
    for wrong in (
        (replace(curves, num_experts=9), costs, geometry),
        (replace(curves, top_k=curves.top_k + 1), costs, geometry),
        (curves, costs, replace(geometry, moe_layers=(1, 2, 4))),
        (curves, random_problem(2, layers=2)[1], geometry),
        (replace(curves, hit_rate=curves.hit_rate[:, :-1]), costs, geometry),
        (replace(curves, hit_rate=1 - curves.hit_rate), costs, geometry),
        (replace(curves, hit_rate=curves.hit_rate * np.nan), costs, geometry),
        (replace(curves, correctness=curves.correctness + 1), costs, geometry),
    ):
        with pytest.raises(errors.InvalidArgumentError):
            make_plan(*wrong, budget)


def test_a_budget_below_the_ring_names_the_smallest():
    problem = random_problem(2)
    smallest = problem[2].ring_bytes
    for call in (make_plan, uniform_plan):
        with pytest.raises(errors.OutOfMemoryError, match=size_text(smallest, "up")):
            call(*problem, smallest - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layers": ()},
        {"moe_layers": (3, 3)},
        {"moe_layers": (0.5,)},
        {"num_experts": 0},
        {"top_k": 99},
        {"records": 0},
        {"record_bytes": -1},
        {"ring_bytes": -1},
        {"ring_bytes": 10**15},
        {"model": None},
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(changes):
    with pytest.raises(errors.InvalidArgumentError, match=next(iter(changes))):
        replace(random_problem(2)[2], **changes)


# Costs


@given(seed=st.integers(0, 10_000), device=st.text(max_size=8))
def test_costs_come_back_from_json(seed, device):
    costs = replace(random_problem(seed)[1], device=device, model="m")
    assert CostModel.from_json(costs.to_json()) == costs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda value: "{", "not JSON"),
        (lambda value: "[]", "version"),
        (lambda value: json.dumps(value | {"version": 4}), "version"),
        (lambda value: json.dumps(value | {"speed": 1}), "speed"),
        (lambda value: json.dumps({k: v for k, v in value.items() if k != "moe_s"}), "moe_s"),
        (lambda value: json.dumps(value | {"head_s": -1}), "head_s"),
        (lambda value: json.dumps(value | {"head_s": float("nan")}), "head_s"),
        (lambda value: json.dumps(value | {"moe_s": [1, "2"]}), r"moe_s\[1\]"),
        (lambda value: json.dumps(value | {"moe_s": 1}), "moe_s"),
        (lambda value: json.dumps(value | {"moe_s": []}), "moe_s"),
        (lambda value: json.dumps(value | {"link_bytes_per_s": 0}), "link_bytes_per_s"),
        (lambda value: json.dumps(value | {"device": 3}), "device"),
    ],
)
def test_wrong_costs_are_named(change, expected):
    value = json.loads(random_problem(4, layers=2)[1].to_json())
    with pytest.raises(errors.FormatError, match=f"costs.json.*{expected}"):
        CostModel.from_json(change(value), "costs.json")


@given(
    fixed=st.floats(0, 1e-3),
    rate=st.floats(1e8, 1e11),
    noise=st.lists(st.floats(-0.02, 0.02), min_size=6, max_size=6),
)
def test_a_link_is_found_again(fixed, rate, noise):
    sizes = [2**16 * 4**i for i in range(6)]
    exact = [(size, fixed + size / rate) for size in sizes]
    found = fit_transfer(exact)
    assert found == (pytest.approx(fixed, rel=1e-6, abs=1e-9), pytest.approx(rate, rel=1e-6))
    rough = [(size, seconds * (1 + n)) for (size, seconds), n in zip(exact, noise, strict=True)]
    fixed_s, bytes_per_s = fit_transfer(rough)
    for size, seconds in exact:
        assert fixed_s + size / bytes_per_s == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(
    "samples", [[], [(1, 1)], [(1, 1), (1, 2)], [(1, 2), (2, 1)], [3], [(0, 1)]]
)
def test_transfers_that_make_no_line_are_refused(samples):
    with pytest.raises(errors.InvalidArgumentError):
        fit_transfer(samples)
