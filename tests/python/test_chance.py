"""What chance gives, and that no verdict calls it good."""

import itertools
import json
import re
from pathlib import Path

import brute_force
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import (
    chance_trace,
    even_routing,
    independent_routing,
    local_trace,
    random_trace,
    write_trace,
)

from moerun import SequenceRouting, Trace, metrics
from moerun.errors import InvalidArgumentError
from moerun.metrics import chance_hits
from moerun.metrics.objections import LEAST_TOKENS
from moerun.metrics.suitability import HIT_MARGIN, SRP_MARGIN

SKEWED = np.array([0.9, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])  # top-3 of 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


# SRP of independent routing


@pytest.mark.parametrize(
    ("experts", "top_k", "expected"),
    [(8, 2, 0.452), (64, 8, 0.321), (16, 4, 0.452), (4, 2, 0.674), (60, 4, 0.241), (4, 4, 1.0)],
)
def test_srp_by_chance_at_16_tokens(experts, top_k, expected):
    rates = np.full((1, experts), top_k / experts)
    assert metrics.independent_srp(rates, 16).item() == pytest.approx(expected, abs=5e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(1, 24))
def test_srp_by_chance_is_what_plain_loops_give(rates, m):
    found = metrics.independent_srp(np.array([rates]), m).item()
    assert found == pytest.approx(brute_force.independent_srp(rates, m), abs=1e-9)


LAYERS = np.array([SKEWED, SKEWED[::-1], np.full(8, 3 / 8)])


@pytest.fixture(scope="module")
def long_trace(folder):
    """One sequence of tokens that draw their experts independently."""
    random = np.random.default_rng(5)
    ids = np.stack([independent_routing(random, rates, 40_000, 3) for rates in LAYERS])
    return Trace.open(write_trace(folder / "long.safetensors", [SequenceRouting(ids)]))


@pytest.mark.parametrize("m", [4, 16, 64])
@pytest.mark.parametrize("level", ["model", "layer", "expert"])
def test_srp_by_chance_is_that_of_long_independent_routing(long_trace, m, level):
    frame = metrics.srp(long_trace, (m,), level)
    groups = {
        "model": LAYERS.reshape(1, -1),
        "layer": LAYERS,
        "expert": LAYERS.reshape(-1, 1),
    }
    expected = metrics.independent_srp(groups[level], m)
    np.testing.assert_allclose(frame["srp"], expected, atol=0.012 if level == "expert" else 0.003)
    np.testing.assert_allclose(frame["srp_chance"], expected, atol=0.005)
    np.testing.assert_allclose(frame["srp"], frame["srp_chance"], atol=0.012)
    even = metrics.independent_srp(np.full((1, 8), 3 / 8), m).item()
    np.testing.assert_allclose(frame["srp_chance_even"], even)


@pytest.mark.parametrize("level", ["model", "layer", "expert"])
def test_windows_of_any_length_have_a_chance(level):
    rates = np.full((1, 64), 1 / 8) if level != "expert" else np.full((2, 1), 1 / 8)
    values = [metrics.independent_srp(rates, m) for m in (1, 2, 16, 256, 4096, 2**20)]
    assert all((a >= b - 1e-12).all() for a, b in itertools.pairwise(values))
    np.testing.assert_allclose(values[0], 1)  # the token's own experts
    np.testing.assert_allclose(values[-1], 2 * 8 / (64 + 8), atol=1e-6)  # all of them


def test_experts_that_are_always_or_never_used_are_known_by_chance():
    assert metrics.independent_srp(np.array([[1.0, 1.0, 0.0]]), 16) == pytest.approx(1)
    assert metrics.independent_srp(np.zeros((2, 3)), 16).tolist() == [0, 0]
    assert metrics.independent_srp(np.zeros((0, 3)), 16).tolist() == []


@given(st.integers(0, 1000), st.sampled_from([4, 16, 64]))
def test_uneven_use_raises_what_chance_gives(seed, m):
    random = np.random.default_rng(seed)
    top_k, experts = 2, 8
    rates = random.dirichlet(np.full(experts, 1 + seed % 5)) * top_k
    if rates.max() <= 1:
        even = metrics.independent_srp(np.full((1, experts), top_k / experts), m)
        assert metrics.independent_srp(rates[None], m) >= even - 1e-12


@pytest.mark.parametrize(
    ("rates", "m", "text"),
    [
        (np.zeros(3), 4, "rates: expected an array"),
        (np.full((1, 1), 1.1), 4, "rates: expected an array"),
        (np.full((1, 1), np.nan), 4, "rates: expected an array"),
        (np.zeros((1, 1)), 0, "segment_length must be"),
    ],
)
def test_rates_that_are_no_probabilities_are_refused(rates, m, text):
    with pytest.raises(InvalidArgumentError, match=text):
        metrics.independent_srp(rates, m)


def test_routing_that_repeats_itself_is_never_below_chance(folder):
    ids = np.tile(np.array([3, 1], np.uint16), (2, 40, 1))
    same = Trace.open(write_trace(folder / "same.safetensors", [SequenceRouting(ids)]))
    row = metrics.srp(same, (16,)).row(0, named=True)
    assert row["srp"] == 1
    assert row["srp_chance"] == pytest.approx(1)  # its use of experts says all
    ids = np.repeat(even_routing(np.random.default_rng(0), 2, 10, 8, 2), 64, axis=1)
    runs = Trace.open(write_trace(folder / "runs.safetensors", [SequenceRouting(ids)]))
    for level in ("model", "layer"):
        frame = metrics.srp(runs, (4, 16), level)
        assert (frame["srp"] > frame["srp_chance"] + 0.2).all()
        assert (frame["srp_chance"] >= frame["srp_chance_even"]).all()


def test_chance_is_that_of_the_sequences_of_a_domain(folder):
    random = np.random.default_rng(0)
    sequences = [
        SequenceRouting(independent_routing(random, rates, 300, 3)[None])
        for rates in (SKEWED, np.full(8, 3 / 8))
    ]
    path = write_trace(folder / "domains.safetensors", sequences, ["a", "b"])
    frame = metrics.srp(Trace.open(path), (16,), by_domain=True)
    chance = dict(frame.select("domain", "srp_chance").iter_rows())
    assert chance["a"] > chance[None] > chance["b"]
    alone = metrics.srp(Trace.open(path), (16,), domain="b")
    assert alone["srp_chance"].item() == pytest.approx(chance["b"])


# Hits


def test_a_set_that_never_changes_finds_its_share_of_the_use(folder):
    trace = Trace.open(random_trace(folder / "r.safetensors", lengths=(40, 40), experts=6))
    used = metrics.activation_rates(trace)["activation_rate"].to_numpy().reshape(2, 6)
    shares = (-np.sort(-used, axis=1)).cumsum(axis=1) / 2
    layer = metrics.hit_rate(trace, "lru")
    np.testing.assert_allclose(layer["static_hit_rate"], shares.ravel())
    np.testing.assert_allclose(layer["random_hit_rate"], np.tile(np.arange(1, 7) / 6, 2))
    mean = metrics.hit_rate(trace, "lru", level="mean")
    np.testing.assert_allclose(mean["static_hit_rate"], shares.mean(axis=0))
    pool = metrics.hit_rate(trace, "lru", level="model")
    np.testing.assert_allclose(pool["static_hit_rate"], (-np.sort(-used.ravel())).cumsum() / 4)
    np.testing.assert_allclose(pool["random_hit_rate"], np.arange(1, 13) / 12)
    assert (mean["static_hit_rate"] >= mean["random_hit_rate"] - 1e-12).all()


def test_the_share_of_a_fixed_set_is_that_of_a_replay(folder):
    """Counted token by token for the most used experts of a layer."""
    trace = Trace.open(
        random_trace(folder / "f.safetensors", lengths=(30, 60), layers=1, experts=6)
    )
    (shard,) = trace.shards()
    tokens = [shard.expert_ids[s, 0, :n] for s, n in enumerate(shard.lengths)]
    rates = np.mean([np.bincount(of.ravel(), minlength=6) / len(of) for of in tokens], axis=0)
    kept = np.argsort(-rates, kind="stable")[:3]
    expected = np.mean([np.isin(of, kept).mean() for of in tokens])
    assert metrics.hit_rate(trace, "lru")["static_hit_rate"][2] == pytest.approx(expected)


@pytest.mark.parametrize("rates", [SKEWED, np.full(8, 3 / 8), np.array([1.0, 1, 0.5, 0.5, 0])])
def test_drawn_tokens_use_each_expert_at_its_rate(rates):
    ids = chance_hits._independent_tokens(rates, 20_000, 3, np.random.default_rng(1))
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    used = np.bincount(ids.ravel(), minlength=len(rates)) / len(ids)
    np.testing.assert_allclose(used, rates, atol=0.015)
    both = np.mean([set(a) == set(b) for a, b in itertools.pairwise(ids.tolist())])
    expected = np.mean(
        [set(a) == set(b) for a, b in zip(ids[:9_000].tolist(), ids[-9_000:].tolist(), strict=True)]
    )
    assert both == pytest.approx(expected, abs=0.02)  # neighbours are no more alike than others


def test_hits_by_chance_are_those_of_long_independent_routing(folder):
    trace = Trace.open(
        chance_trace(folder / "c.safetensors", 8, 3, (30_000,), rates=SKEWED, seed=3)
    )
    frame = metrics.chance_hit_rate(trace)
    assert frame.columns[:2] == ["use", "policy"]
    for policy in ("sch", "lru", "lfu", "belady"):
        measured = metrics.hit_rate(trace, policy, level="mean")["hit_rate"]
        same = frame.filter(use="same", policy=policy)
        assert same["capacity"].to_list() == list(range(1, 9))
        np.testing.assert_allclose(same["hit_rate"], measured, atol=0.01)
    even = frame.filter(use="even")
    for policy in ("lru", "lfu"):
        rates = even.filter(policy=policy)["hit_rate"]
        np.testing.assert_allclose(rates, np.arange(1, 9) / 8, atol=0.005)
    assert (even.filter(policy="sch")["hit_rate"] >= np.arange(1, 9) / 8 - 0.005).all()


def test_hits_by_chance_are_drawn_from_a_seed_and_their_work_is_bounded(folder, monkeypatch):
    trace = Trace.open(
        random_trace(folder / "b.safetensors", lengths=(300, 20, 90), layers=3, experts=9)
    )
    first = metrics.chance_hit_rate(trace)
    assert first.equals(metrics.chance_hit_rate(trace, threads=1))
    assert not first.equals(metrics.chance_hit_rate(trace, seed=1))
    for most in (1, 100, 500, 1000):
        monkeypatch.setattr(chance_hits, "_MAX_ACTIVATIONS", most)
        frame = metrics.chance_hit_rate(trace, ("lru",))
        assert frame["hit_rate"].is_between(0, 1).all()
        assert frame.filter(capacity=9)["hit_rate"].to_list() == [1, 1]


# Specialisation


def test_specialisation_of_independent_tokens_is_that_of_chance(folder):
    """Token ids that come 20 to 60 times, in three domains; no expert cares for either."""
    random = np.random.default_rng(2)
    sequences = [
        SequenceRouting(
            even_routing(random, 2, 1500, 16, 2), random.integers(0, 100, 1500).astype(np.int32)
        )
        for _ in range(3)
    ]
    path = write_trace(folder / "v.safetensors", sequences, ["a", "b", "c"], num_experts=16)
    frame = metrics.specialization(Trace.open(path))
    for score in ("input_vocabulary", "next_vocabulary"):
        measured, chance = frame[score].drop_nulls(), frame[f"{score}_chance"].drop_nulls()
        assert measured.mean() == pytest.approx(chance.mean(), abs=0.01)
    rms = (frame["domain_variation"] ** 2).mean() ** 0.5
    assert rms == pytest.approx(frame["domain_variation_chance"].mean(), rel=0.25)


def test_experts_of_one_word_and_one_domain_are_far_above_chance(folder):
    ids = np.repeat(np.arange(16, dtype=np.uint16).reshape(8, 2), 40, axis=0)[None]
    words = np.repeat(np.arange(8, dtype=np.int32), 40)
    sequences = [
        SequenceRouting(ids[:, :160], words[:160]),
        SequenceRouting(ids[:, 160:], words[160:]),
    ]
    path = write_trace(folder / "w.safetensors", sequences, ["a", "b"], num_experts=16)
    frame = metrics.specialization(Trace.open(path))
    assert frame["input_vocabulary"].drop_nulls().unique().to_list() == [1]
    assert frame["input_vocabulary_chance"].drop_nulls().max() < 0.6
    assert (frame["domain_variation"] > 5 * frame["domain_variation_chance"]).all()


# The verdict


SHAPES = [(4, 2), (8, 2), (16, 4), (16, 1), (32, 4), (64, 8), (128, 8), (8, 7), (4, 4), (256, 8)]


@pytest.mark.parametrize(("experts", "top_k"), SHAPES)
@pytest.mark.parametrize("lengths", [(2100,), (64,) * 40, (17,) * 130, (600, 30, 1500)], ids=str)
def test_no_shape_of_chance_is_called_good(folder, experts, top_k, lengths):
    path = chance_trace(folder / "s.safetensors", experts, top_k, lengths, seed=experts)
    found = metrics.verdict(Trace.open(path))
    assert found.group in ("poor", "unsuitable")
    assert not found.has_locality
    assert found.advice == "none"
    assert abs(found.srp_gain) < SRP_MARGIN / 2
    assert "has no locality" in found.summary()
    assert "only helps by its size" in found.summary()
    assert "Cache " not in found.summary()


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.integers(1, 3),
    st.lists(st.integers(16, 400), min_size=1, max_size=5),
)
def test_no_chance_is_called_good(folder, seed, experts, layers, lengths):
    top_k = 1 + seed % (experts - 1)
    lengths = [*lengths, 2000]
    path = chance_trace(folder / "p.safetensors", experts, top_k, lengths, layers, seed)
    found = metrics.verdict(Trace.open(path))
    assert found.group in ("poor", "unsuitable")
    assert found.advice == "none"


def test_uneven_use_alone_is_no_locality_but_a_fixed_set_is_advised(folder):
    path = chance_trace(folder / "u.safetensors", 8, 3, (3000,), rates=SKEWED)
    found = metrics.verdict(Trace.open(path))
    assert found.study_group == "suits"
    assert found.group == "poor"
    assert found.advice == "static"
    assert found.static_hit_rate > found.cache_fraction + HIT_MARGIN
    assert f"Keep the {found.capacity} most used experts of each layer" in found.summary()
    assert "(the study's group: suits)" in found.summary()


def test_locality_keeps_the_group_of_the_study_and_gets_a_cache(folder):
    found = metrics.verdict(Trace.open(local_trace(folder / "l.safetensors")))
    assert found.has_locality
    assert found.group == found.study_group == "suits"
    assert found.advice == "cache"
    assert found.srp_gain >= SRP_MARGIN
    text = found.summary()
    assert f"{100 * found.srp_gain:.1f} points over chance" in text
    assert re.search(r"\d+% hits with LRU.* \(\d+% by chance; at best \d+%\)", text)
    assert f"Cache {found.capacity} experts a layer" in text


def repeating(random, tokens, experts, top_k, share):
    """Expert ids (1, T, k): a token repeats those of the one before with probability `share`."""
    ids = even_routing(random, 1, tokens, experts, top_k)
    for token in range(1, tokens):
        if random.random() < share:
            ids[0, token] = ids[0, token - 1]
    return ids


def test_more_repetition_is_farther_from_chance(folder):
    found = []
    for share in (0.0, 0.05, 0.3, 0.6):
        ids = repeating(np.random.default_rng(0), 4000, 8, 2, share)
        path = write_trace(folder / "m.safetensors", [SequenceRouting(ids)])
        found.append(metrics.verdict(Trace.open(path)))
    gains = [each.srp_gain for each in found]
    assert gains == sorted(gains)
    assert [each.has_locality for each in found] == [False, False, True, True]
    hits = [each.lru_hit_rate - each.chance_hit_rate for each in found]
    assert hits == sorted(hits)


SHARED = Path(__file__).parents[3] / "shared"
STUDY_GROUPS = {"golden/b": ("suits", "cache"), "real-traces/qwen1.5-moe-gsm8k": (None, "none")}


@pytest.mark.parametrize("name", STUDY_GROUPS)
def test_traces_of_others_get_what_is_right(name):
    path = SHARED / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("the traces of others are not here")
    found = metrics.verdict(Trace.open(path))
    group, advice = STUDY_GROUPS[name]
    assert found.group == (group or "unsuitable")
    assert found.advice == advice


# No verdict


def withheld(path):
    found = metrics.verdict(Trace.open(path))
    assert found.group is None
    assert found.advice == "none"
    assert found.summary().startswith(f"no verdict on {found.model}. ")
    assert "SRP" not in found.summary() and "ache" not in found.summary()
    return " ".join(found.objections)


@pytest.mark.parametrize(
    "metadata",
    [{"recording": json.dumps({"random_init": True})}, {}],
    ids=["by the settings", "by the name"],
)
def test_random_weights_are_said_instead_of_a_verdict(folder, metadata):
    path = folder / "w.safetensors"
    if metadata:
        local_trace(path, metadata=metadata)
    else:
        random = np.random.default_rng(0)
        write_trace(
            path,
            [SequenceRouting(even_routing(random, 1, 2500, 8, 2))],
            model="olmoe (random weights)",
        )
    assert withheld(path).startswith("The weights are random")


def test_random_tokens_are_said_instead_of_a_verdict(folder):
    settings = {"data": {"english": "0e2c6215545f1ec3", "random": "seed 0"}}
    path = local_trace(folder / "t.safetensors", metadata={"recording": json.dumps(settings)})
    assert withheld(path).startswith("The tokens are random")
    settings = {"data": {"english": "0e2c6215545f1ec3", "random": "cba5d89a1fa245ae"}}
    path = local_trace(folder / "t.safetensors", metadata={"recording": json.dumps(settings)})
    assert metrics.verdict(Trace.open(path)).group == "suits"


@pytest.mark.parametrize("text", ["[1", "[]", "null", '{"data": 3}', "[" * 10_000])
def test_settings_that_make_no_sense_object_to_nothing(folder, text):
    path = local_trace(folder / "n.safetensors", metadata={"recording": text})
    assert metrics.verdict(Trace.open(path)).objections == ()


def test_a_short_trace_is_said_instead_of_a_verdict(folder):
    path = chance_trace(folder / "short.safetensors", 8, 2, (LEAST_TOKENS - 1,))
    assert withheld(path) == ("The trace is short: it has 1,999 tokens, and a verdict needs 2,000.")
    path = chance_trace(folder / "short.safetensors", 8, 2, (LEAST_TOKENS,))
    assert metrics.verdict(Trace.open(path)).objections == ()


def predicting(path, share, metadata=None):
    """A trace of a model that names `share` of the next tokens; one in ten tokens is the same."""
    random = np.random.default_rng(0)
    tokens = np.where(random.random(2500) < 0.1, 7, random.integers(100, 1100, 2500))
    guesses = np.where(random.random(2500) < share, np.roll(tokens, -1), 5000)
    sequence = SequenceRouting(
        even_routing(random, 1, 2500, 8, 2),
        tokens.astype(np.int32),
        predicted_ids=guesses.astype(np.int32),
    )
    return write_trace(path, [sequence], metadata=metadata or {})


def test_a_model_that_predicts_nothing_is_said_instead_of_a_verdict(folder):
    text = withheld(predicting(folder / "g.safetensors", 0.01))
    assert re.match(r"The model predicts [01]\.\d% of the next tokens, fewer than", text)
    assert "look random" in text
    trained = metrics.verdict(Trace.open(predicting(folder / "g.safetensors", 0.4)))
    assert trained.objections == ()
    # Tokens that the model chose are right or wrong for other reasons.
    decoded = predicting(folder / "g.safetensors", 0.01, {"phase": "decode"})
    assert metrics.verdict(Trace.open(decoded)).objections == ()


def test_the_shipped_model_predicts_its_text(model, tokenizer, folder):
    text = (pl.__doc__ or "") + (np.__doc__ or "") * 3 + (json.__doc__ or "") * 5
    ids = tokenizer.encode(text)[: 4 * 512]
    assert len(ids) > 1000
    sequences = [
        model.trace(ids[first : first + 512], with_predictions=True)
        for first in range(0, len(ids), 512)
    ]
    path = write_trace(
        folder / "own.safetensors",
        sequences,
        num_experts=model.config["num_experts"],
        moe_layers=model.moe_layers,
    )
    assert not [text for text in metrics.verdict(Trace.open(path)).objections if "random" in text]
