"""Batches of waiting sequences: what holds for any paths, and the benchmark as a small run."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from test_benchmarks import run

from moerun import errors
from moerun.scheduling import active_experts, split_batches


def union(paths, indices):
    return int(paths[list(indices)].any(axis=0).sum())


@st.composite
def waiting(draw):
    """Paths, and sizes of batches that add up."""
    shape = draw(array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=12))
    paths = draw(arrays(np.bool_, shape))
    cuts = sorted(draw(st.lists(st.integers(0, shape[0]), max_size=3)))
    return paths, np.diff([0, *cuts, shape[0]]).tolist()


@settings(max_examples=200, deadline=None)
@given(waiting())
def test_batches_are_a_split_of_given_sizes_and_never_worse(problem):
    paths, sizes = problem
    batches = split_batches(paths, sizes)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(paths)))
    assert all((np.diff(batch) > 0).all() for batch in batches)
    arrival = np.split(np.arange(len(paths)), np.cumsum(sizes)[:-1])
    found = sum(active_experts(paths, batch) for batch in batches)
    first_come = sum(active_experts(paths, batch) for batch in arrival)
    assert found <= first_come
    if found == first_come:
        assert all(map(np.array_equal, batches, arrival))
    assert all(map(np.array_equal, batches, split_batches(paths, sizes)))


@settings(deadline=None)
@given(waiting(), st.data())
def test_active_experts_are_those_of_any_of_the_sequences(problem, data):
    paths, _ = problem
    indices = [i for i in range(len(paths)) if data.draw(st.booleans())]
    assert active_experts(paths, indices) == union(paths, indices)


@settings(deadline=None)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=3, max_dims=3, max_side=9),
        elements=st.floats(0, 1, width=32),
    ),
    st.data(),
)
def test_probabilities_stand_for_their_likeliest_experts(likely, data):
    top_k = data.draw(st.integers(0, likely.shape[2]))
    order = np.argsort(-likely, axis=-1, kind="stable")
    paths = np.zeros(likely.shape, np.bool_)
    np.put_along_axis(paths, order[..., :top_k], True, axis=-1)
    assert all(map(np.array_equal, split_batches(likely, top_k=top_k), split_batches(paths)))
    everyone = range(len(likely))
    assert active_experts(likely, everyone, top_k=top_k) == union(paths, everyone)


def test_two_topics_that_arrive_in_turns_are_separated():
    random = np.random.default_rng(0)
    paths = np.zeros((33, 4, 20), np.bool_)
    for i, path in enumerate(paths):
        for layer in path:
            layer[10 * (i % 2) + random.permutation(10)[:4]] = True
    even, odd = split_batches(paths)
    assert even.tolist() == list(range(0, 33, 2))
    assert odd.tolist() == list(range(1, 33, 2))
    assert even.dtype == np.int64
    # Rows that are not contiguous in memory.
    assert np.array_equal(split_batches(paths[:, ::-1])[1], odd)


@pytest.mark.parametrize(
    ("paths", "sizes", "options", "message"),
    [
        (np.zeros((4, 3), bool), (2, 2), {}, r"shape .*\(4, 3\)"),
        (np.zeros((4, 3, 2), np.int64), (2, 2), {}, "bool or float, not int64"),
        (np.zeros((4, 3, 2), bool), (2, 2), {"top_k": 1}, "top_k is for paths of floats"),
        (np.zeros((4, 3, 2)), (2, 2), {}, "need top_k"),
        (np.zeros((4, 3, 2)), (2, 2), {"top_k": 3}, "top_k must be from 0 to 2"),
        (np.full((4, 3, 2), np.nan), (2, 2), {"top_k": 1}, "expert 0 in layer 0 is not a number"),
        (np.zeros((4, 3, 2), bool), (2, 1), {}, "sum of 4.*found 3"),
        (np.zeros((4, 3, 2), bool), (2, 4), {}, "sum of 4"),
        (np.zeros((4, 3, 2), bool), (5, -1), {}, "a size must be from 0"),
        (np.zeros((4, 3, 2), bool), (2, 2.0), {}, "a size must be an int"),
        (np.zeros((4, 3, 2), bool), 4, {}, "sizes must be a sequence of ints"),
        (np.zeros((4097, 1, 1), bool), (4097,), {}, "at most 4096"),
    ],
)
def test_what_cannot_be_split_is_refused(paths, sizes, options, message):
    with pytest.raises(errors.InvalidArgumentError, match=message):
        split_batches(paths, sizes, **options)


def test_sequences_that_there_are_not_are_refused():
    paths = np.zeros((4, 3, 2), bool)
    for indices, message in (([4], "below 4, found 4"), ([-1], "an index"), ("1", "indices")):
        with pytest.raises(errors.InvalidArgumentError, match=message):
            active_experts(paths, indices)


def test_bench_scheduler_compares_arrival_order_with_batches(tmp_path):
    small = ("--waiting", 8, "--instances", 2, "--shape", "3x16x2")
    result = json.loads(run("bench_scheduler.py", *small, "--json"))
    assert {row["waiting"] for row in result["rows"]} == {8}
    for row in result["rows"]:
        assert row["bound"] <= row["scheduled"] <= row["arrival"]
        assert row["milliseconds"] > 0
    assert any("topics" in row["paths"] for row in result["rows"])
    table = run("bench_scheduler.py", *small)
    assert "| arrival" in table
