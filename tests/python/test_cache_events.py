"""The log of cache events against the definitions of the policies, and the counters."""

import json
from collections import Counter

import pytest
from cached import NUM_NEW_TOKENS, assert_adds_up, assert_same, generate, plan_of

import moerun
from moerun import Model

# Policies, by the log of events


def run_with_events(resident, num_tokens=NUM_NEW_TOKENS, **options):
    with Model.load(resident.directory, device="cpu", cache_events=True, **options) as model:
        assert generate(model, resident.prompt, num_tokens) == resident.tokens[:num_tokens]
        return model.cache_events(), model.stats()["cache"]


LOOKUPS = ("hit", "top_hit", "miss")


class Simulated:
    """One layer of the cache, in the words of docs/cache.md."""

    def __init__(self, policy, num_slots):
        self.policy, self.num_slots = policy, num_slots
        self.resident, self.count = set(), Counter()
        self.last_token, self.last_use = Counter(), Counter()
        self.num_uses = 0

    def priority(self, expert, token):
        if self.policy == "lfu":
            return self.count[expert]
        if self.policy == "lcp":
            return self.count[expert] * 0.25 ** ((token - self.last_token[expert]) / 128)
        return 0

    def fill(self, expert):
        """A prompt takes empty slots."""
        assert expert not in self.resident
        assert len(self.resident) < self.num_slots
        self.resident.add(expert)

    def run_token(self, token, active):
        """Returns the active experts that were resident, and the changes in order."""
        hits, changes = self.resident & set(active), []
        for expert in active:
            self.num_uses += 1
            self.count[expert] += 1
            self.last_token[expert], self.last_use[expert] = token, self.num_uses
            if expert in self.resident:
                continue
            if len(self.resident) == self.num_slots:
                candidates = self.resident - set(active)
                if not candidates:
                    continue
                victim = min(
                    candidates, key=lambda e: (self.priority(e, token), self.last_use[e], -e)
                )
                self.resident.remove(victim)
                changes.append(("evict", victim))
            self.resident.add(expert)
            changes.append(("insert", expert))
        return hits, changes


@pytest.mark.parametrize("policy", ["lru", "lfu", "lcp"])
@pytest.mark.parametrize(("split", "slots"), [(1.0, 6), (0.5, 9), (1.0, 3)])
def test_a_policy_does_what_its_definition_says(shipped, tmp_path, policy, split, slots):
    file = tmp_path / "plan.json"
    layers = [{"layer": layer, "slots": slots, "split": split} for layer in range(8)]
    file.write_text(json.dumps(plan_of(shipped.sizes, policy, layers)))
    events, cache = run_with_events(shipped, plan=file, prefetch=False)

    steps = {}  # (layer, token) -> events, in order
    for event in events:
        steps.setdefault((event.layer, event.token), []).append(event)
    simulated = [Simulated(policy, slots) for _ in range(8)]
    hit_kind = "hit" if split == 1 else "top_hit"
    for (layer, token), step in sorted(steps.items()):
        lookups = [event for event in step if event.kind in LOOKUPS]
        active = [event.expert for event in lookups]
        start = step.index(lookups[0])
        for event in step[:start]:
            assert (event.kind, token) == ("insert", 0)
            simulated[layer].fill(event.expert)
        hits, changes = simulated[layer].run_token(token, active)
        assert {event.expert for event in lookups if event.kind != "miss"} == hits
        assert {event.kind for event in lookups} <= {hit_kind, "miss"}
        seen = [(event.kind, event.expert) for event in step[start:] if event.kind not in LOOKUPS]
        assert seen == changes
    assert any(event.kind == "evict" for event in events)
    assert any(event.kind == hit_kind for event in events)
    assert cache["total"]["lookups"] == sum(event.kind in LOOKUPS for event in events)


def test_static_keeps_only_the_experts_of_its_list(shipped, tmp_path):
    file = tmp_path / "plan.json"
    chosen = {layer: [layer, 5, 17, 30] for layer in range(8)}
    layers = [
        {"layer": layer, "slots": 4, "split": 1, "experts": experts}
        for layer, experts in chosen.items()
    ]
    file.write_text(json.dumps(plan_of(shipped.sizes, "static", layers)))
    events, cache = run_with_events(shipped, plan=file, prefetch=False)
    assert cache["policy"] == "static"
    assert not any(event.kind == "evict" for event in events)
    for event in events:
        if event.kind in ("hit", "insert"):
            assert event.expert in chosen[event.layer]


def test_the_log_counts_what_the_statistics_count(shipped):
    events, cache = run_with_events(shipped, expert_budget="35%", split=0.5, prefetch=True)
    names = {
        "hit": "hits",
        "top_hit": "top_hits",
        "miss": "misses",
        "prefetch": "prefetch_issued",
        "prefetch_useful": "prefetch_useful",
        "prefetch_late": "prefetch_late",
        "prefetch_wasted": "prefetch_wasted",
    }
    assert {event.kind for event in events} <= {*names, "insert", "evict"}
    for layer in cache["layers"]:
        of_layer = Counter(event.kind for event in events if event.layer == layer["layer"])
        assert {name: of_layer[kind] for kind, name in names.items()} == {
            name: layer[name] for name in names.values()
        }
    assert {type(event) for event in events} == {moerun.CacheEvent}
    tokens = [event.token for event in events]
    assert tokens == sorted(tokens)
    assert cache["total"]["prefetch_issued"] > 0


def test_no_log_is_kept_unless_it_is_asked_for(shipped):
    with Model.load(shipped.directory, expert_budget="35%") as model:
        generate(model, shipped.prompt, 4)
        assert model.cache_events() == []


# What is counted


def test_a_fresh_model_has_counted_nothing(shipped):
    with Model.load(shipped.directory, expert_budget="35%") as model:
        cache = model.stats()["cache"]
    assert cache["state"] == "cached"
    assert cache["decode_tokens"] == cache["total"]["lookups"] == 0
    assert cache["total"]["hit_rate"] is None
    assert cache["compute_s_per_token"] is None
    assert_adds_up(cache, shipped.sizes)


def test_a_prompt_does_not_count_and_leaves_the_decode_cache_alone(shipped):
    with Model.load(
        shipped.directory, expert_budget="35%", prefetch=False, cache_events=True
    ) as model:
        generate(model, shipped.prompt)
        before, events = model.stats()["cache"]["total"], model.cache_events()
        model.forward(shipped.prompt)
        assert model.stats()["cache"]["total"] == before
        assert model.cache_events() == events


def test_bytes_and_times_are_measured(shipped):
    stats = assert_same(shipped, expert_budget="25%", prefetch=True)
    cache = stats["cache"]
    assert cache["total"]["demand_bytes"] + cache["total"]["prefetch_bytes"] > 0
    assert cache["link_gb_per_s"] > 0
    assert cache["compute_s_per_token"] > 0
    assert cache["stalled_s_per_token"] >= 0
    assert cache["ratio_to_limit"] > 0
    assert cache["direct_io"] in (True, False)


def test_without_prefetch_nothing_is_prefetched(shipped):
    total = assert_same(shipped, expert_budget="25%", prefetch=False)["cache"]["total"]
    assert total["prefetch_issued"] == total["prefetch_bytes"] == 0
    assert total["demand_bytes"] > 0


def test_a_larger_budget_hits_more_often(shipped):
    rates = [
        assert_same(shipped, expert_budget=budget, split=1, prefetch=False)["cache"]["total"]
        for budget in ("30%", "60%", "90%")
    ]
    hits = [total["hit_rate"] for total in rates]
    assert hits == sorted(hits)
    assert hits[-1] > hits[0]
