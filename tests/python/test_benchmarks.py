"""The benchmarks of policies and plans: their random numbers, and both as small real runs."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import offline_environment
from predictors import predictor_of_shipped_model
from random_eviction import random_hits
from synthetic_routing import Source, synthetic_routing, write_trace

import moerun
from moerun import Trace
from moerun.identity import ModelIdentity
from moerun.planning import CostModel, layer_curves

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=offline_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Synthetic routing


def reuse(ids):
    """Share of the active experts that were active at the token before: (sequences, layers)."""
    again = ids[:, :, 1:, :, None] == ids[:, :, :-1, None, :]
    return again.any(axis=-1).mean(axis=(2, 3))


def test_synthetic_routing_is_routing_and_repeats_itself():
    sources = [Source(), Source(skew=1, topic_skew=1, topic_tokens=10, stay=0.5)]
    ids = synthetic_routing(sources, 3, 40, 12, 4, seed=2)
    assert ids.shape == (3, 2, 40, 4)
    assert ids.max() < 12
    assert (np.diff(np.sort(ids, axis=-1).astype(int), axis=-1) > 0).all()
    assert np.array_equal(ids, synthetic_routing(sources, 3, 40, 12, 4, seed=2))
    assert not np.array_equal(ids, synthetic_routing(sources, 3, 40, 12, 4, seed=3))


def test_each_parameter_of_a_source_does_what_it_says():
    sources = [Source(), Source(stay=0.5), Source(skew=1.0), Source(topic_skew=1.0)]
    ids = synthetic_routing(sources, 8, 600, 20, 2, seed=4)
    even, stays, *_ = reuse(ids).mean(axis=0)
    assert even == pytest.approx(2 / 20, abs=0.02)
    # One that does not stay may be drawn again.
    assert stays == pytest.approx(0.5 + 0.5 * 2 / 20, abs=0.03)
    # Favourites are those of all sequences, a topic is of one.
    used = np.stack([np.bincount(row.ravel(), minlength=20) for row in ids.reshape(32, -1)])
    shares = np.corrcoef(used.reshape(8, 4, 20)[:, 2])
    assert shares[0, 1:].min() > 0.8
    of_topics = np.corrcoef(used.reshape(8, 4, 20)[:, 3])
    assert np.abs(of_topics[0, 1:].mean()) < 0.4
    assert used.reshape(8, 4, 20)[:, 3].max(axis=1).mean() > 2 * 120  # 60 if all were alike


def test_topics_change_as_often_as_they_say():
    def changes(topic_tokens):
        source = Source(topic_skew=30.0, topic_tokens=topic_tokens)  # the topic alone decides
        ids = synthetic_routing([source], 20, 500, 50, 1, seed=5)
        return (np.diff(ids[:, 0, :, 0].astype(int), axis=1) != 0).sum()

    assert changes(0) == 0
    assert changes(20) == pytest.approx(20 * 500 / 20, rel=0.25)


def test_a_synthetic_trace_holds_ids_predictions_and_layers(tmp_path):
    ids = synthetic_routing([Source()] * 2, 2, 9, 6, 2, seed=1)
    path = tmp_path / "t.safetensors"
    write_trace(path, ids, 6, ids[:, :, ::-1].copy(), [1, 3])
    trace = Trace.open(path)
    shard = next(trace.shards())
    assert np.array_equal(shard.expert_ids, ids)
    assert np.array_equal(shard.tensor("prefetch_ids"), ids[:, :, ::-1])
    assert list(trace.moe_layers) == [1, 3]


# Random eviction


def expected_hits(tokens, slots):
    """Expected hits, over every way to evict; victims one after the other, each equally likely."""
    states = {frozenset(): 1.0}
    hits = 0.0
    for token in tokens:
        following = {}
        for held, chance in states.items():
            hits += chance * len(held & set(token))
            reached = {held: chance}
            for expert in token:
                after = {}
                for content, p in reached.items():
                    victims = [None]
                    if expert in content:
                        victims = []
                        after[content] = after.get(content, 0) + p
                    elif len(content) == slots:
                        victims = sorted(content - set(token))
                        if not victims:
                            after[content] = after.get(content, 0) + p
                    for victim in victims:
                        changed = (content - {victim}) | {expert}
                        after[changed] = after.get(changed, 0) + p / len(victims)
                reached = after
            for content, p in reached.items():
                following[content] = following.get(content, 0) + p
        states = following
    return hits


@pytest.mark.parametrize(
    ("experts", "top_k", "slots"), [(5, 1, 2), (6, 2, 3), (7, 3, 4), (6, 3, 2)]
)
def test_random_eviction_is_the_mean_over_every_way_to_evict(experts, top_k, slots):
    ids = synthetic_routing([Source(skew=0.5), Source()], 1, 12, experts, top_k, seed=experts)[0]
    caches = 20_000
    hits = random_hits(ids, experts, slots, caches, seed=1)
    assert hits.shape == (caches, 2)
    for layer in range(2):
        expected = expected_hits(ids[layer].tolist(), slots)
        error = hits[:, layer].std() / caches**0.5
        assert abs(hits[:, layer].mean() - expected) <= 4 * error


def test_random_eviction_has_the_closed_form_of_independent_draws():
    # Gelenbe (1973): a content S is as likely as the product of its experts' chances.
    experts, slots, tokens = 7, 3, 4000
    random = np.random.default_rng(3)
    chances = 1.0 / np.arange(1, experts + 1)
    chances /= chances.sum()
    sets = [list(each) for each in itertools.combinations(range(experts), slots)]
    weights = np.array([chances[each].prod() for each in sets])
    served = np.array([chances[each].sum() for each in sets])
    expected = (weights * served).sum() / weights.sum()
    rates = []
    for seed in range(8):
        ids = random.choice(experts, size=(1, tokens, 1), p=chances)
        rates.append(random_hits(ids, experts, slots, 6, seed).mean() / tokens)
    assert np.mean(rates) == pytest.approx(expected, abs=0.006)
    assert expected > slots / experts + 0.1  # a cache without any locality would have that


# The scripts


def test_bench_policies_replays_the_live_policies(tmp_path):
    ids = synthetic_routing([Source(skew=0.8)] * 2, 3, 60, 9, 2, seed=8)
    trace = write_trace(tmp_path / "given.safetensors", ids, 9)
    small = ("--samples", 2, "--length", 40, "--sequences", 2, "--layers", 2, "--tokens", 40)
    output = run("bench_policies.py", "--trace", trace.files[0], *small, "--json")
    rows = {(row["name"], row["restart"]): row for row in json.loads(output)["rows"]}
    names = {name for name, _ in rows}
    assert len(rows) == 2 * len(names)
    assert sum("shipped" in name for name in names) == 2
    for restart in (False, True):
        row = rows["given: 9 experts, top-2", restart]
        assert row["slots"] == 4
        for policy in ("lcp", "lfu", "lru"):
            curves = layer_curves(trace, policy, restart=restart)
            assert row["hit_rate_of_layers"][policy] == curves.hit_rate[:, 4].tolist()
        assert row["hit_rate_of_layers"]["optimal"] == curves.optimal[:, 4].tolist()
        for rule in ("lcp", "lfu", "lru", "random"):
            assert 0 < row["hit_rate"][rule] <= row["hit_rate"]["optimal"]
    alternating = rows["shipped model, kinds alternate", True]["hit_rate"]
    # Where every sequence starts anew, their order is nothing.
    one_kind = rows["shipped model, one kind of text, then the other", True]["hit_rate"]
    assert alternating["lcp"] == pytest.approx(one_kind["lcp"])


def test_bench_policies_prints_a_table():
    text = run("bench_policies.py", "--samples", 0, "--sequences", 1, "--tokens", 20, "--caches", 2)
    lines = text.splitlines()
    cells = next(line for line in lines if line.startswith("| no locality")).split("|")
    assert len(cells) == 10
    assert any(line.startswith("| published, Qwen1.5-MoE") and "62.2" in line for line in lines)


def test_bench_plans_decodes_and_holds_predictions_against_it(tmp_path):
    costs = tmp_path / "costs.json"
    layer = (2e-5, 2e-5)
    costs.write_text(CostModel(layer, layer, layer, 1e-4, 5e-5, 1.5e9).to_json())
    small = ("--like", "tiny", "--layers", 2, "--warm-up", 6, "--tokens", 10, "--plan-tokens", 80)
    places = ("--folder", tmp_path, "--costs", costs, "--plot", tmp_path / "plans.png")
    budgets = ("--budget", "30%", "--budget", "75%", "--repeats", 1)
    result = json.loads(run("bench_plans.py", *small, *places, *budgets, "--json"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["costs.json", "plans.png"]
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row["budget"], row["cache"]): row for row in result["rows"]}
    caches = {cache for _, cache in rows}
    assert len(caches) == 5
    assert len(rows) == 10
    for (_, cache), row in rows.items():
        assert row["arena_bytes"] <= row["budget_bytes"]
        assert row["tokens_per_s"] > 0
        assert row["demand_bytes_per_token"] + row["prefetch_bytes_per_token"] > 0
        if cache == "planned":
            for name in ("tpot_ms", "hit_rate"):
                error = row["predicted"][name] / row[name] - 1 if row[name] else None
                assert row["errors"][name] == error
            assert len(row["layers"]) == 2
        else:
            assert row["predicted"] is None
    assert rows["75%", "prefetch only"]["hit_rate"] == 0
    for cache in caches - {"prefetch only"}:
        assert rows["75%", cache]["hit_rate"] > rows["30%", cache]["hit_rate"]
    assert rows["75%", "uniform, split 0.5"]["hit_rate"] > 0.9  # tops of all experts fit


def test_bench_batch_says_what_a_larger_batch_brings():
    sizes = ("--batch-size", 1, "--batch-size", 4, "--warm-up", 2, "--steps", 3)
    budgets = ("--budget", "100%", "--budget", "40%,lru,1,off")
    small = ("--bandwidth-bytes", 1 << 25)
    result = json.loads(run("bench_batch.py", *sizes, *budgets, *small, "--json"))
    assert [(row["cache"], row["batch_size"]) for row in result["rows"]] == [
        (cache, size) for cache in ("100%", "40%,lru,1,off") for size in (1, 4)
    ]
    for row in result["rows"]:
        assert row["tokens_per_s"] > 0
        assert (row["hit_rate"] is None) == (row["cache"] == "100%")
        assert row["active_experts"] >= 4
    table = run("bench_batch.py", *sizes, *small)
    assert "active experts" in table


def test_bench_predictive_with_experts_that_were_made_larger(tmp_path):
    predictor = predictor_of_shipped_model(tmp_path / "p.safetensors")
    larger = tmp_path / "larger"
    options = ("--factor", 2, "--predictor", predictor)
    run("padded_experts.py", ModelIdentity(None).directory, larger, *options)
    with moerun.Model.load() as small, moerun.Model.load(larger) as padded:
        sizes = [each.stats()["cache"]["total_expert_bytes"] for each in (small, padded)]
        assert sizes[1] == 2 * sizes[0]
        prompt = small.tokenizer.encode("import os")
        texts = [
            list(each.generate(prompt, max_new_tokens=20, temperature=0))
            for each in (small, padded)
        ]
    assert texts[0] == texts[1]

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "import os"}\n"NAME"\n')
    arguments = (
        *("--checkpoint", larger, "--predictor", tmp_path / "larger.predictor.safetensors"),
        *("--texts", prompts, "--batch-size", 2, "--budget", "50%", "--tokens", 5, "--rounds", 1),
        *("--pack-folder", tmp_path / "pack", "--bandwidth-bytes", 1 << 25),
        *("--setting", "planned", "--setting", "predictive + scheduler"),
    )
    rows = json.loads(run("bench_predictive.py", *arguments, "--json"))["rows"]
    assert [row["setting"] for row in rows] == ["planned", "predictive + scheduler"]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert 0 < row["hit_rate"] <= row["ready_rate"] <= row["named_rate"] <= 1
    assert "| predictive + scheduler |" in run("bench_predictive.py", *arguments)
