"""Plans made again while a model is loaded: when, from what, and that it comes to rest."""

import json
import math
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cached import generate
from hypothesis import given
from hypothesis import strategies as st

import moerun
from moerun import Model, _moerun
from moerun.errors import MoerunError, MoerunWarning
from moerun.identity import ModelIdentity
from moerun.planning import CostModel, machine_name, store_costs
from moerun.planning.online import LEAST_TOKENS, Hysteresis, OnlinePlanner
from moerun.planning.plans import Problem

# Times are given, so that nothing depends on those of the machine.
COSTS = CostModel(
    attention_s=(2e-5,) * 8,
    moe_s=(5e-5,) * 8,
    prompt_s=(1e-5,) * 8,
    head_s=1e-4,
    link_fixed_s=5e-5,
    link_bytes_per_s=1e9,
)
GAINS = st.lists(st.floats(-1, 0.25), max_size=300)
PROMPT = [1, 2, 3]
TEXT = 520  # tokens of a text after which there is enough to plan with


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Nothing that is stored on the machine is seen or touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def replay():
    """Even layers use 5 of their 32 experts, odd ones all of them alike."""
    rng = np.random.default_rng(1)
    tokens = [[rng.permutation((5, 32)[layer % 2])[:4] for layer in range(8)] for _ in range(2000)]
    ids = np.array(tokens, np.int32)
    return ids, ids


def loaded(path, replay, budget="30%", **options):
    """With a log of events, so that the cache does not try going without: hits are repeatable."""
    options = {"prefetch": "off", "cache_events": True, **options}
    native = _moerun.Model(
        str(path), device="cpu", expert_budget=budget, routing_replay=replay, **options
    )
    return Model(native, path)


def slots_of(model):
    return [layer["slots"] for layer in model.stats()["cache"]["layers"]]


# Hysteresis


@given(GAINS)
def test_changes_are_bounded_by_the_gains_and_by_the_decisions_against_one(gains):
    """Every change doubles what is needed, a decision against one takes a tenth of it."""
    hysteresis = Hysteresis(0.03)
    changes = sum(hysteresis.wants(gain) for gain in gains)
    highest = max(0.03, 2 * max(gains, default=0))
    bound = math.log2(highest / 0.03) + (len(gains) - changes) * math.log2(1 / 0.9)
    assert changes <= bound + 1e-9
    assert 0.03 <= hysteresis.threshold <= 0.5


@given(st.lists(st.floats(-1, 1), max_size=50), st.floats(-1, 0.03))
def test_less_than_the_least_gain_never_changes_anything(gains, gain):
    hysteresis = Hysteresis(0.03)
    for each in gains:
        hysteresis.wants(each)
    assert not hysteresis.wants(gain)


def test_changes_to_and_fro_get_rare():
    hysteresis = Hysteresis(0.03)
    accepted = [step for step in range(400) if hysteresis.wants(0.2 if step % 2 == 0 else -0.2)]
    gaps = np.diff(accepted)
    assert accepted[0] == 0
    assert gaps[0] == 2
    assert (gaps[3:] >= 6).all()
    assert len(accepted) < 400 / 6


def test_patience_comes_back():
    hysteresis = Hysteresis(0.03)
    assert hysteresis.wants(0.2)
    assert not hysteresis.wants(0.05)
    assert hysteresis.wants(0.1)
    assert hysteresis.threshold == pytest.approx(2 * 0.9 * 0.06)
    for _ in range(15):
        assert not hysteresis.wants(0)
    assert hysteresis.threshold == 0.03
    assert hysteresis.wants(0.04)


# A model


def test_uneven_layers_get_uneven_slots_once_and_the_text_is_the_same(default_path, replay):
    with loaded(default_path, replay, "100%") as model:
        expected = [(generate(model, PROMPT, TEXT), model.stats()["logits_hash"]) for _ in range(3)]
    rates, settings, decisions = [], [], []
    with loaded(default_path, replay) as model:
        planner = OnlinePlanner(model, costs=COSTS, every=500)
        for text in expected:
            assert (generate(model, PROMPT, TEXT), model.stats()["logits_hash"]) == text
            rates.append(model.stats()["cache"]["window"]["hit_rate"])
            decisions.append(planner.step())
            settings.append([(each["slots"], each["split"]) for each in layers_of(model)])
        stats = model.stats()["cache"]
    first = decisions[0]
    assert first.applied
    assert first.at_token == TEXT - 1
    assert first.planned_tpot_ms < 0.97 * first.tpot_ms
    assert "it saves" in first.reason
    even, odd = settings[0][::2], settings[0][1::2]
    assert all(slots <= 6 for slots, _ in even)
    assert sum(slots for slots, _ in odd) > 1.3 * 4 * 9  # a cache without a plan has 9 each
    assert rates[1] > rates[0] + 0.05
    # The same routing goes on, so nothing changes any more.
    assert all(each == settings[0] for each in settings)
    assert [each.applied for each in decisions] == [True, False, False]
    assert all("less than" in each.reason for each in decisions[1:])
    assert stats["reconfigured"] == 1
    assert planner.decisions == decisions
    assert planner.as_dict() == {
        "started_from": "uniform",
        "every": 500,
        "planned": 3,
        "changed": 1,
        "costs": "calibrated",
        "last": vars(decisions[-1]),
    }


def layers_of(model):
    return model.stats()["cache"]["layers"]


def test_it_is_asked_when_a_text_ends_and_waits_for_enough_tokens(default_path, replay):
    with loaded(default_path, replay) as model:
        model._planner = planner = OnlinePlanner(model, costs=COSTS, every=100)
        assert model.stats()["plan"]["last"] is None
        generate(model, PROMPT, 100)  # the prompt gives the first
        assert planner.decisions == []
        generate(model, PROMPT, 2)
        (decision,) = planner.decisions
        assert (decision.at_token, decision.applied, decision.tpot_ms) == (100, False, None)
        assert "only 100 tokens" in decision.reason
        assert planner.step() is None
        generate(model, PROMPT, LEAST_TOKENS + 1 - 100)
        assert len(planner.decisions) == 2
        assert model.stats()["plan"] == planner.as_dict()
        assert model.stats()["plan"]["changed"] == 1


def test_a_change_that_costs_more_than_it_saves_is_not_made(default_path, replay):
    with loaded(default_path, replay) as model:
        planner = OnlinePlanner(model, costs=COSTS, every=1)
        before = slots_of(model)
        generate(model, PROMPT, TEXT)
        decision = planner.step()
        assert not decision.applied
        assert decision.planned_tpot_ms < decision.tpot_ms
        assert "moving experts would take" in decision.reason
        assert slots_of(model) == before


def test_prefetch_that_a_plan_left_out_is_considered_again(default_path, replay, monkeypatch):
    asked = []

    class Spy(Problem):
        def __init__(self, *args):
            asked.append(args[3])
            super().__init__(*args)

    monkeypatch.setattr("moerun.planning.online.Problem", Spy)
    for prefetch in ({"prefetch": "off"}, {}):
        options = {"prefetch": None, **prefetch}
        with loaded(default_path, replay, **options) as model:
            planner = OnlinePlanner(model, costs=COSTS, every=500)
            file = model.save_plan("plan.json")
            file.write_text(json.dumps({**json.loads(file.read_text()), "prefetch": "off"}))
            model.reconfigure(file)
            assert model.stats()["cache"]["prefetch"] == "off"
            generate(model, PROMPT, TEXT)
            assert planner.step().tpot_ms > 0
    assert asked == [False, True]


def test_without_costs_the_times_of_the_run_are_taken(default_path, replay):
    with loaded(default_path, replay) as model:
        planner = OnlinePlanner(model, every=500)
        generate(model, PROMPT, TEXT)
        decision = planner.step()
        assert 0 < decision.planned_tpot_ms <= decision.tpot_ms * 1.001
        assert planner.as_dict()["costs"] == "of this run"


def test_calibrated_costs_are_found(default_path, replay):
    mine = {
        "machine": machine_name(),
        "sizes_id": ModelIdentity(default_path).sizes_id,
        "device": "cpu",
    }
    of_now = {"store": "checkpoint", "moerun_version": moerun.__version__}
    file = store_costs(replace(COSTS, **mine, **of_now))
    with loaded(default_path, replay) as model:
        assert OnlinePlanner(model).as_dict()["costs"] == "calibrated"
        assert OnlinePlanner(model, pack=True).as_dict()["costs"] == "of this run"
        file.write_text("{")
        with pytest.warns(MoerunWarning, match="moe-plan calibrate"):
            assert OnlinePlanner(model).as_dict()["costs"] == "of this run"


def test_a_failed_plan_does_not_end_the_text(default_path, replay, monkeypatch):
    def fails(*_, **__):
        raise MoerunError("no such luck")

    monkeypatch.setattr("moerun.planning.online.curves_of", fails)
    with loaded(default_path, replay) as model:
        model._planner = planner = OnlinePlanner(model, costs=COSTS, every=500)
        assert len(generate(model, PROMPT, TEXT)) == TEXT
        (decision,) = planner.decisions
        assert decision.reason == "planning failed: no such luck"
        assert (decision.applied, decision.tpot_ms, decision.planned_tpot_ms) == (False, None, None)
        monkeypatch.undo()
        generate(model, PROMPT, TEXT)
        assert planner.decisions[1].applied


def test_one_thread_plans_while_others_go_on(default_path, replay, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    decide = OnlinePlanner._decide

    def slowly(planner, tokens):
        begun.set()
        assert may_end.wait(20)
        return decide(planner, tokens)

    monkeypatch.setattr(OnlinePlanner, "_decide", slowly)
    with loaded(default_path, replay) as model:
        planner = OnlinePlanner(model, costs=COSTS, every=1)
        generate(model, PROMPT, 10)
        thread = threading.Thread(target=planner.step)
        thread.start()
        assert begun.wait(20)
        generate(model, PROMPT, 10)
        outcome = []
        other = threading.Thread(target=lambda: outcome.append(planner.step()), daemon=True)
        other.start()
        other.join(20)
        assert outcome == [None]
        may_end.set()
        thread.join()
        assert len(planner.decisions) == 1
        assert planner.step() is not None


def test_a_model_with_every_expert_in_memory_has_nothing_to_plan(default_path):
    with Model.load(default_path, device="cpu", expert_budget="100%", plan="auto") as model:
        generate(model, PROMPT, 5)
        assert model.stats()["plan"] is None
    load = partial(Model.load, default_path, device="cpu", expert_budget="40%")
    with load() as model:
        assert model.stats()["plan"] is None
    with load(plan="auto") as model:
        model._planner._every = 1
        generate(model, PROMPT, 5)
        assert model.stats()["plan"]["planned"] == 1
