"""Recall of a batch's experts and calibration, against plain loops; nothing here needs PyTorch."""

import numpy as np
import polars as pl
import pytest
from predictors import random_predictor
from traces import random_sequence, random_trace, write_trace

from moerun import SequenceRouting
from moerun.errors import FormatError, InvalidArgumentError
from moerun.predictor import PathPredictor, evaluate
from moerun.predictor.baselines import Frequencies, likeliest
from moerun.predictor.files import sequence_hash
from moerun.predictor.sequences import activity, opened_traces, read_sequences
from moerun.trace import NO_PREDICTION

LAYERS, EXPERTS, TOP_K = 2, 6, 2


def routing(random, tokens):
    plain = random_sequence(random, LAYERS, tokens, EXPERTS, TOP_K)
    guesses = plain.expert_ids.copy()
    guesses[0, :3] = NO_PREDICTION
    guesses[1] = (guesses[1] + random.integers(2, size=(tokens, 1))) % EXPERTS
    return SequenceRouting(plain.expert_ids, plain.token_ids, prefetch_ids=guesses)


@pytest.fixture
def trace(tmp_path):
    random = np.random.default_rng(3)
    sequences = [routing(random, tokens) for tokens in (20, 35, 28, 31, 26, 40, 22)]
    domains = ["a", "a", "b", "a", "b", "b", "b"]
    return write_trace(tmp_path / "t.safetensors", sequences, domains, num_experts=EXPERTS)


@pytest.fixture
def predictor(tmp_path):
    random_predictor(tmp_path / "p.safetensors", layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
    return PathPredictor.open(tmp_path / "p.safetensors")


def best(scores, count):
    return set(sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count])


def plain_counts(predictor, sequences, batches):
    """Named, right and used by layer and predictor; right of B_acc under "best"."""
    counts = {}

    def add(layer, name, named, used):
        found = counts.setdefault((layer, name), [0, 0, 0])
        found[0] += len(named)
        found[1] += len(named & used)
        found[2] += len(used)

    probabilities = {id(each): predictor.predict(each.token_ids) for each in sequences}
    for batch in batches:
        for t in range(1, min(each.num_tokens for each in batch)):
            for layer in range(LAYERS):
                ids = [set(each.expert_ids[layer, t].tolist()) for each in batch]
                used = set().union(*ids)
                p = np.array([probabilities[id(each)][t, layer] for each in batch])
                add(layer, "path", set().union(*(best(row, TOP_K) for row in p)), used)
                before = [set(each.expert_ids[layer, t - 1].tolist()) for each in batch]
                add(layer, "previous_token", set().union(*before), used)
                told = [set(each.prefetch_ids[layer, t].tolist()) for each in batch]
                add(layer, "next_layer_router", set().union(*told) - {NO_PREDICTION}, used)
                active = 1 - np.prod(1 - p.astype(np.float64), axis=0)
                expected = max(TOP_K, round(float(active.sum())))
                add(layer, "path_batch", best(active, expected), used)
                add(layer, "best", best(p.astype(np.float64).sum(axis=0), len(used)), used)
    return counts


@pytest.mark.parametrize("size", [1, 2, 3])
def test_counts_are_those_of_plain_loops(trace, predictor, size):
    found = evaluate(predictor, trace, batch_sizes=(size,), seed=5)
    sequences = read_sequences(opened_traces(trace), 50)
    order = [sequences[i] for i in np.random.default_rng(5).permutation(len(sequences))]
    assert found.num_tokens == sum(each.num_tokens - 1 for each in sequences)
    for domain in (None, "a", "b"):
        members = [each for each in order if domain in (None, each.domain)]
        batches = [members[i : i + size] for i in range(0, len(members) - size + 1, size)]
        counts = plain_counts(predictor, sequences, batches)
        rows = found.recall.filter(pl.col("domain").eq_missing(pl.lit(domain)))
        for name in ("path", "path_batch", "previous_token", "next_layer_router"):
            totals = np.zeros(3)
            for layer in range(LAYERS):
                row = rows.row(
                    by_predicate=(pl.col("layer") == layer) & (pl.col("predictor") == name),
                    named=True,
                )
                named, right, used = counts[layer, name]
                totals += counts[layer, name]
                # Products of float32 may name another of two that are as likely.
                slack = 0.02 if name == "path_batch" else 1e-9
                assert row["recall"] == pytest.approx(right / used, abs=slack)
                assert row["precision"] == pytest.approx(right / named, abs=slack)
                if name == "path":
                    named, right, used = counts[layer, "best"]
                    assert row["batch_accuracy"] == pytest.approx(right / used, abs=1e-9)
                else:
                    assert row["batch_accuracy"] is None
            row = rows.row(
                by_predicate=pl.col("layer").is_null() & (pl.col("predictor") == name), named=True
            )
            assert row["recall"] == pytest.approx(totals[1] / totals[2], abs=0.02)


def test_sequences_that_were_trained_on_teach_the_baselines_only(tmp_path, trace):
    sequences = read_sequences(opened_traces(trace), 50)
    known = [each.hash for each in sequences[:4]]
    file = tmp_path / "q.safetensors"
    random_predictor(
        file,
        layers=LAYERS,
        experts=EXPERTS,
        trained_sequences=np.array(known, np.int64),
        training={"domains": ["a"]},
    )
    found = evaluate(file, trace, batch_sizes=(1, 4), threads=1)
    assert (found.num_sequences, found.num_skipped) == (3, 4)
    assert found.domains == {"b": 3}
    assert found.trained_domains == ["a"]
    assert found.baselines_from == "trained sequences"
    assert found.left_out == ["batch 4 (only 3 sequences)"]
    learned = Frequencies(sequences[:4], LAYERS, EXPERTS)
    right = used = 0
    for each in sequences[4:]:
        for t in range(1, each.num_tokens):
            scores = sum(learned.conditional[0, e] for e in each.expert_ids[0, t])
            right += len(best(scores.astype(np.float32), TOP_K) & set(each.expert_ids[1, t]))
            used += TOP_K
    row = found.recall.row(
        by_predicate=(pl.col("predictor") == "previous_layer") & (pl.col("layer") == 1), named=True
    )
    assert row["recall"] == pytest.approx(right / used, abs=0.01)
    first = (pl.col("predictor") == "previous_layer") & (pl.col("layer") == 0)
    assert found.recall.filter(first).is_empty()

    everything = np.array([each.hash for each in sequences], np.int64)
    random_predictor(file, layers=LAYERS, experts=EXPERTS, trained_sequences=everything)
    with pytest.raises(InvalidArgumentError, match="trained on all of them"):
        evaluate(file, trace)


def test_frequencies_are_counts():
    random = np.random.default_rng(0)
    ids = np.array([[[0, 1], [0, 2]], [[3, 4], [3, 5]]], np.uint16)

    class Sequence:
        expert_ids = ids

    learned = Frequencies([Sequence, Sequence], 2, 6)
    assert learned.used.tolist() == [[4, 2, 2, 0, 0, 0], [0, 0, 0, 4, 2, 2]]
    assert learned.conditional[0, 0].tolist() == [0, 0, 0, 1, 0.5, 0.5]
    assert learned.conditional[0, 1].tolist() == [0, 0, 0, 1, 1, 0]
    assert learned.conditional[0, 5].tolist() == [0] * 6
    scores = random.random((3, 4, 6))
    chosen = likeliest(scores, 2)
    assert (chosen.sum(axis=2) == 2).all()
    assert likeliest(np.zeros((1, 6)), 3).tolist() == [[True] * 3 + [False] * 3]
    assert activity(np.array([[[0, NO_PREDICTION]]]), 2).tolist() == [[[True, False]]]


def test_calibration_counts_every_probability_once(trace, predictor):
    found = evaluate(predictor, trace, batch_sizes=(1,))
    frame = found.calibration
    assert frame["count"].sum() == found.num_tokens * LAYERS * EXPERTS
    assert frame["low"].to_list() == [i / 20 for i in range(20)]
    filled = frame.filter(pl.col("count") > 0)
    middle = (filled["low"] + filled["high"]) / 2
    assert ((filled["predicted"] - middle).abs() <= 0.025 + 1e-6).all()
    used = (filled["observed"] * filled["count"]).sum()
    assert used == pytest.approx(found.num_tokens * LAYERS * TOP_K)
    assert frame.filter(pl.col("count") == 0)["observed"].null_count() == 20 - len(filled)
    gap = ((filled["observed"] - filled["predicted"]).abs() * filled["count"]).sum()
    assert found.calibration_error == pytest.approx(gap / frame["count"].sum())


def test_one_sequence_has_no_baselines_that_learn(tmp_path, predictor):
    trace = random_trace(tmp_path / "one.safetensors", lengths=(12,))
    found = evaluate(predictor, trace, batch_sizes=(1,))
    assert set(found.recall["predictor"]) == {"path", "path_batch", "previous_token"}


def test_wrong_input_is_refused(tmp_path, trace, predictor):
    other = random_trace(tmp_path / "o.safetensors", experts=7)
    short = random_trace(tmp_path / "s.safetensors", lengths=(1, 1))
    random = np.random.default_rng(0)
    unknown = write_trace(
        tmp_path / "u.safetensors",
        [SequenceRouting(routing(random, 9).expert_ids)],
        num_experts=EXPERTS,
    )
    for given, what in (
        (other, "of another model than the predictor"),
        (short, "single token"),
        (unknown, "does not say which tokens"),
        ([], "at least one"),
    ):
        with pytest.raises(InvalidArgumentError, match=what):
            evaluate(predictor, given)
    for sizes in (), (0,), (1.5,):
        with pytest.raises(InvalidArgumentError, match="batch"):
            evaluate(predictor, trace, batch_sizes=sizes)
    beyond = random_sequence(random, LAYERS, 5, EXPERTS, TOP_K, vocabulary=3)
    beyond.token_ids[2] = 50
    with pytest.raises(FormatError, match=r"token_ids\[0, 2\].*from 0 to 49.*found 50"):
        evaluate(predictor, write_trace(tmp_path / "b.safetensors", [beyond], num_experts=EXPERTS))


def test_hashes_are_of_tokens_alone(trace):
    for each in read_sequences(opened_traces(trace), 50):
        assert each.hash == sequence_hash(each.token_ids)
