"""Hit rates of the live policies from traces, against plain loops and against the live cache."""

import itertools
import json

import numpy as np
import pytest
from cached import NUM_NEW_TOKENS, generate, plan_of
from hypothesis import given
from hypothesis import strategies as st
from traces import random_sequence, random_trace, write_trace

from moerun import Model, SequenceRouting, Trace, errors
from moerun.planning import layer_curves, replay_hits
from moerun.trace import NO_PREDICTION

POLICIES = ("lru", "lfu", "lcp")


def plain_hits(tokens, policy, slots, chosen=(), start=()):
    """Hits of one cache, in the words of docs/cache.md."""
    held, count, last_token, last_use = list(start[:slots]), {}, {}, {}
    hits = uses = 0
    for t, token in enumerate(tokens):
        there = set(held)
        hits += len(there & set(token))
        for expert in token:
            uses += 1
            count[expert] = count.get(expert, 0) + 1
            last_token[expert], last_use[expert] = t, uses
            if expert in held or (policy == "static" and expert not in chosen):
                continue
            if len(held) == slots:
                others = [e for e in held if e not in token]
                if not others:
                    continue

                def key(e, t=t):
                    priority = 0
                    if policy == "lfu":
                        priority = count.get(e, 0)
                    if policy == "lcp" and e in count:
                        priority = count[e] * 0.25 ** ((t - last_token[e]) / 128)
                    return (priority, last_use.get(e, 0), -e)

                held.remove(min(others, key=key))
            held.append(expert)
    return hits


def tokens_of(trace, layer, sequence):
    ids = next(trace.shards()).expert_ids
    return ids[sequence, layer, : trace.lengths[sequence]].tolist()


@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(POLICIES),
    restart=st.booleans(),
    shape=st.sampled_from([(6, 2), (5, 1), (8, 8), (9, 4)]),
)
def test_curves_are_what_one_cache_each_counts(tmp_path_factory, seed, policy, restart, shape):
    experts, top_k = shape
    path = tmp_path_factory.mktemp("t") / "t.safetensors"
    trace = Trace.open(random_trace(path, seed, experts=experts, top_k=top_k))
    curves = layer_curves(trace, policy, restart=restart)
    assert (curves.policy, curves.num_experts, curves.top_k) == (policy, experts, top_k)
    assert curves.moe_layers == (0, 1)
    for layer in range(2):
        runs = [tokens_of(trace, layer, s) for s in range(trace.num_sequences)]
        if not restart:
            runs = [list(itertools.chain(*runs))]
        lookups = trace.num_tokens * top_k
        for slots in range(experts + 1):
            hits = sum(plain_hits(tokens, policy, slots) for tokens in runs)
            assert curves.hit_rate[layer, slots] == hits / lookups
    assert (curves.hit_rate <= curves.optimal).all()
    assert (np.diff(curves.optimal, axis=1) >= 0).all()


def test_static_is_what_the_most_used_experts_serve(tmp_path):
    trace = Trace.open(random_trace(tmp_path / "t.safetensors", experts=7, top_k=3))
    curves = layer_curves(trace, "static")
    assert np.array_equal(curves.hit_rate, curves.static)
    for layer in range(2):
        used = list(itertools.chain(*(tokens_of(trace, layer, s) for s in range(3))))
        counts = np.bincount(np.ravel(used), minlength=7)
        assert counts[curves.ranking[layer]].tolist() == sorted(counts, reverse=True)
        for slots in range(8):
            served = counts[curves.ranking[layer, :slots]].sum()
            assert curves.static[layer, slots] == pytest.approx(served / counts.sum())
    assert curves.static[:, 7].tolist() == [1, 1]


def test_a_start_and_a_static_list_are_taken():
    ids = np.array([[[0, 1], [2, 3], [0, 2], [0, 1]]])
    for policy in (*POLICIES, "static"):
        chosen, start = [2, 0, 3], [1, 3, 0]
        hits = replay_hits(ids, 5, policy, start=[start], static_experts=[chosen])
        assert hits.shape == (1, 6)
        taken = [e for e in start if policy != "static" or e in chosen]
        assert hits[0].tolist() == [
            plain_hits(ids[0].tolist(), policy, slots, chosen, taken) for slots in range(6)
        ]


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((np.zeros((1, 2), int), 4), {}, "expert_ids"),
        ((np.zeros((1, 2, 2), float), 4), {}, "expert_ids"),
        ((np.array([[[0, 4]]]), 4), {}, "0 to 3"),
        ((np.array([[[0, -1]]]), 4), {}, "0 to 3"),
        ((np.array([[[1, 1]]]), 4), {}, "twice"),
        ((np.array([[[0, 1]]]), 4, "optimal"), {}, "policy"),
        ((np.array([[[0, 1]]]), 0), {}, "num_experts"),
        ((np.array([[[0, 1]]]), 4), {"start": [[4]]}, "start"),
        ((np.array([[[0, 1]]]), 4), {"start": []}, "start"),
        ((np.array([[[0, 1]]]), 4), {"static_experts": [[-1]]}, "static_experts"),
    ],
    ids=str,
)
def test_wrong_routing_is_named(arguments, options, expected):
    with pytest.raises(errors.InvalidArgumentError, match=expected):
        replay_hits(*arguments, **options)


def test_wrong_arguments_are_named(tmp_path):
    trace = Trace.open(random_trace(tmp_path / "t.safetensors"))
    with pytest.raises(errors.InvalidArgumentError, match="sch"):
        layer_curves(trace, "sch")
    with pytest.raises(errors.InvalidArgumentError, match=r"moerun\.Trace"):
        layer_curves(tmp_path)
    with pytest.raises(errors.InvalidArgumentError, match="threads"):
        layer_curves(trace, threads=0)


# Against the live cache


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("split", [1.0, 0.5])
def test_the_live_cache_hits_as_often_as_its_replay(shipped, tmp_path, policy, split):
    slots = [1, 3, 6, 9, 12, 20, 31, 32]
    file = tmp_path / "plan.json"
    layers = [{"layer": i, "slots": n, "split": split} for i, n in enumerate(slots)]
    file.write_text(json.dumps(plan_of(shipped.sizes, policy, layers)))
    with Model.load(
        shipped.directory, device="cpu", plan=file, prefetch=False, cache_events=True
    ) as model:
        generate(model, shipped.prompt, NUM_NEW_TOKENS)
        events, cache = model.cache_events(), model.stats()["cache"]
    name = "hits" if split == 1 else "top_hits"
    for layer, n in enumerate(slots):
        own = [event for event in events if event.layer == layer]
        lookups = [event for event in own if event.kind in ("hit", "top_hit", "miss")]
        first = own.index(lookups[0])
        start = [event.expert for event in own[:first]]  # what the prompt put there
        tokens = np.array([event.expert for event in lookups]).reshape(1, -1, 4)
        hits = replay_hits(tokens, 32, policy, start=[start])
        assert cache["layers"][layer][name] == hits[0, n]
        assert cache["layers"][layer]["lookups"] == tokens.size


def test_the_live_cache_hits_as_often_as_the_routing_that_it_recorded_says(shipped):
    with Model.load(
        shipped.directory, expert_budget="40%", policy="lcp", prefetch=False, cache_events=True
    ) as model:
        routing = model.trace(shipped.prompt, generate=40)
        cache = model.stats()["cache"]
    inserts = routing.cache_events[routing.cache_events[:, 0] == 0]
    start = []
    for layer in range(8):
        own = inserts[inserts[:, 1] == layer]
        filled = own[: np.flatnonzero(own[:, 3] < 3)[0]]  # by the prompt, before the first lookup
        start.append(filled[:, 2].tolist())
    hits = replay_hits(routing.expert_ids, 32, "lcp", start=start)
    slots = [layer["slots"] for layer in cache["layers"]]
    assert [layer["hits"] for layer in cache["layers"]] == [
        hits[layer, n] for layer, n in enumerate(slots)
    ]


# Predictions


def predicted_trace(path, change=None):
    random = np.random.default_rng(5)
    sequences = []
    for tokens in (9, 14):
        plain = random_sequence(random, 3, tokens, 6, 2)
        guesses = np.sort(random.random((3, tokens, 6)).argsort(axis=2)[:, :, :2], axis=2)
        guesses = guesses.astype(np.uint16)
        guesses[0, 0] = NO_PREDICTION
        if change:
            change(guesses)
        sequences.append(SequenceRouting(plain.expert_ids, plain.token_ids, prefetch_ids=guesses))
    return sequences, write_trace(path, sequences, num_experts=6)


def test_predictions_are_written_read_and_counted(tmp_path):
    sequences, path = predicted_trace(tmp_path / "t.safetensors")
    trace = Trace.open(path)
    assert "prefetch_ids" in trace.tensors
    stored = next(trace.shards()).tensor("prefetch_ids")
    for sequence, array in zip(sequences, stored, strict=True):
        assert np.array_equal(array[:, : sequence.num_tokens], sequence.prefetch_ids)
    curves = layer_curves(trace)
    assert curves.correctness_measured
    expected = np.zeros((3, 2))
    for sequence in sequences:
        for layer in range(3):
            for active, named in zip(
                sequence.expert_ids[layer], sequence.prefetch_ids[layer], strict=True
            ):
                expected[layer] += [expert in active for expert in named]
    assert curves.correctness == pytest.approx(expected / 23)


def test_wrong_predictions_are_refused(tmp_path):
    def spoil(guesses):
        guesses[2, 3, 1] = 6

    with pytest.raises(errors.InvalidArgumentError, match="prefetch_ids"):
        predicted_trace(tmp_path / "t.safetensors", spoil)


def test_wrong_predictions_in_a_file_are_named(tmp_path):
    _, path = predicted_trace(tmp_path / "t.safetensors")
    data = path.read_bytes()
    trace = Trace.open(path)
    stored = next(trace.shards()).tensor("prefetch_ids")
    start = data.index(stored.tobytes())
    damaged = stored.copy()
    damaged[1, 2, 3, 1] = 77
    path.write_bytes(data[:start] + damaged.tobytes() + data[start + stored.nbytes :])
    with pytest.raises(errors.FormatError, match=r"t\.safetensors.*layer 2.*77"):
        layer_curves(Trace.open(path))


def test_without_predictions_the_literature_stands_in(tmp_path):
    curves = layer_curves(Trace.open(random_trace(tmp_path / "t.safetensors", top_k=3)))
    assert not curves.correctness_measured
    assert curves.correctness[0].tolist() == pytest.approx([0.43, 0.305, 0.18])
    assert curves.correctness[1].tolist() == pytest.approx([0.89, 0.805, 0.72])
