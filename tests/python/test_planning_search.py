"""Plans that the simulator tried, and how near the cost model comes to it."""

import pytest
from test_cli_plan import record
from traces import random_trace

from moerun import Trace, errors, simulate
from moerun.planning import CostModel, Geometry, find_plan, layer_curves, make_plan, uniform_plan

LINKS = {"disk": (5e-5, 1.5e9), "memory": (1e-5, 12e9), "slow disk": (1e-4, 2e8)}


def costs(link):
    fixed, rate = LINKS[link]
    return CostModel((2e-5,) * 8, (1.2e-4,) * 8, (1e-5,) * 8, 3e-4, fixed, rate)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "t.safetensors"
    record(path, "--with-prefetch", "--length", "192", "--samples", "2")
    with Trace.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def curves(trace):
    return layer_curves(trace)


def simulated(plan, trace, folder, link, prefetch, **options):
    file = folder / "plan.json"
    file.write_text(plan.to_json())
    found = simulate(trace, costs=costs(link), plan=file, prefetch=prefetch, **options)
    total = found.cache["total"]
    return found, (total["hits"] + total["top_hits"]) / total["lookups"]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_the_cost_model_is_near_the_simulation(trace, curves, tmp_path, link, pack, share):
    geometry = Geometry.of_model(pack=pack)
    budget = int(share * geometry.total_bytes)
    for split in (None, 0.5, 1.0):
        problem = (curves, costs(link), geometry, budget)
        plan = make_plan(*problem, split=split, prefetch=False)
        # With its events logged the cache does not try what it is worth: see docs/cache.md.
        options = {"pack": pack, "cache_events": True}
        found, hit_rate = simulated(plan, trace, tmp_path, link, False, **options)
        assert plan.predicted.hit_rate == pytest.approx(hit_rate, abs=1e-9)
        assert plan.predicted.tpot_ms == pytest.approx(1e3 * found.tpot_s, rel=0.01)
        ahead = make_plan(*problem, split=split)
        times = []
        for prefetch in (True, False):
            found, hit_rate = simulated(ahead, trace, tmp_path, link, prefetch, **options)
            assert ahead.predicted.hit_rate == pytest.approx(hit_rate, abs=1e-9)
            times.append(1e3 * found.tpot_s)
        assert ahead.predicted.tpot_ms == pytest.approx(min(times), rel=0.06)


@pytest.mark.parametrize("pack", [False, True])
def test_the_plan_is_the_fastest_of_those_tried(trace, curves, tmp_path, pack):
    geometry = Geometry.of_model(pack=pack)
    budget = geometry.total_bytes // 2
    seen = []
    plan, tried = find_plan(
        trace,
        costs=costs("disk"),
        budget_bytes=budget,
        pack=pack,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert plan == tried[0].plan
    times = [trial.plan.predicted.tpot_ms for trial in tried]
    assert times == sorted(times)
    assert seen == [(done, len(tried)) for done in range(len(tried) + 1)]
    found, hit_rate = simulated(plan, trace, tmp_path, "disk", tried[0].prefetch, pack=pack)
    assert plan.predicted.tpot_ms == pytest.approx(1e3 * found.tpot_s)
    assert plan.predicted.hit_rate == pytest.approx(hit_rate)
    assert [layer.stalled_ms for layer in plan.layers] == pytest.approx(
        [1e3 * stall / len(found.token_s) for stall in found.stall_s]
    )
    for split in (1.0, 0.75, 0.5):
        uniform = uniform_plan(curves, costs("disk"), geometry, budget, split)
        for prefetch in (True, False):
            found, _ = simulated(uniform, trace, tmp_path, "disk", prefetch, pack=pack)
            assert plan.predicted.tpot_ms <= 1e3 * found.tpot_s * (1 + 1e-9)


def test_without_guesses_there_is_no_prefetch(default_path, tmp_path):
    path = random_trace(
        tmp_path / "t.safetensors", lengths=(80,), layers=8, experts=32, top_k=4, moe_layers=None
    )
    with Trace.open(path) as bare:
        budget = Geometry.of_model(default_path).total_bytes // 3
        plan, tried = find_plan(bare, costs=costs("disk"), budget_bytes=budget, policies=("lru",))
    assert not any(trial.prefetch for trial in tried)
    assert plan.prefetch == "off"
    assert plan.policy == "lru"


def test_what_cannot_be_planned_is_refused(trace):
    geometry = Geometry.of_model()
    with pytest.raises(errors.InvalidArgumentError, match="nothing to plan"):
        find_plan(trace, costs=costs("disk"), budget_bytes=geometry.total_bytes)
    with pytest.raises(errors.OutOfMemoryError, match="smallest"):
        find_plan(trace, costs=costs("disk"), budget_bytes=1000)
    with pytest.raises(errors.InvalidArgumentError, match="policies"):
        find_plan(trace, costs=costs("disk"), budget_bytes=4_000_000, policies=())
