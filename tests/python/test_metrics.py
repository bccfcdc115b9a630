"""Metrics against plain loops, and what they say where there is little to say."""

import dataclasses
import itertools
import subprocess
import sys

import brute_force
import numpy as np
import polars as pl
import polars.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import local_trace, random_routing, random_sequence, random_trace, write_trace

import moerun
from moerun import SequenceRouting, Trace, metrics
from moerun.errors import InvalidArgumentError, MoerunWarning
from moerun.metrics import groups
from moerun.metrics.suitability import knee

POLICIES = ("sch", "lru", "lfu", "belady")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


def layer_tokens(trace):
    """[layer][sequence][token] lists of experts, read back from the file."""
    layers = [[] for _ in trace.moe_layers]
    for shard in trace.shards():
        for ids, length in zip(shard.expert_ids, shard.lengths, strict=True):
            for layer, rows in zip(layers, ids, strict=True):
                layer.append(rows[:length].tolist())
    return layers


SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "lengths": st.lists(st.integers(1, 25), min_size=1, max_size=4),
        "layers": st.integers(1, 3),
        "experts": st.integers(2, 7),
        "shard_bytes": st.sampled_from([1, 10**6]),
    }
)


@pytest.mark.filterwarnings("ignore::moerun.errors.MoerunWarning")
@given(SHAPES, st.integers(1, 9), st.integers(1, 3))
def test_everything_is_what_plain_loops_give(folder, shape, m, threads):
    shape["top_k"] = 1 + shape["seed"] % (shape["experts"] - 1)
    trace = Trace.open(random_trace(folder / "t.safetensors", **shape).parent)
    experts = range(trace.num_experts)
    layers = layer_tokens(trace)

    of_layer = [brute_force.window_counts(layer, experts, m) for layer in layers]
    of_expert = [
        brute_force.window_counts(layer, [expert], m) for layer in layers for expert in experts
    ]
    units = {"model": [list(itertools.chain(*of_layer))], "layer": of_layer, "expert": of_expert}
    for level, counts in units.items():
        frame = metrics.srp(trace, [m], level, threads=threads)
        assert len(frame) == (len(counts) if counts[0] else 0)
        for row, of_unit in zip(frame.iter_rows(named=True), counts, strict=False):
            if not any(of_unit):
                assert row["srp"] == row["activation_rate"] == 0
                continue
            best, threshold, ratio, rate = brute_force.srp(of_unit, m)
            assert row["srp"] == pytest.approx(best)
            assert row["threshold"] == threshold
            assert row["cache_ratio"] == pytest.approx(ratio)
            assert row["activation_rate"] == pytest.approx(rate)

    sequences = list(zip(*layers, strict=True))
    pools = [brute_force.pooled(sequence, trace.num_experts) for sequence in sequences]
    for policy in POLICIES:
        frame = metrics.hit_rate(trace, policy, m, threads=threads)
        mean = metrics.hit_rate(trace, policy, m, "mean")
        expected = [brute_force.hit_rates(layer, trace.num_experts, policy, m) for layer in layers]
        np.testing.assert_allclose(frame["hit_rate"], np.ravel(expected), atol=1e-12)
        np.testing.assert_allclose(mean["hit_rate"], np.mean(expected, axis=0), atol=1e-12)
        np.testing.assert_allclose(
            metrics.hit_rate(trace, policy, m, "model")["hit_rate"],
            brute_force.hit_rates(pools, len(layers) * trace.num_experts, policy, m),
            atol=1e-12,
        )
        assert frame["hit_rate"][-1] == mean["hit_rate"][-1] == 1


@given(st.integers(0, 10_000))
def test_a_larger_cache_never_finds_less(folder, seed):
    trace = Trace.open(random_trace(folder / "b.safetensors", seed, experts=7, top_k=3))
    for policy in POLICIES:
        rates = metrics.hit_rate(trace, policy, 9)["hit_rate"].to_numpy().reshape(2, -1)
        assert (np.diff(rates) >= 0).all(), policy


def test_a_model_that_repeats_itself_has_srp_one_and_hits_always(tmp_path):
    ids = np.tile(np.array([3, 1], np.uint16), (2, 40, 1))
    trace = Trace.open(write_trace(tmp_path / "t.safetensors", [SequenceRouting(ids)]))
    frame = metrics.srp(trace, (4, 16))
    assert frame["srp"].to_list() == [1, 1]
    assert frame["cache_ratio"].to_list() == [1, 1]
    assert frame["activation_rate"].to_list() == [0.25, 0.25]
    rates = metrics.hit_rate(trace, "lru", level="mean")
    assert rates["hit_rate"].to_list()[1:] == [1] * 7
    assert rates["cache_ratio"].to_list() == [c / 2 for c in range(1, 9)]


# Domains and intervals


@pytest.fixture(scope="module")
def two_domains(folder):
    random = np.random.default_rng(3)
    sequences = [random_sequence(random, 2, 60, 8, 2) for _ in range(10)]
    return Trace.open(
        write_trace(folder / "d.safetensors", sequences, ["a"] * 6 + ["b"] * 4, shard_bytes=900)
    )


def test_rows_of_a_domain_are_those_of_its_sequences_alone(two_domains, folder):
    shard_sequences = [
        SequenceRouting(ids.astype(np.uint16))
        for shard in two_domains.shards()
        for ids, domain in zip(shard.expert_ids, shard.domains, strict=True)
        if domain == "b"
    ]
    assert len(two_domains.files) > 3
    alone = Trace.open(write_trace(folder / "alone.safetensors", shard_sequences))
    for function, kind in (
        (metrics.srp, {"level": "layer", "segment_lengths": (4, 16)}),
        (metrics.srp, {"level": "expert", "segment_lengths": (4,)}),
        (metrics.hit_rate, {"policy": "sch"}),
        (metrics.load_balance, {"segment_lengths": (4,)}),
        (metrics.activation_rates, {}),
        (metrics.predictability, {}),
    ):
        expected = function(alone, **kind).drop("domain")
        both = function(two_domains, by_domain=True, **kind)
        assert both["domain"].unique(maintain_order=True).to_list() == [None, "a", "b"]
        for found in (both.filter(domain="b"), function(two_domains, domain="b", **kind)):
            pl.testing.assert_frame_equal(found.drop("domain"), expected)


def test_intervals_are_those_of_resampled_sequences(two_domains):
    weights = groups.make_groups(two_domains, None, False, 30, 7)[0].weights.astype(int)
    assert weights.shape == (30, 10)
    assert (weights.sum(axis=1) == 10).all()
    layer = layer_tokens(two_domains)[1]
    resampled = []
    for times in weights:
        sequences = [layer[i] for i in np.repeat(range(10), times)]
        resampled.append(brute_force.srp(brute_force.window_counts(sequences, range(8), 4), 4)[0])
    row = metrics.srp(two_domains, (4,), "layer", bootstrap=30, seed=7).row(1, named=True)
    low, high = groups.interval(np.array(row["srp"]), np.array(resampled))
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low), pytest.approx(high))


def test_an_interval_mirrors_the_percentiles_at_the_value():
    value = np.array([0.6])
    draws = np.linspace(0.5, 0.8, 1001)[:, None]
    low, high = groups.interval(value, draws)
    assert low[0] == pytest.approx(1.2 - 0.7925)
    assert high[0] == pytest.approx(1.2 - 0.5075)


@pytest.mark.parametrize("level", ["model", "layer", "expert"])
def test_intervals_hold_the_value_and_do_not_change_it(two_domains, level):
    plain = metrics.srp(two_domains, (4, 16), level)
    drawn = metrics.srp(two_domains, (4, 16), level, bootstrap=100, seed=1)
    assert plain["ci_low"].null_count() == len(plain)
    pl.testing.assert_frame_equal(plain.drop("ci_low", "ci_high"), drawn.drop("ci_low", "ci_high"))
    assert (drawn["ci_low"] <= drawn["ci_high"]).all()
    again = metrics.srp(two_domains, (4, 16), level, bootstrap=100, seed=1, threads=2)
    pl.testing.assert_frame_equal(drawn, again)
    other = metrics.srp(two_domains, (4, 16), level, bootstrap=100, seed=2)
    assert not drawn["ci_low"].equals(other["ci_low"])


def test_intervals_of_experts_do_not_depend_on_how_the_work_is_cut(two_domains, monkeypatch):
    whole = metrics.srp(two_domains, (4,), "expert", bootstrap=50)
    monkeypatch.setattr("moerun.metrics.local_consistency._MAX_BLOCK", 3 * 50 * 5)
    pl.testing.assert_frame_equal(metrics.srp(two_domains, (4,), "expert", bootstrap=50), whole)


def test_intervals_of_hit_rates(two_domains):
    frame = metrics.hit_rate(two_domains, "lru", level="mean", bootstrap=300)
    assert (frame["ci_low"] <= frame["hit_rate"] + 0.02).all()
    assert (frame["ci_high"] >= frame["hit_rate"] - 0.02).all()
    assert frame["ci_low"][-1] == frame["ci_high"][-1] == 1


# Balance, prediction, specialisation


def test_rates_and_balance_are_what_numpy_gives(two_domains):
    layers = layer_tokens(two_domains)
    used = np.zeros((2, 8))
    for row, layer in zip(used, layers, strict=True):
        np.add.at(row, np.ravel(layer), 1)
    rates = metrics.activation_rates(two_domains)
    np.testing.assert_allclose(rates["activation_rate"], (used / 600).ravel())
    balance = metrics.load_balance(two_domains, (16,))
    expected = []
    for layer in layers:
        counts = np.array(brute_force.window_counts(layer, range(8), 16)).reshape(-1, 8)
        expected.append((counts / 16).std(axis=1).mean())
    np.testing.assert_allclose(balance.filter(level="layer")["std"], expected)
    overall = balance.filter(level="model")
    assert overall["std"].item() == pytest.approx(np.mean(expected))
    assert overall["variation"].item() == pytest.approx(np.mean(expected) / (2 / 8))


def test_predictors_name_what_follows(tmp_path):
    random = np.random.default_rng(1)
    sequences = []
    for _ in range(6):
        first = random_routing(random, 1, 50, 8, 2)
        sequences.append(SequenceRouting(np.concatenate([first, (first + 3) % 8])))
    trace = Trace.open(write_trace(tmp_path / "t.safetensors", sequences, moe_layers=[1, 2]))
    frame = metrics.predictability(trace)
    recall = {
        (row["predictor"], row["layer"]): row["recall"] for row in frame.iter_rows(named=True)
    }
    assert ("previous_layer", 1) not in recall
    assert recall["previous_layer", 2] > 0.95
    assert 0.2 < recall["most_used", 1] < 0.5
    repeated = sum(
        len(set(a) & set(b))
        for tokens in layer_tokens(trace)[0]
        for a, b in itertools.pairwise(tokens)
    )
    assert recall["previous_token", 1] == pytest.approx(repeated / (6 * 49 * 2))
    assert recall["previous_token", None] == pytest.approx(recall["previous_token", 1])


def test_one_sequence_teaches_nothing(tmp_path):
    trace = Trace.open(random_trace(tmp_path / "t.safetensors", lengths=(30,)))
    with pytest.warns(MoerunWarning, match="one sequence"):
        frame = metrics.predictability(trace)
    assert frame["predictor"].unique().to_list() == ["previous_token"]


def test_an_expert_of_one_domain_and_of_one_word(tmp_path):
    """Domain a uses experts 0 and 1, b uses 2 and 3; expert 0 comes first for word 5 only."""

    def sequence(pairs, words):
        ids = np.array([[pairs[i % len(pairs)] for i in range(40)]], np.uint16)
        return SequenceRouting(
            ids,
            np.array([words[i % len(words)] for i in range(40)], np.int32),
            predicted_ids=np.full(40, 9, np.int32),
        )

    sequences = [sequence([(0, 1), (1, 0)], [5, 6]), sequence([(2, 3), (2, 3)], [7, 7])]
    trace = Trace.open(write_trace(tmp_path / "t.safetensors", sequences, ["a", "b"], 5))
    frame = metrics.specialization(trace)
    row = {r["expert"]: r for r in frame.iter_rows(named=True)}
    assert row[0]["domain_variation"] == pytest.approx(2**0.5)
    assert row[4]["domain_variation"] is None
    assert [row[e]["input_vocabulary"] for e in range(5)] == [1, 1, 1, None, None]
    # Word 6 follows word 5 twenty times, word 5 follows word 6 only nineteen times.
    assert [row[e]["next_vocabulary"] for e in range(5)] == [1, None, 1, None, None]
    assert row[2]["predicted_vocabulary"] == pytest.approx(40 / 80)
    few = metrics.specialization(trace, min_count=21)
    assert few["input_vocabulary"].drop_nulls().to_list() == [1]


def test_specialisation_says_nothing_without_domains_and_words(tmp_path):
    ids = random_routing(np.random.default_rng(0), 1, 30, 4, 2)
    trace = Trace.open(write_trace(tmp_path / "t.safetensors", [SequenceRouting(ids)], None, 4))
    frame = metrics.specialization(trace)
    assert frame.drop("layer", "expert").null_count().row(0) == (4,) * 8


def test_specialisation_counts_in_pieces_as_it_does_at_once(two_domains, monkeypatch):
    whole = metrics.specialization(two_domains)
    monkeypatch.setattr("moerun.metrics.expert_roles._MAX_TABLE", 1)
    pl.testing.assert_frame_equal(metrics.specialization(two_domains), whole)


# Verdict


def test_the_verdict_puts_the_figures_together(two_domains):
    found = metrics.verdict(two_domains, bootstrap=50)
    assert found.srp == metrics.srp(two_domains, (16,))["srp"].item()
    assert found.srp_ci_low < found.srp < found.srp_ci_high
    sch = metrics.hit_rate(two_domains, level="mean").filter(capacity=found.capacity)
    assert found.sch_hit_rate == sch["hit_rate"].item()
    assert found.cache_ratio == found.capacity / 2
    assert found.cache_bytes is None
    assert "GiB" not in found.summary()
    assert set(found.as_dict()) == {field.name for field in dataclasses.fields(found)}


def test_the_verdict_says_what_the_cache_costs(tmp_path):
    path = local_trace(tmp_path / "t.safetensors", metadata={"expert_bytes": str(3 << 29)})
    found = metrics.verdict(Trace.open(path))
    assert found.cache_bytes == found.capacity * 2 * (3 << 29)
    assert found.total_bytes == 12 * 2 * (3 << 29)
    assert "of 36.0 GiB" in found.summary()


def test_the_knee_is_where_a_further_expert_gains_less_than_its_share():
    assert knee(np.array([0.5, 0.8, 0.9, 1.0])) == 2
    assert knee(np.array([0.25, 0.5, 0.75, 1.0])) == 1
    assert knee(np.array([1.0])) == 1
    assert knee(np.array([0.5, 0.8, 0.9, 1.0]), least=3) == 3


def test_the_verdict_recommends_room_for_a_token_at_least(tmp_path):
    ids = np.tile(np.arange(6, dtype=np.uint16), (2, 2000, 1))
    trace = Trace.open(write_trace(tmp_path / "t.safetensors", [SequenceRouting(ids)]))
    found = metrics.verdict(trace)
    assert found.capacity == 6
    assert found.srp_floor == pytest.approx(12 / 14)
    # Always the same experts: there is nothing to follow, and nothing to load.
    assert (found.group, found.advice) == ("poor", "static")
    assert found.static_hit_rate == pytest.approx(1)
    assert "100% hits (75% by chance)" in found.summary()


def test_sequences_without_windows_are_in_no_bootstrap_sample(tmp_path):
    long = Trace.open(random_trace(tmp_path / "l.safetensors", lengths=(40, 50)))
    for level in ("model", "layer", "expert"):
        mixed = Trace.open(random_trace(tmp_path / "m.safetensors", lengths=(40, 50, 8, 8, 8)))
        with pytest.warns(MoerunWarning, match="3 of 5 sequences"):
            found = metrics.srp(mixed, (16,), level, bootstrap=50)
        pl.testing.assert_frame_equal(found, metrics.srp(long, (16,), level, bootstrap=50))


def test_one_sequence_or_one_draw_has_no_interval(tmp_path):
    one = Trace.open(random_trace(tmp_path / "o.safetensors", lengths=(40,)))
    three = Trace.open(random_trace(tmp_path / "t.safetensors"))
    for frame in (
        metrics.srp(one, (4,), bootstrap=100),
        metrics.hit_rate(one, "lru", bootstrap=100),
        metrics.srp(three, (4,), bootstrap=1),
        metrics.srp(one, (4,), "expert", bootstrap=100),
    ):
        assert frame["ci_low"].null_count() == len(frame)


def test_a_verdict_needs_windows(tmp_path):
    trace = Trace.open(random_trace(tmp_path / "t.safetensors", lengths=(15,)))
    with pytest.raises(InvalidArgumentError, match="at least 16 tokens; the longest has 15"):
        metrics.verdict(trace)


# Bad arguments


def test_windows_longer_than_a_sequence_are_left_out_and_said(tmp_path):
    trace = Trace.open(random_trace(tmp_path / "t.safetensors", lengths=(10, 20)))
    with pytest.warns(MoerunWarning) as caught:
        frame = metrics.srp(trace, (4, 16, 64))
    assert frame["segment_length"].to_list() == [4, 16]
    assert metrics.srp(trace, np.array([4]))["segment_length"].to_list() == [4]
    texts = [str(warning.message) for warning in caught]
    assert "1 of 2 sequences of t.safetensors have no window of 16 tokens" in texts[0]
    assert "windows of 64 tokens are left out: the longest sequence" in texts[1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda t: metrics.srp(t, level="token"), "level: expected model, layer, expert"),
        (lambda t: metrics.srp(t, (0,)), "must be from 1"),
        (lambda t: metrics.srp(t, 16), "must be a sequence"),
        (lambda t: metrics.srp(str(t.path)), "trace must be a moerun.Trace, not str"),
        (lambda t: metrics.srp(t, domain="c"), "domain: expected one of all, found 'c'"),
        (lambda t: metrics.srp(t, domain="all", by_domain=True), "exclude each other"),
        (lambda t: metrics.srp(t, bootstrap=-1), "bootstrap must be"),
        (lambda t: metrics.srp(t, threads=0), "threads must be"),
        (lambda t: metrics.hit_rate(t, "mru"), "policy: expected sch, lru, lfu, belady"),
        (lambda t: metrics.hit_rate(t, level="expert"), "level: expected layer, mean, model"),
        (lambda t: metrics.hit_rate(t, segment_length=0), "segment_length must be"),
        (lambda t: metrics.specialization(t, min_count=0), "min_count must be"),
    ],
)
def test_bad_arguments_are_named(tmp_path, call, text):
    trace = Trace.open(random_trace(tmp_path / "t.safetensors"))
    with pytest.raises(InvalidArgumentError, match=text):
        call(trace)


def test_metrics_are_there_without_a_further_import():
    code = "import moerun, sys; assert 'polars' not in sys.modules; moerun.metrics.srp"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'metric'"):
        moerun.metric  # noqa: B018


def test_more_bootstrap_samples_than_memory_holds_are_refused(tmp_path):
    with moerun.Trace.open(random_trace(tmp_path / "t.safetensors", lengths=(30,) * 200)) as trace:
        for measure in (moerun.metrics.srp, moerun.metrics.hit_rate):
            with pytest.raises(InvalidArgumentError, match=r"1,000,000 samples.*at most [\d,]+"):
                measure(trace, bootstrap=1_000_000)
