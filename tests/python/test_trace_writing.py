"""Traces that are the same bytes however often their recording was cut off, and never mixed."""

import inspect
import os
import time
from pathlib import Path

import numpy as np
import pytest
from traces import random_sequence

from moerun import SequenceRouting, Trace, TraceWriter
from moerun.errors import FileError, FormatError, InvalidArgumentError, MoerunError
from moerun.recording import check_output
from moerun.trace import journal as journals

LENGTHS = (9, 14, 5, 11, 20, 3, 8, 8, 16, 7)
SHARD_BYTES = 500  # three or four sequences a shard


def sequence(index, *, with_all=False, seed=0):
    random = np.random.default_rng([seed, index])
    tokens = LENGTHS[index % len(LENGTHS)]
    plain = random_sequence(random, 2, tokens, 8, 2)
    if not with_all:
        return plain
    return SequenceRouting(
        plain.expert_ids,
        plain.token_ids,
        predicted_ids=plain.predicted_ids,
        expert_weights=random.random((2, tokens, 2), np.float32),
        router_logits=random.normal(size=(2, tokens, 8)).astype(np.float32),
        prefetch_ids=np.full((2, tokens, 2), 65535, np.uint16),
        cache_events=random.integers(0, 2, (index % 3, 4)).astype(np.int32),
    )


def writer(path, **options):
    options = {"model": "m", "num_experts": 8, "top_k": 2, "moe_layers": [0, 1], **options}
    return TraceWriter(path, **{"shard_bytes": SHARD_BYTES, "journal_seconds": 0, **options})


def append_from(w, last, **options):
    for index in range(w.num_sequences, last):
        w.append(sequence(index, **options), f"domain {index // 4}")


def written(path):
    """The bytes of all files in the folder of a trace, by name."""
    return {
        str(f.relative_to(path.parent)): f.read_bytes()
        for f in path.parent.rglob("*")
        if f.is_file()
    }


def in_child(function):
    """Run a function in a process that ends without any cleaning up; return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def expected(tmp_path):
    """Makes the files of an uninterrupted recording."""

    def make(**options):
        path = tmp_path / "whole" / "t.safetensors"
        with writer(path, overwrite=True, journal_seconds=1000) as w:
            append_from(w, len(LENGTHS), **options)
        return written(path)

    return make


@pytest.mark.parametrize("with_all", [False, True])
def test_the_same_sequences_give_the_same_bytes_wherever_a_recording_was_cut_off(
    tmp_path, expected, with_all
):
    whole = expected(with_all=with_all)
    assert len(whole) >= 3
    for step in (1, 2, 3, 7):
        path = tmp_path / f"step {step}" / "t.safetensors"
        for last in [*range(step, len(LENGTHS), step), len(LENGTHS)]:
            with writer(path, resume=True) as w:
                append_from(w, last, with_all=with_all)
        assert written(path) == whole
        path = tmp_path / f"killed {step}" / "t.safetensors"
        for last in range(step, len(LENGTHS), step):

            def be_killed(path=path, last=last):
                append_from(writer(path, resume=True), last, with_all=with_all)

            assert in_child(be_killed) == 0
        with writer(path, resume=True) as w:
            assert w.num_sequences == last  # nothing was lost
            append_from(w, len(LENGTHS), with_all=with_all)
        assert written(path) == whole


def test_time_decides_only_when_the_journal_is_written(tmp_path, expected):
    whole = expected()
    for seconds in (0, 0.01, 1000):
        path = tmp_path / str(seconds) / "t.safetensors"
        with writer(path, journal_seconds=seconds) as w:
            append_from(w, len(LENGTHS))
        assert written(path) == whole


def test_no_more_than_thirty_seconds_of_work_are_at_risk():
    assert inspect.signature(TraceWriter).parameters["journal_seconds"].default <= 15


def test_sequences_are_safe_as_soon_as_the_time_is_over(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "t.safetensors"

    def be_killed():
        w = writer(path, shard_bytes=10**9, journal_seconds=5)
        for index, at in enumerate((101, 104, 105, 106, 109, 111, 112)):
            now[0] = float(at)
            w.append(sequence(index), "a")

    assert in_child(be_killed) == 0
    with writer(path, resume=True, shard_bytes=10**9) as w:
        assert w.num_sequences == 6  # written at 105 and 111


@pytest.mark.parametrize("call", ["replace", "fsync", "truncate", "unlink"])
@pytest.mark.parametrize("first", [0, 6])
def test_a_process_that_dies_at_any_step_leaves_what_resume_completes(
    tmp_path, expected, call, first
):
    whole = expected()
    for number in range(1, 100):
        path = tmp_path / str(number) / "t.safetensors"
        if first:
            with writer(path) as w:
                append_from(w, first)

        def die(path=path, number=number):
            owner = Path if call == "unlink" else os
            real, left = getattr(owner, call), [number]

            def dying(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return real(*args, **options)

            setattr(owner, call, dying)
            with writer(path, resume=True) as w:
                append_from(w, len(LENGTHS))

        code = in_child(die)
        with writer(path, resume=True) as w:
            assert w.num_sequences >= first
            append_from(w, len(LENGTHS))
        assert written(path) == whole
        if code == 0:
            assert number > 1
            return
        assert code == 9
    raise AssertionError("never came to its end")


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_an_old_trace_and_the_one_that_replaces_it_are_never_mixed(tmp_path, expected, call):
    whole = expected()
    for number in range(1, 100):
        path = tmp_path / str(number) / "t.safetensors"
        with writer(path) as w:
            append_from(w, len(LENGTHS), seed=1)
        old = written(path)
        assert old.keys() == whole.keys()

        def die(path=path, number=number):
            owner = Path if call == "unlink" else os
            real, left = getattr(owner, call), [number]

            def dying(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return real(*args, **options)

            setattr(owner, call, dying)
            with writer(path, overwrite=True) as w:
                append_from(w, len(LENGTHS))

        code = in_child(die)
        try:
            Trace.open(path)
            assert {name: written(path)[name] for name in whole} in (old, whole)
        except MoerunError:
            pass  # between the two: refused, not mixed
        with writer(path, resume=True) as w:
            append_from(w, len(LENGTHS))
        assert written(path) in (old, whole)
        if code == 0:
            return
    raise AssertionError("never came to its end")


@pytest.mark.parametrize("damage", ["cut", "flip", "noise"])
def test_a_journal_that_was_cut_short_keeps_the_records_before(tmp_path, expected, damage):
    path = tmp_path / "t" / "t.safetensors"
    options = {"shard_bytes": 10**9}
    assert in_child(lambda: append_from(writer(path, **options), 5)) == 0
    file = path.with_name("t.safetensors.partial") / "journal"
    data = file.read_bytes()
    ends = [end for _, _, end in journals.read_journal(file)]
    assert len(ends) == 5
    bad = bytearray(data)
    if damage == "cut":
        bad = bad[: ends[3] + 100]
    elif damage == "flip":
        bad[ends[3] + 60] ^= 1
    else:
        bad[ends[3] :] = b"\xff" * 80
    file.write_bytes(bad)
    with writer(path, resume=True, **options) as w:
        assert w.num_sequences == 4
        append_from(w, 5)
    assert Trace.open(path).num_sequences == 5


def test_a_journal_that_cannot_be_written_loses_no_record_before(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    w = writer(path, shard_bytes=10**9)
    append_from(w, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            journals, "_write", lambda file, data: (file.write(data[:7]), os.fsync(10**6))
        )
        with pytest.raises(FileError, match="journal cannot be written"):
            w.append(sequence(2), "a")
    w.append(sequence(3), "a")
    records = list(journals.read_journal(tmp_path / "t.safetensors.partial" / "journal"))
    assert [first for first, _, _ in records] == [0, 1, 2]
    w.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    path = tmp_path / "t.safetensors"
    first = writer(path)
    first.append(sequence(0), "a")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileError, match=r"t\.safetensors is being written by this process"):
            writer(path, **options)
    with pytest.raises(FileError, match="is being written by"):
        check_output(path, overwrite=True)

    def other():
        try:
            writer(path, overwrite=True)
        except FileError as error:
            os._exit(7 if f"another process ({os.getppid()})" in str(error) else 8)

    assert in_child(other) == 7
    first.append(sequence(1), "a")
    first.close()
    assert Trace.open(path).num_sequences == 2
    with writer(path, overwrite=True) as second:
        second.append(sequence(0), "a")
    assert Trace.open(path).num_sequences == 1


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    path = tmp_path / "t.safetensors"
    assert in_child(lambda: writer(path)) == 0
    assert (tmp_path / "t.safetensors.partial" / "lock").exists()
    check_output(path)  # there is nothing to resume
    with writer(path) as w:
        w.append(sequence(0), "a")
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_writer_that_cannot_end_lets_the_next_one_go_on(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    w = writer(path)
    append_from(w, len(LENGTHS))

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(FileError, match="No space left"):
            w.close()
    assert w.close() == []
    with writer(path, resume=True) as again:
        assert again.num_sequences == len(LENGTHS)
    assert Trace.open(path).num_sequences == len(LENGTHS)


def test_files_of_two_recordings_with_the_same_settings_are_refused(tmp_path):
    for seed in (0, 1):
        with writer(tmp_path / str(seed) / "t.safetensors") as w:
            append_from(w, len(LENGTHS), seed=seed)
    names = sorted(file.name for file in (tmp_path / "0").iterdir())
    assert len(names) >= 3
    for name in names:
        kept = (tmp_path / "0" / name).read_bytes()
        (tmp_path / "0" / name).write_bytes((tmp_path / "1" / name).read_bytes())
        with pytest.raises(FormatError, match="two recordings with one name"):
            Trace.open(tmp_path / "0" / "t.safetensors")
        (tmp_path / "0" / name).write_bytes(kept)
    first, second = (tmp_path / "0" / name for name in names[:2])
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    with pytest.raises(FormatError, match="two recordings with one name"):
        Trace.open(tmp_path / "0")
    # Alone, a file is a trace of its own sequences.
    (tmp_path / "copy.safetensors").write_bytes(data[1])
    assert Trace.open(tmp_path / "copy.safetensors").num_sequences >= 1


def test_another_shard_size_is_no_way_to_go_on(tmp_path):
    path = tmp_path / "t.safetensors"
    with writer(path) as w:
        append_from(w, 3)
    with pytest.raises(InvalidArgumentError, match="shard_bytes = 500, this would have 900"):
        writer(path, resume=True, shard_bytes=900)
    assert Trace.open(path).num_sequences == 3


@pytest.mark.parametrize("path", [None, 3, b"t.safetensors", ["a"], "a\0.safetensors"])
def test_what_is_no_path_is_an_invalid_argument(path):
    with pytest.raises(InvalidArgumentError, match="path of a trace"):
        Trace.open(path)
    with pytest.raises(InvalidArgumentError, match="path of a trace"):
        writer(path)


@pytest.mark.parametrize("shard_bytes", [SHARD_BYTES, 2**20])
def test_a_finished_trace_survives_a_kill_before_its_folder_is_removed(
    tmp_path, shard_bytes, monkeypatch
):
    path = tmp_path / "t.safetensors"
    first = writer(path, shard_bytes=shard_bytes)
    append_from(first, 8)
    monkeypatch.setattr(type(first._folder), "remove", lambda folder: folder._lock.release())
    first.close()
    monkeypatch.undo()
    with writer(path, shard_bytes=shard_bytes, resume=True) as again:
        assert again.num_sequences == 8
    assert Trace.open(path).num_sequences == 8
