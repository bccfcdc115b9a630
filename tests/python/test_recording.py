"""Recording: what is in the trace, and that it survives interruption and failure."""

import json
import signal
import weakref

import numpy as np
import pytest

from moerun import Model, Trace
from moerun.errors import FileError, InvalidArgumentError, MissingFileError
from moerun.recording import (
    NativeEngine,
    RandomTokens,
    RecordingInterrupted,
    TextData,
    TraceOptions,
    check_output,
    record,
)
from moerun.recording.engine import Stack
from moerun.recording.interrupts import interrupts_delayed
from moerun.trace import SequenceRouting

TEXTS = [
    TextData("code", ["def main():\n    return 0\n" * 40]),
    TextData("words", ["a b c " * 200]),
]
TENSORS = ("token_ids", "predicted_ids")


@pytest.fixture(scope="module")
def engine(model):
    return NativeEngine(model, "tiny-olmoe")


class TwoStacks:
    """An engine with encoder and decoder; the experts of a token are its id and the next."""

    name = "transformers"
    model_name = "two"
    vocab_size = 50
    separator = None
    settings: dict = {}  # noqa: RUF012
    stacks = (Stack("encoder", 50, 2, (1, 3), 100), Stack("decoder", 50, 2, (0,), 200))

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.seeds = []

    def check_length(self, tokens):
        pass

    def encode(self, text):
        return [ord(character) % 50 for character in text]

    def trace(self, token_ids, options, seed):
        if len(self.seeds) == self.fails_at:
            raise MemoryError
        self.seeds.append(seed)
        ids = np.stack([token_ids, (token_ids + 1) % 50], axis=-1).astype(np.uint16)
        return [
            SequenceRouting(np.stack([ids] * len(stack.moe_layers)), token_ids=token_ids)
            for stack in self.stacks
        ]

    def notes(self):
        return []


def contents(path):
    trace = Trace.open(path)
    arrays = {
        name: np.concatenate([shard.tensor(name) for shard in trace.shards()])
        for name in ("expert_ids", *sorted(trace.tensors & set(TENSORS)))
    }
    return trace, arrays


def assert_same_trace(path, other):
    (one, arrays), (two, others) = contents(path), contents(other)
    assert one.domains == two.domains
    assert one.metadata == two.metadata
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, others[name]), name


def interrupting(after):
    """A progress function that Ctrl-C meets after so many calls."""
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    return progress


def test_the_trace_holds_what_the_model_did_with_each_sequence(tmp_path, engine, model):
    path = tmp_path / "t.safetensors"
    summary = record(engine, TEXTS, path, length=32, samples=3)
    trace, arrays = contents(path)
    assert trace.domains == ["code"] * 3 + ["words"] * 3
    assert summary.domains == {"code": 3, "words": 3}
    assert summary.files == {None: [path]}
    assert (summary.num_sequences, summary.num_new_sequences, summary.num_new_tokens) == (6, 6, 192)
    for index, token_ids in enumerate(arrays["token_ids"]):
        routing = model.trace(token_ids, with_predictions=True)
        assert np.array_equal(arrays["expert_ids"][index], routing.expert_ids)
        assert np.array_equal(arrays["predicted_ids"][index], routing.predicted_ids)
    text = engine.encode("def main():\n    return 0\n" * 40)
    assert arrays["token_ids"][:3].ravel().tolist() == text[:96]


def test_the_metadata_say_how_it_was_recorded(tmp_path, engine):
    path = tmp_path / "t.safetensors"
    record(engine, TEXTS, path, length=16, samples=1, seed=5)
    trace = Trace.open(path)
    assert trace.model == "tiny-olmoe"
    assert trace.metadata["engine"] == "native"
    assert trace.metadata["phase"] == "prefill"
    assert trace.metadata["created_by"].startswith("moerun ")
    assert "stack" not in trace.metadata
    assert trace.expert_bytes == 3 * 128 * 96 * 2  # three bfloat16 matrices
    recording = json.loads(trace.metadata["recording"])
    assert (recording["length"], recording["samples"], recording["seed"]) == (16, 1, 5)
    assert set(recording["data"]) == {"code", "words"}


def test_decoded_tokens_are_recorded_and_their_prompt_is_not(tmp_path, engine, model):
    path = tmp_path / "t.safetensors"
    record(engine, TEXTS, path, length=16, samples=2, options=TraceOptions(generate=5))
    trace, arrays = contents(path)
    assert trace.metadata["phase"] == "decode"
    assert trace.lengths.tolist() == [5] * 4
    prompt = engine.encode("def main():\n    return 0\n" * 40)[:16]
    routing = model.trace(prompt, generate=5)
    assert np.array_equal(arrays["token_ids"][0], routing.token_ids)
    assert np.array_equal(arrays["expert_ids"][0], routing.expert_ids)


def test_sampling_has_another_seed_for_every_sequence_and_the_same_for_every_run(tmp_path, engine):
    options = TraceOptions(generate=8, temperature=1.0)
    same = TextData("same", ["x"] * 100)
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        record(engine, [same], path, length=2, samples=3, seed=7, options=options)
    assert_same_trace(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    _, arrays = contents(tmp_path / "a.safetensors")
    assert len(np.unique(arrays["token_ids"], axis=0)) > 1


@pytest.mark.parametrize("after", [1, 2, 4, 6])
@pytest.mark.parametrize("shard_bytes", [1, 2**28])
def test_an_interrupted_recording_is_valid_and_resumed_gives_the_same_trace(
    tmp_path, engine, after, shard_bytes
):
    options = {"length": 16, "samples": 3, "shard_bytes": shard_bytes}
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    record(engine, TEXTS, whole, **options)
    with pytest.raises(RecordingInterrupted) as caught:
        record(engine, TEXTS, cut, progress=interrupting(after), **options)
    done = caught.value.summary.num_new_sequences
    assert done == after - 1
    if done:
        assert Trace.open(cut).num_sequences == done == caught.value.summary.num_sequences
        assert caught.value.summary.files[None]
    else:
        assert not list(tmp_path.glob("cut*"))
    summary = record(engine, TEXTS, cut, resume=True, **options)
    assert summary.num_sequences == 6
    assert summary.num_new_sequences == 6 - done
    assert_same_trace(whole, cut)


def test_resuming_what_is_complete_adds_nothing(tmp_path, engine):
    path = tmp_path / "t.safetensors"
    record(engine, TEXTS, path, length=16, samples=2)
    before = path.read_bytes()
    summary = record(engine, TEXTS, path, length=16, samples=2, resume=True)
    assert (summary.num_sequences, summary.num_new_sequences) == (4, 0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["length", "samples", "seed", "data", "options"])
def test_resuming_with_other_settings_is_refused_and_harms_nothing(tmp_path, engine, change):
    path = tmp_path / "t.safetensors"
    settings = {"length": 16, "samples": 2, "seed": 0, "options": TraceOptions()}
    record(engine, TEXTS, path, **settings)
    before = Trace.open(path).num_sequences
    data = TEXTS
    if change == "data":
        data = [TEXTS[0], TextData("words", ["other words " * 100])]
    elif change == "options":
        settings["options"] = TraceOptions(with_weights=True)
    else:
        settings[change] += 1
    with pytest.raises(InvalidArgumentError, match="cannot be resumed: it was recorded with"):
        record(engine, data, path, resume=True, **settings)
    assert Trace.open(path).num_sequences == before


def test_progress_begins_where_a_resumed_recording_does_and_ends_at_the_total(tmp_path, engine):
    path = tmp_path / "t.safetensors"
    short = TextData("short", ["x"] * 9)
    with pytest.raises(RecordingInterrupted):
        record(engine, [short], path, length=4, samples=9, progress=interrupting(3))
    calls = []
    record(
        engine,
        [short],
        path,
        length=4,
        samples=9,
        resume=True,
        progress=lambda *call: calls.append(call),
    )
    assert calls[0] == (8, 36)
    assert [done for done, _ in calls[1:]] == [12, 16]


def test_an_encoder_and_a_decoder_become_two_traces(tmp_path):
    path = tmp_path / "t.safetensors"
    summary = record(TwoStacks(), TEXTS, path, length=8, samples=2)
    assert not path.exists()
    for name, layers in (("encoder", [1, 3]), ("decoder", [0])):
        trace = Trace.open(tmp_path / f"t-{name}.safetensors")
        assert trace.moe_layers == layers
        assert trace.metadata["stack"] == name
        assert trace.num_sequences == 4
        assert summary.files[name] == trace.files


def test_two_traces_of_different_length_are_resumed_to_the_same(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    record(TwoStacks(), TEXTS, whole, length=8, samples=3)
    with pytest.raises(RecordingInterrupted):
        record(TwoStacks(), TEXTS, cut, length=8, samples=3, progress=interrupting(4))
    (tmp_path / "cut-decoder.safetensors").unlink()  # as if it had never come to that
    engine = TwoStacks()
    record(engine, TEXTS, cut, length=8, samples=3, resume=True)
    assert engine.seeds == list(range(6))
    for name in ("encoder", "decoder"):
        assert_same_trace(
            tmp_path / f"whole-{name}.safetensors", tmp_path / f"cut-{name}.safetensors"
        )


def test_what_was_recorded_before_a_failure_stays(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(MemoryError):
        record(TwoStacks(fails_at=3), TEXTS, path, length=8, samples=3)
    assert Trace.open(tmp_path / "t-encoder.safetensors").num_sequences == 3
    assert record(TwoStacks(), TEXTS, path, length=8, samples=3, resume=True).num_sequences == 6


def test_a_domain_that_is_too_short_is_found_before_anything_is_written(tmp_path, engine):
    sources = [TEXTS[0], TextData("tiny", ["x"])]
    with pytest.raises(InvalidArgumentError, match="'tiny' has only 2 tokens"):
        record(engine, sources, tmp_path / "t.safetensors", length=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be from 1 to"),
        ({"samples": 0}, "samples must be from 1 to"),
        ({"options": TraceOptions(generate=-1)}, "generate must be from 0 to"),
        ({"length": 10**21}, "length must be from 1 to"),
        ({"samples": 10**21}, "samples must be from 1 to"),
        ({"options": TraceOptions(generate=10**21)}, "generate must be from 0 to"),
        ({"options": TraceOptions(generate=2, temperature=-1)}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, engine, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        record(engine, TEXTS, tmp_path / "t.safetensors", **options)


def test_domains_have_names_of_their_own(tmp_path, engine):
    with pytest.raises(InvalidArgumentError, match="name of its own"):
        record(engine, [RandomTokens(), RandomTokens(1)], tmp_path / "t.safetensors")
    with pytest.raises(InvalidArgumentError, match="no data"):
        record(engine, [], tmp_path / "t.safetensors")


def test_a_name_that_cannot_be_written_is_refused_early(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"t\.bin\.safetensors"):
        check_output(tmp_path / "t.bin")
    with pytest.raises(MissingFileError, match="no directory"):
        check_output(tmp_path / "gone" / "t.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(FileError, match="is a directory"):
        check_output(tmp_path / "d.safetensors")
    (tmp_path / "t-decoder.safetensors").touch()
    with pytest.raises(FileError, match=r"t-decoder\.safetensors exists already"):
        check_output(tmp_path / "t.safetensors")
    check_output(tmp_path / "t.safetensors", resume=True)


def test_memory_does_not_grow_with_the_number_of_sequences(tmp_path, monkeypatch):
    """Sequences wait for their file and are forgotten then."""
    alive = []
    engine = TwoStacks()
    traced = engine.trace

    def trace(*args):
        routings = traced(*args)
        alive.append(sum(reference() is not None for reference in references))
        references.extend(weakref.ref(routing.expert_ids) for routing in routings)
        return routings

    references = []
    monkeypatch.setattr(engine, "trace", trace)
    record(
        engine,
        [RandomTokens()],
        tmp_path / "t.safetensors",
        length=64,
        samples=60,
        shard_bytes=2000,
    )
    assert max(alive) <= 12  # two traces, and at most a few sequences to a file of 2 kB


def test_ctrl_c_waits_until_a_file_is_written():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_delayed():
            signal.raise_signal(signal.SIGINT)
            steps.append("written")
        steps.append("too far")
    assert steps == ["written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_native_engine_tells_what_to_do_without_a_tokenizer(tmp_path, model_copy):
    (model_copy / "tokenizer.json").unlink()
    with Model.load(model_copy, device="cpu") as model:
        engine = NativeEngine(model, "bare")
        with pytest.raises(MissingFileError, match=r"NAME=FILE\.npy.*--random-tokens"):
            record(engine, TEXTS, tmp_path / "t.safetensors")
        summary = record(engine, [RandomTokens()], tmp_path / "t.safetensors", length=8, samples=2)
        assert summary.num_sequences == 2


def test_the_experts_do_not_depend_on_the_budget(tmp_path, default_path, engine):
    with Model.load(default_path, device="cpu", expert_budget="30%", threads=1) as model:
        small = NativeEngine(model, "tiny-olmoe")
        record(small, TEXTS, tmp_path / "small.safetensors", length=32, samples=2)
    record(engine, TEXTS, tmp_path / "all.safetensors", length=32, samples=2)
    assert_same_trace(tmp_path / "small.safetensors", tmp_path / "all.safetensors")


def test_a_sequence_that_is_too_long_is_refused_before_any_is_made(tmp_path, engine):
    options = {"length": 2**31 - 1, "samples": 1}
    with pytest.raises(InvalidArgumentError, match="2147483647 tokens is longer than"):
        record(engine, [RandomTokens()], tmp_path / "t.safetensors", **options)
    assert list(tmp_path.iterdir()) == []
