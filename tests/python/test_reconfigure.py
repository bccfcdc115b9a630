"""Another cache while the model stays loaded; warm starts; the window; plans of a model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from cached import generate, plan_of

import moerun
from moerun import Model, errors
from moerun.planning import Plan, PlannedLayer, Prediction, model_id

PREDICTION = Prediction(0.5, 1.0, 0.5, 3.0, 1000.0, 8)


@pytest.fixture(scope="module")
def sizes(default_path):
    return moerun.dry_run(default_path)


def a_plan(slots, splits, policy="lcp", **fields):
    layers = tuple(
        PlannedLayer(layer, count, split, (), 0.5, 0.0)
        for layer, (count, split) in enumerate(zip(slots, splits, strict=True))
    )
    return Plan("m", policy, "off", 10**9, 10**8, False, layers, PREDICTION, **fields)


def random_plan(rng):
    return a_plan(rng.integers(0, 14, 8).tolist(), rng.choice([0, 0.4, 0.7, 1], 8).tolist())


def settle(model, rng):
    """Reconfigure at random, with what fits; returns what changed."""
    while True:
        try:
            return model.reconfigure(random_plan(rng))
        except errors.OutOfMemoryError:
            continue


@pytest.mark.parametrize(
    "options", [{"prefetch": True}, {"prefetch": False, "split": 0.5}, {"pack": True}]
)
def test_the_answer_does_not_depend_on_the_cache(shipped, tmp_path, options):
    if "pack" in options:
        options = {"pack": tmp_path}
    rng = np.random.default_rng(3)
    with Model.load(shipped.directory, device="cpu", expert_budget="45%", **options) as model:
        arena = model.stats()["cache"]["arena_bytes"]
        for count in range(1, 5):
            changed = settle(model, rng)
            assert generate(model, shipped.prompt, len(shipped.tokens)) == shipped.tokens
            stats = model.stats()
            assert stats["logits_hash"] == shipped.logits_hash
            cache = stats["cache"]
            assert cache["reconfigured"] == count
            assert cache["arena_bytes"] == arena == stats["memory"]["expert_bytes"]
            assert cache["slot_bytes"] + cache["ring_bytes"] <= arena
            for layer, change in zip(cache["layers"], changed["layers"], strict=True):
                assert (layer["slots"], layer["split"]) == (change["slots"], change["split"])
                assert len(model.residents()[layer["layer"]]) <= layer["slots"]
            assert changed["seconds"] > 0
        assert np.array_equal(model.forward(shipped.prompt), shipped.logits)


def test_a_text_goes_on_over_a_change(shipped):
    rng = np.random.default_rng(8)
    with Model.load(shipped.directory, device="cpu", expert_budget="45%") as model:
        text = model.generate(
            shipped.prompt, max_new_tokens=len(shipped.tokens), ignore_eos=True, temperature=0
        )
        tokens = []
        for token in text:
            tokens.append(token)
            settle(model, rng)
        assert tokens == shipped.tokens
        assert model.stats()["logits_hash"] == shipped.logits_hash


def counts(model):
    return [
        {name: layer[name] for name in ("hits", "top_hits", "misses")}
        for layer in model.stats()["cache"]["layers"]
    ]


def test_hits_are_those_of_a_fresh_cache_with_the_same_residents(shipped, tmp_path):
    """Of the first token: after it the policies differ, for one of them has learned."""
    plan = a_plan([12] * 4 + [5] * 4, [1.0] * 4 + [0.5] * 4)
    options = {"device": "cpu", "prefetch": False}
    with Model.load(shipped.directory, expert_budget="45%", **options) as model:
        generate(model, shipped.prompt)
        model.reconfigure(plan)
        residents = model.residents()
        before = counts(model)
        generate(model, shipped.prompt[:1], 1)  # a prompt of one token is decoded
        after = counts(model)
    assert all(len(residents[layer]) == (12 if layer < 4 else 5) for layer in range(8))
    file = tmp_path / "plan.json"
    warmed = replace(
        plan, layers=tuple(replace(each, warm=tuple(residents[each.layer])) for each in plan.layers)
    )
    file.write_text(warmed.to_json())
    with Model.load(shipped.directory, plan=file, **options) as model:
        assert {layer: set(ids) for layer, ids in model.residents().items()} == {
            layer: set(ids) for layer, ids in residents.items()
        }
        cache = model.stats()["cache"]
        assert cache["warm_bytes"] > 0
        assert cache["total"]["demand_bytes"] == 0
        generate(model, shipped.prompt[:1], 1)
        fresh = counts(model)
    for old, new, alone in zip(before, after, fresh, strict=True):
        assert {name: new[name] - old[name] for name in new} == alone
    assert sum(each["hits"] + each["top_hits"] for each in fresh) > 0


def test_what_does_not_fit_or_is_another_policy_is_refused_and_nothing_changes(shipped, tmp_path):
    with Model.load(shipped.directory, device="cpu", expert_budget="30%") as model:
        generate(model, shipped.prompt)
        residents, cache = model.residents(), model.stats()["cache"]
        everything = a_plan([32] * 8, [1.0] * 8)
        for plan, kind, message in (
            (everything, errors.OutOfMemoryError, "larger budget"),
            (a_plan([4] * 8, [1.0] * 8, "lru"), errors.InvalidArgumentError, "lcp"),
            (replace(everything, is_resident=True), errors.InvalidArgumentError, "every expert"),
            (7, errors.InvalidArgumentError, "moerun.planning.Plan"),
            (tmp_path / "none.json", errors.MissingFileError, "none.json"),
            (a_plan([33] * 8, [1.0] * 8), errors.FormatError, "at most 32"),
        ):
            with pytest.raises(kind, match=message):
                model.reconfigure(plan)
        assert model.residents() == residents
        assert model.stats()["cache"] == cache
    with Model.load(shipped.directory, device="cpu", expert_budget="100%") as model:
        with pytest.raises(errors.InvalidArgumentError, match="no cache"):
            model.reconfigure(everything)
        with pytest.raises(errors.InvalidArgumentError, match="routing_window"):
            model.routing_window()
        assert model.residents() == {layer: list(range(32)) for layer in range(8)}
        assert model.stats()["cache"]["window"] is None
    with pytest.raises(errors.MoerunError, match="closed"):
        model.residents()


# The window


def test_the_window_is_what_was_decoded(shipped):
    with Model.load(shipped.directory, device="cpu", expert_budget="40%") as model:
        assert model.stats()["cache"]["window"]["hit_rate"] is None
        routing = model.trace(shipped.prompt, generate=40)
        window = model.routing_window()
        cache = model.stats()["cache"]
        assert model.stats()["cache"]["window"] == cache["window"]
    assert np.array_equal(window.expert_ids, routing.expert_ids)
    assert window.moe_layers == tuple(range(8))
    assert window.named.shape == window.right.shape == (8, 4)
    assert (window.right <= window.named).all()
    assert window.right.sum() > 0
    rates = cache["window"]
    assert rates["tokens"] == 40 == cache["decode_tokens"]
    total = cache["total"]
    assert rates["hit_rate"] == (total["hits"] + total["top_hits"]) / total["lookups"]
    for layer, counters in zip(rates["layers"], cache["layers"], strict=True):
        assert layer["hit_rate"] == counters["hit_rate"] <= layer["optimal_hit_rate"] <= 1
        ids = routing.expert_ids[layer["layer"]]
        uses = np.sort(np.bincount(ids.ravel(), minlength=32))[::-1]
        assert layer["static_hit_rate"] == pytest.approx(uses[: counters["slots"]].sum() / ids.size)


def test_moe_run_says_what_could_have_been_once_there_is_something_to_say(run_cli):
    def lines_of(tokens):
        done = run_cli(
            "--device", "cpu", "--expert-budget", "40%", "--stats", "-n", str(tokens), "import os"
        )
        assert done.returncode == 0, done.stderr
        return " ".join(done.stderr.split())

    assert " tokens: " not in lines_of(20)
    said = lines_of(90)
    assert "last 89 tokens: " in said
    assert "with the best fixed set" in said
    assert "% at best" in said


def test_a_plan_of_another_model_is_refused_wherever_one_is_taken(shipped, sizes, tmp_path):
    file = tmp_path / "plan.json"
    layers = [{"layer": 0, "slots": 3, "split": 1}]

    def write(**fields):
        file.write_text(json.dumps(plan_of(sizes, "lcp", layers, **fields)))

    write(model_id=model_id(shipped.directory))
    with Model.load(shipped.directory, device="cpu", plan=file) as model:
        model.reconfigure(file)
        write(model_id="0123456789abcdef")
        trace = model.trace(shipped.prompt)
        costs = moerun.SimulationCosts(1e-5, 1e-5, 1e-5, 1e-5, 1e9)
        for take in (
            lambda: model.reconfigure(file),
            lambda: model.reconfigure(a_plan([1] * 8, [1] * 8, model_id="0123456789abcdef")),
            lambda: Model.load(shipped.directory, device="cpu", plan=file),
            lambda: moerun.dry_run(shipped.directory, plan=file),
            lambda: moerun.simulate(trace, shipped.directory, costs=costs, plan=file),
        ):
            with pytest.raises(errors.FormatError, match=r"another model.*moe-plan make"):
                take()
        write(model_id="xyz")
        with pytest.raises(errors.FormatError, match="another model"):
            model.reconfigure(file)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"warm": [0, 1, 2, 3]}, "at most 3"),
        ({"warm": [5, 1, 5]}, "5 twice"),
        ({"warm": [32]}, "0 to 31"),
        ({"warm": "1"}, "warm"),
        ({"warm": [1], "experts": [1]}, "experts says which"),
        ({"cold": [1]}, "not a field"),
    ],
)
def test_warm_lists_that_make_no_sense_are_refused(shipped, sizes, tmp_path, layer, message):
    file = tmp_path / "plan.json"
    policy = "static" if "experts" in layer else "lcp"
    layers = [{"layer": 0, "slots": 3, "split": 1, **layer}]
    file.write_text(json.dumps(plan_of(sizes, policy, layers)))
    with pytest.raises(errors.FormatError, match=message):
        moerun.dry_run(shipped.directory, plan=file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget_bytes": 1000000}, "resident is true"),
        ({"layers": [{"layer": 0, "slots": 3, "split": 1}]}, "expected 32 slots"),
        ({"resident": 1}, "resident"),
        ({"resident": False}, "layers"),
        ({"model_id": "12"}, "16 hexadecimal digits"),
        ({"model_id": 12}, "model_id"),
    ],
)
def test_resident_plans_that_contradict_themselves_are_refused(
    shipped, sizes, tmp_path, fields, message
):
    file = tmp_path / "plan.json"
    value = plan_of(sizes, "lcp", [], resident=True)
    del value["layers"]
    file.write_text(json.dumps(value))
    with Model.load(shipped.directory, device="cpu", plan=file) as model:
        assert model.stats()["cache"]["state"] == "resident"
    file.write_text(json.dumps(value | fields))
    with pytest.raises(errors.FormatError, match=message):
        moerun._moerun.dry_run(str(shipped.directory), plan=str(file))


def test_a_warm_start_reports_its_progress_and_can_be_interrupted(shipped, tmp_path):
    plan = a_plan([6] * 8, [1.0] * 8)
    plan = replace(plan, layers=tuple(replace(each, warm=(3, 1, 4, 9)) for each in plan.layers))
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    calls = []
    with Model.load(shipped.directory, plan=file, progress=lambda *call: calls.append(call)) as it:
        assert all(set(ids) == {3, 1, 4, 9} for ids in it.residents().values())
        warm_bytes = it.stats()["cache"]["warm_bytes"]
    assert calls[-1] == (calls[-1][1], calls[-1][1])
    assert 0 < calls[-1][1] <= warm_bytes

    def stop(done, total):
        if total == calls[-1][1] and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model.load(shipped.directory, plan=file, progress=stop)


def test_a_simulation_starts_as_warm_as_a_run(shipped, tmp_path):
    file = tmp_path / "plan.json"
    plan = a_plan([6] * 8, [1.0] * 8)
    plan = replace(plan, layers=tuple(replace(each, warm=(3, 1, 4, 9)) for each in plan.layers))
    file.write_text(plan.to_json())
    with Model.load(shipped.directory, device="cpu", plan=file, cache_events=True) as model:
        routing = model.trace(shipped.prompt[:1], generate=30)
        inserted = model.cache_events()
    assert [event.kind for event in inserted] == ["insert"] * 8 * 4
    costs = moerun.SimulationCosts(1e-5, 1e-5, 1e-5, 1e-5, 1e9)
    run = moerun.simulate(routing, shipped.directory, costs=costs, plan=file, cache_events=True)
    assert run.events[: len(inserted)] == inserted
    assert run.cache["warm_bytes"] > 0
    assert run.moved_bytes <= run.cache["total"]["demand_bytes"]
    window = run.cache["window"]
    assert window["optimal_hit_rate"] >= window["hit_rate"] > 0
