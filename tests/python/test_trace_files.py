"""Traces on disk: what is written is what is read, and what is wrong is refused by name."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from traces import random_sequence, random_trace, write_trace

from moerun import SequenceRouting, Trace, TraceWriter
from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError


def sequence(tokens=20, experts=8, **optional):
    random = np.random.default_rng(tokens)
    plain = random_sequence(random, 2, tokens, experts, 2)
    return SequenceRouting(plain.expert_ids, plain.token_ids, **optional)


def writer(path, **options):
    options = {"model": "m", "num_experts": 8, "top_k": 2, "moe_layers": [0, 1], **options}
    return TraceWriter(path, **options)


def contents(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def spoiled(path, metadata=None, **tensors):
    """The trace `path` with some metadata and tensors changed; None removes one."""
    arrays, texts = contents(path)
    arrays.update(tensors)
    texts.update(metadata or {})
    save_file(
        {name: array for name, array in arrays.items() if array is not None},
        path,
        {name: text for name, text in texts.items() if text is not None},
    )
    return path


def read_back(trace):
    return [
        (shard.expert_ids[i, :, :length].tolist(), shard.tensor("token_ids")[i, :length].tolist())
        for shard in trace.shards()
        for i, length in enumerate(shard.lengths)
    ]


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    sequences = [sequence(tokens) for tokens in (20, 33, 7, 20, 5)]
    path = tmp_path / "t.safetensors"
    domains = ["a", "b", "a", "ä", "b"]
    write_trace(path, sequences, domains, moe_layers=[1, 4], shard_bytes=shard_bytes)
    trace = Trace.open(path)
    assert trace.num_sequences == 5
    assert trace.lengths.tolist() == [20, 33, 7, 20, 5]
    assert (trace.num_tokens, trace.max_length) == (85, 33)
    assert trace.domains == domains
    assert trace.domain_names == ["a", "b", "ä"]
    assert trace.moe_layers == [1, 4]
    assert (trace.model, trace.num_experts, trace.top_k) == ("random", 8, 2)
    assert trace.expert_bytes is None
    assert read_back(trace) == [(s.expert_ids.tolist(), s.token_ids.tolist()) for s in sequences]
    names = sorted(file.name for file in tmp_path.iterdir())
    if shard_bytes == 1:
        assert names == [f"t-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    if shard_bytes == 10**9:
        assert names == ["t.safetensors"]
    assert trace.files == sorted(tmp_path.iterdir())


def test_a_set_opens_by_its_name_a_shard_or_its_folder(tmp_path):
    random_trace(tmp_path / "t.safetensors", shard_bytes=1)
    expected = read_back(Trace.open(tmp_path / "t.safetensors"))
    for name in ("", "t-00002-of-00003.safetensors"):
        assert read_back(Trace.open(tmp_path / name)) == expected
    assert read_back(Trace.open(str(tmp_path))) == expected


def test_optional_tensors_are_kept(tmp_path):
    random = np.random.default_rng(0)
    sequences = [
        sequence(
            tokens,
            expert_weights=random.random((2, tokens, 2), np.float32),
            router_logits=random.normal(size=(2, tokens, 8)).astype(np.float32) * 1e6,
            predicted_ids=np.arange(tokens, dtype=np.int32),
            cache_events=np.array([[0, 1, 3, 2]] * count, np.int32).reshape(-1, 4),
        )
        for tokens, count in ((9, 2), (12, 0), (5, 1))
    ]
    trace = Trace.open(write_trace(tmp_path / "t.safetensors", sequences))
    assert trace.tensors == {
        "token_ids",
        "expert_weights",
        "router_logits",
        "predicted_ids",
        "cache_events",
    }
    shard = next(trace.shards())
    assert shard.tensor("expert_weights").dtype == np.float16
    np.testing.assert_allclose(
        shard.tensor("expert_weights")[1], sequences[1].expert_weights, atol=1e-3
    )
    assert np.isfinite(shard.tensor("router_logits")).all()
    assert shard.tensor("predicted_ids")[2, :5].tolist() == [0, 1, 2, 3, 4]
    assert shard.tensor("cache_events").tolist() == [
        [0, 0, 1, 3, 2],
        [0, 0, 1, 3, 2],
        [2, 0, 1, 3, 2],
    ]


def test_many_experts_need_two_bytes(tmp_path):
    ids = np.array([[[256, 0], [3, 299]]], np.uint16)
    path = write_trace(tmp_path / "t.safetensors", [SequenceRouting(ids)], num_experts=300)
    trace = Trace.open(path)
    shard = next(trace.shards())
    assert shard.expert_ids.dtype == np.uint16
    assert shard.expert_ids[0].tolist() == ids.tolist()
    assert trace.tensors == frozenset()  # token ids are not known
    assert (shard.tensor("token_ids") == -1).all()


def test_files_have_the_permissions_of_other_files(tmp_path):
    path = write_trace(tmp_path / "t.safetensors", [sequence()])
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode & 0o444 == other.stat().st_mode & 0o444


# Beginning, ending, going on


def test_an_exception_leaves_a_valid_trace_that_can_be_resumed(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(KeyboardInterrupt), writer(path, shard_bytes=1) as first:
        first.append(sequence(10), "a")
        first.append(sequence(11), "a")
        raise KeyboardInterrupt
    assert Trace.open(path).lengths.tolist() == [10, 11]
    with writer(path, resume=True, shard_bytes=1) as second:
        assert second.num_sequences == 2
        second.append(sequence(12), "b")
        assert second.num_sequences == 3
    trace = Trace.open(path)
    assert trace.lengths.tolist() == [10, 11, 12]
    assert trace.domains == ["a", "a", "b"]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_killed_process_had_written_can_be_resumed(tmp_path):
    path = tmp_path / "t.safetensors"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_trace_files import writer, sequence\n"
        f"w = writer({str(path)!r}, shard_bytes=1)\n"
        "w.append(sequence(10), 'a'); w.append(sequence(11), 'a'); os._exit(9)"
    )
    folder = os.path.dirname(__file__)
    assert subprocess.run([sys.executable, "-c", code, folder], timeout=60).returncode == 9
    with pytest.raises(MissingFileError, match=r"unfinished recording.*--resume"):
        Trace.open(path)
    with pytest.raises(FileError, match="--resume goes on with it"):
        writer(path)
    with writer(path, resume=True, shard_bytes=1) as second:
        assert second.num_sequences == 2
        second.append(sequence(12), "b")
    assert Trace.open(path).lengths.tolist() == [10, 11, 12]


def test_resume_begins_where_there_is_nothing(tmp_path):
    with writer(tmp_path / "t.safetensors", resume=True) as begun:
        assert begun.num_sequences == 0
        begun.append(sequence(), "a")
    assert Trace.open(tmp_path).num_sequences == 1


def test_a_trace_is_not_overwritten_unless_asked(tmp_path):
    path = random_trace(tmp_path / "t.safetensors", shard_bytes=1)
    with pytest.raises(FileError, match=r"t-00001-of-00003.safetensors exists already"):
        writer(path)
    with writer(path, overwrite=True) as replaced:
        replaced.append(sequence(), "a")
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_what_is_discarded_leaves_the_old_trace(tmp_path):
    path = random_trace(tmp_path / "t.safetensors", lengths=(9,))
    with writer(path, overwrite=True, shard_bytes=1) as unwanted:
        unwanted.append(sequence(10), "a")
        unwanted.append(sequence(11), "a")
        unwanted.discard()
    assert Trace.open(path).lengths.tolist() == [9]
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_an_overwritten_trace_is_there_until_the_new_one_is(tmp_path):
    path = random_trace(tmp_path / "t.safetensors", shard_bytes=1)
    with writer(path, overwrite=True, shard_bytes=1) as new:
        new.append(sequence(10), "a")
        assert Trace.open(path).num_sequences == 3
    assert Trace.open(path).lengths.tolist() == [10]
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


def test_nothing_is_appended_to_what_is_closed(tmp_path):
    with writer(tmp_path / "t.safetensors") as w:
        w.append(sequence(10), "a")
        with pytest.raises(InvalidArgumentError, match="domain must be a str"):
            w.append(sequence(10), 3)
    with pytest.raises(InvalidArgumentError, match="is closed"):
        w.append(sequence(10), "a")


def test_what_differs_between_two_recordings_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    settings = {"samples": 100, "data": {"a": [1, 2]}}
    with writer(path, metadata={"recording": json.dumps(settings)}) as w:
        w.append(sequence(10), "a")
    settings["data"]["a"] = [1, 3]
    with pytest.raises(InvalidArgumentError, match=r"with a = \[1, 2\], this would have \[1, 3\]"):
        writer(path, metadata={"recording": json.dumps(settings)}, resume=True)


def test_a_writer_without_sequences_leaves_nothing(tmp_path):
    with writer(tmp_path / "t.safetensors") as empty:
        pass
    assert empty.close() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "other"}, "recorded with model = m, this would have other"),
        ({"num_experts": 9}, "num_experts = 8, this would have 9"),
        ({"moe_layers": [0, 2]}, "moe_layers"),
        ({"metadata": {"phase": "decode"}}, "phase = None, this would have decode"),
    ],
)
def test_a_trace_is_resumed_with_the_same_settings_only(tmp_path, change, text):
    path = tmp_path / "t.safetensors"
    with writer(path) as first:
        first.append(sequence(), "a")
    with pytest.raises(InvalidArgumentError, match=text):
        writer(path, resume=True, **change)
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]  # not touched
    with writer(path, resume=True) as again:
        assert again.num_sequences == 1


def test_sequences_must_have_the_tensors_of_those_before(tmp_path):
    with writer(tmp_path / "t.safetensors") as w:
        w.append(sequence(10), "a")
        with pytest.raises(InvalidArgumentError, match="expected the tensors"):
            w.append(SequenceRouting(sequence(10).expert_ids), "a")


@pytest.mark.parametrize(
    ("routing", "text"),
    [
        (SequenceRouting(np.zeros((2, 5, 3), np.uint16)), r"expert_ids: expected the shape \(2, 5"),
        (SequenceRouting(np.zeros((2, 0, 2), np.uint16)), "at least one token"),
        (SequenceRouting(np.zeros((5, 2), np.uint16)), "expert_ids: expected the shape"),
        (SequenceRouting(np.zeros((2, 5, 2), np.uint16)), r"expert_ids\[0, 0, 0, 1\].*twice"),
        (SequenceRouting(np.full((2, 5, 2), 8, np.uint16)), "from 0 to 7, found uint16 from 8"),
        (SequenceRouting(sequence(5).expert_ids + np.int64(65536)), "from 0 to 7, found int64"),
        (SequenceRouting(sequence(5).expert_ids - np.int64(9)), "from 0 to 7"),
        (SequenceRouting(sequence(5).expert_ids.astype(np.float32)), "found float32"),
        (sequence(5, cache_events=np.zeros((3, 7), np.int32)), "cache_events: expected the shape"),
        (SequenceRouting(sequence(5).expert_ids, np.zeros(4, np.int32)), "token_ids: expected"),
    ],
)
def test_routing_that_cannot_be_is_not_written(tmp_path, routing, text):
    with writer(tmp_path / "t.safetensors") as w:
        with pytest.raises(InvalidArgumentError, match=text):
            w.append(routing, "a")
        w.append(sequence(), "a")
    assert Trace.open(tmp_path).num_sequences == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"top_k": 9}, "1 <= top_k <= num_experts"),
        ({"num_experts": 70000}, "65535"),
        ({"moe_layers": []}, "rising layer numbers"),
        ({"moe_layers": [3, 1]}, "rising layer numbers"),
        ({"moe_layers": ["a"]}, "must be an int"),
        ({"shard_bytes": 0}, "shard_bytes must be"),
        ({"metadata": {"a": 1}}, r"metadata\['a'\] must be a str"),
        ({"model": 3}, "model must be a str"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        writer(tmp_path / "t.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_has_a_name_that_says_what_it_is(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"t\.bin.*try .*t\.bin\.safetensors"):
        writer(tmp_path / "t.bin")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot be written"):
        writer(tmp_path / "file" / "t.safetensors")


# Files that are wrong


@pytest.fixture
def path(tmp_path):
    return random_trace(tmp_path / "t.safetensors", lengths=(10, 20))


WRONG_METADATA = [
    ({"format": "moe-lrc"}, "format = 'moerun-trace', found 'moe-lrc'"),
    ({"format": None}, "not a trace"),
    ({"version": "2"}, "expected trace version '1', found '2'.*newer"),
    ({"version": None}, "expected trace version '1', found none"),
    ({"num_experts": None}, "num_experts: expected a number from 1 to 65535, found none"),
    ({"num_experts": "0"}, "num_experts"),
    ({"num_experts": "-4"}, "num_experts"),
    ({"num_experts": "1e3"}, "num_experts"),
    ({"num_experts": "٣"}, "num_experts"),
    ({"num_experts": "9" * 40}, "num_experts"),
    ({"top_k": "7"}, "top_k: expected a number from 1 to 6, found '7'"),
    ({"moe_layers": "0,1"}, "moe_layers: expected a JSON list of numbers"),
    ({"moe_layers": "[]"}, "rising layer numbers"),
    ({"moe_layers": "[1, 0]"}, "rising layer numbers"),
    ({"moe_layers": "[true, 2]"}, "JSON list of numbers"),
    ({"moe_layers": "[0]"}, r"expert_ids: expected the shape \[2, 1, 20, 2\].*found \[2, 2, 20, 2"),
    ({"domains": '["a"]'}, r"expected the shape \[1, 2, 20, 2\]"),
    ({"domains": "{}"}, "domains: expected a JSON list of texts"),
    ({"domains": "[1, 2]"}, "domains: expected a JSON list of texts"),
    ({"domains": '["\\ud800", "b"]'}, "domains: expected a JSON list of texts"),
    ({"domains": "[" * 100000}, "domains: expected a JSON list of texts"),
]


@pytest.mark.parametrize(("metadata", "text"), WRONG_METADATA)
def test_wrong_metadata_is_named(path, metadata, text):
    with pytest.raises(FormatError, match=text) as error:
        Trace.open(spoiled(path, metadata))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"expert_ids": None}, "the tensor expert_ids is missing"),
        ({"lengths": None}, "the tensor lengths is missing"),
        ({"token_ids": None}, "the tensor token_ids is missing"),
        ({"lengths": np.array([10, 0], np.int32)}, r"lengths\[1\]: expected 1 to 20.*found 0"),
        ({"lengths": np.array([21, 1], np.int32)}, r"lengths\[0\].*found 21"),
        ({"lengths": np.array([-1, 1], np.int32)}, r"lengths\[0\].*found -1"),
        ({"lengths": np.array([1, 1], np.int64)}, "lengths: expected I32, found I64"),
        ({"lengths": np.array([1], np.int32)}, r"lengths: expected the shape \[2\]"),
        ({"expert_ids": np.zeros((2, 2, 20, 2), np.int32)}, "expected U8 or U16, found I32"),
        (
            {"expert_ids": np.zeros((2, 2, 20, 3), np.uint8)},
            r"\[2, 2, 20, 2\].*found \[2, 2, 20, 3\]",
        ),
        ({"expert_ids": np.zeros((2, 2, 0, 2), np.uint8)}, "expert_ids is empty"),
        ({"token_ids": np.zeros((2, 19), np.int32)}, r"token_ids: expected the shape \[2, 20\]"),
        ({"predicted_ids": np.zeros((2, 20, 1), np.int32)}, "predicted_ids: expected the shape"),
        ({"cache_events": np.zeros((3, 4), np.int32)}, r"cache_events: expected the shape \[3, 5"),
    ],
)
def test_wrong_tensors_are_named(path, tensors, text):
    with pytest.raises(FormatError, match=text) as error:
        Trace.open(spoiled(path, **tensors))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("index", "value", "text"),
    [
        ((0, 1, 9, 1), 6, r"expert_ids\[0, 1, 9, 1\]: expected an expert from 0 to 5, found 6"),
        ((1, 0, 3), [2, 2], r"expert_ids\[1, 0, 3, 1\]: expert 2 comes twice in a token"),
    ],
)
def test_wrong_ids_are_named_when_they_are_read(path, index, value, text):
    ids = contents(path)[0]["expert_ids"].copy()
    ids[index] = value
    trace = Trace.open(spoiled(path, expert_ids=ids))
    with pytest.raises(FormatError, match=text) as error:
        next(trace.shards()).expert_ids  # noqa: B018
    assert str(path) in str(error.value)


def test_what_pads_a_sequence_may_be_anything(path):
    ids = contents(path)[0]["expert_ids"].copy()
    ids[0, :, 10:] = 255
    next(Trace.open(spoiled(path, expert_ids=ids)).shards()).expert_ids  # noqa: B018


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"{}", b"\x08" + b"\0" * 7 + b"{}      "])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        Trace.open(file)


def test_a_truncated_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="not a safetensors file"):
        Trace.open(path)


def test_missing_shards_are_named(tmp_path):
    base = random_trace(tmp_path / "t.safetensors", shard_bytes=1)
    (tmp_path / "t-00002-of-00003.safetensors").unlink()
    for name in (base, tmp_path, tmp_path / "t-00001-of-00003.safetensors"):
        with pytest.raises(MissingFileError, match=r"missing t-00002-of-00003\.safetensors"):
            Trace.open(name)


def test_shards_of_two_sets_are_refused(tmp_path):
    base = random_trace(tmp_path / "t.safetensors", shard_bytes=1)
    (tmp_path / "t-00001-of-00003.safetensors").rename(tmp_path / "t-00001-of-00002.safetensors")
    with pytest.raises(FileError, match="several sets, of 2, 3 files"):
        Trace.open(base)


def test_shards_of_another_trace_are_refused(tmp_path):
    base = random_trace(tmp_path / "t.safetensors", shard_bytes=1)
    spoiled(tmp_path / "t-00002-of-00003.safetensors", {"model": "other"})
    with pytest.raises(FormatError, match=r"t-00002.*does not belong to.*model is other"):
        Trace.open(base)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(MissingFileError, match="there is no trace"):
        Trace.open(tmp_path / "t.safetensors")
    with pytest.raises(MissingFileError, match="holds no trace"):
        Trace.open(tmp_path)
    with pytest.raises(MissingFileError, match="there is no trace"):
        Trace.open(tmp_path / "no" / "t.safetensors")


def test_a_folder_with_two_traces_is_ambiguous(tmp_path):
    random_trace(tmp_path / "a.safetensors")
    random_trace(tmp_path / "b.safetensors", shard_bytes=1)
    with pytest.raises(FileError, match=r"several traces.*a\.safetensors, b\.safetensors"):
        Trace.open(tmp_path)


def test_a_tensor_that_is_not_there_is_named(path):
    with pytest.raises(InvalidArgumentError, match="no tensor router_logits"):
        next(Trace.open(path).shards()).tensor("router_logits")


def test_extra_metadata_is_kept_and_cannot_replace_the_traces_own(tmp_path):
    path = random_trace(
        tmp_path / "t.safetensors",
        metadata={"engine": "native", "expert_bytes": "12", "model": "x"},
    )
    trace = Trace.open(path)
    assert trace.metadata["engine"] == "native"
    assert trace.expert_bytes == 12
    assert trace.model == "random"
    assert json.loads(contents(path)[1]["moe_layers"]) == [0, 1]
    for text in ("-1", "x", "1" * 30, "٣"):
        assert Trace.open(spoiled(path, {"expert_bytes": text})).expert_bytes is None
