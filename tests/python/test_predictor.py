"""Predictors as files and in use; nothing here needs PyTorch."""

import json
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from predictors import SMALL, random_predictor

import moerun
from moerun.errors import FileError, FormatError, InvalidArgumentError, MissingFileError
from moerun.identity import ModelIdentity
from moerun.predictor import NetShape, PathPredictor, default_shape, read_info
from moerun.predictor.files import (
    bf16_bits,
    bf16_rounded,
    sequence_hash,
    write_predictor,
)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "p.safetensors"
    random_predictor(file)
    return file


def some_ids(count, vocab_size=50, seed=1):
    return np.random.default_rng(seed).integers(vocab_size, size=count)


def test_a_file_says_what_it_is_of(tmp_path):
    file = tmp_path / "p.safetensors"
    trained = np.array([5, -3, 2**62], np.int64)
    written, _ = random_predictor(file, training={"seed": 7}, trained_sequences=trained)
    info = read_info(file)
    assert info.trained_sequences.tolist() == [-3, 5, 2**62]
    for name in ("model", "vocab_size", "moe_layers", "num_experts", "top_k", "shape", "training"):
        assert getattr(info, name) == getattr(written, name)
    opened = PathPredictor.open(file)
    assert opened.info.training == {"seed": 7}
    assert "random" in repr(opened)
    weights = SMALL.tensors(info.vocab_size, info.num_outputs)
    assert info.num_parameters == sum(int(np.prod(shape)) for shape in weights.values())
    assert opened.memory_bytes > 2 * info.num_parameters


def test_the_same_weights_are_the_same_bytes(tmp_path):
    """In other processes, too, where hashes of texts differ."""
    files = []
    for seed in "1", "2":
        file = tmp_path / f"{seed}.safetensors"
        code = f"from predictors import random_predictor; random_predictor({str(file)!r})"
        paths = [*sys.path]
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}; {code}"],
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        files.append(file.read_bytes())
    assert files[0] == files[1]


def test_bf16_rounds_to_the_nearest_and_ties_to_even():
    values = np.array([1.0, 1 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, -3.0, 0.0], np.float32)
    assert bf16_rounded(values).tolist() == [1.0, 1.0, 1.0, 1 + 4 * 2**-8, -3.0, 0.0]
    assert bf16_bits(values).dtype == np.uint16


def test_probabilities_do_not_depend_on_how_tokens_are_grouped(path):
    predictor = PathPredictor.open(path, threads=2)
    ids = some_ids(200)
    whole = predictor.predict(ids)
    assert whole.shape == (200, 2, 6)
    assert whole.dtype == np.float32
    assert ((whole > 0) & (whole < 1)).all()
    assert np.array_equal(PathPredictor.open(path, threads=1).predict(ids.tolist()), whole)
    one, other = predictor.state(), predictor.state()
    assert one.bytes == other.bytes > 0
    for t in range(50):
        both = predictor.advance([one, other], [[ids[t]], ids[2 * t : 2 * t + 2]])
        assert np.array_equal(both[0], whole[t])
        assert np.array_equal(both[1], whole[2 * t + 1])
    assert (one.num_tokens, other.num_tokens) == (50, 100)
    one.clear()
    assert np.array_equal(predictor.advance([one], [ids[:9]])[0], whole[8])


def test_a_token_sees_the_tokens_before_it_and_none_after(path):
    predictor = PathPredictor.open(path)
    ids = some_ids(40)
    changed = ids.copy()
    changed[20] = (changed[20] + 1) % 50
    before, after = predictor.predict(ids), predictor.predict(changed)
    assert np.array_equal(before[:20], after[:20])
    reach = 20 + SMALL.num_blocks * (SMALL.window - 1)  # of blocks that look at the last few tokens
    assert all((before[t] != after[t]).any() for t in range(20, reach + 1))
    # Nothing older is seen; the tokens' places are not the same, though, as nothing is rounded off.
    assert np.abs(before[reach + 1 :] - after[reach + 1 :]).max() == 0


def test_threads_of_python_take_turns(path):
    predictor = PathPredictor.open(path)
    expected = [predictor.predict(some_ids(300, seed=seed)) for seed in range(4)]
    found = [None] * 4

    def work(seed):
        found[seed] = predictor.predict(some_ids(300, seed=seed))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_keeps_its_predictor(path):
    state = PathPredictor.open(path).state()
    assert state.num_tokens == 0
    state.clear()


def test_wrong_arguments_are_refused(path):
    predictor = PathPredictor.open(path)
    state = predictor.state()
    for ids, what in ([], "empty"), ([50], "outside the vocabulary"), ("text", "not text"):
        with pytest.raises(InvalidArgumentError, match=what):
            predictor.predict(ids)
        with pytest.raises(InvalidArgumentError, match=what):
            predictor.advance([state], [ids])
    with pytest.raises(InvalidArgumentError, match="once"):
        predictor.advance([state, state], [[1], [2]])
    with pytest.raises(InvalidArgumentError, match="each of 1 states, found 2"):
        predictor.advance([state], [[1], [2]])
    with pytest.raises(InvalidArgumentError, match="states of this predictor"):
        predictor.advance([PathPredictor.open(path).state()], [[1]])
    with pytest.raises(InvalidArgumentError, match="threads"):
        PathPredictor.open(path, threads=0)
    assert state.num_tokens == 0


def test_a_predictor_of_another_model_or_tokenizer_is_refused(tmp_path, default_path, model_copy):
    facts = ModelIdentity(default_path)
    own = {"model_id": facts.model_id, "tokenizer_hash": facts.tokenizer_hash}
    sizes = {"vocab_size": 4096, "layers": 8, "experts": 32, "top_k": 4}
    file = tmp_path / "p.safetensors"
    random_predictor(file, **sizes, **own)
    assert PathPredictor.open(file, default_path).info.num_experts == 32
    assert PathPredictor.open(file, model_copy).info.model_id == facts.model_id
    tokenizer = model_copy / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    with pytest.raises(FormatError, match=r"tokenizer_hash is .*moe-predictor train"):
        PathPredictor.open(file, model_copy)
    tokenizer.unlink()
    assert ModelIdentity(model_copy).tokenizer_hash == "0" * 64
    random_predictor(file, **sizes, **{**own, "model_id": "f" * 16})
    with pytest.raises(FormatError, match=r"model_id is f+, expected .*moe-predictor train"):
        PathPredictor.open(file, default_path)
    random_predictor(file, **{**sizes, "experts": 16}, **own)
    with pytest.raises(FormatError, match="num_experts is 16, expected 32"):
        PathPredictor.open(file, default_path)


def spoilt(data, change):
    """The bytes of a file after a change of its header (a dict)."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_damaged_files_are_refused(tmp_path, path):
    data = path.read_bytes()
    bad = tmp_path / "bad.safetensors"

    def refused(content, what="."):
        bad.write_bytes(content)
        with pytest.raises(FormatError, match=what) as raised:
            PathPredictor.open(bad)
        assert "bad.safetensors" in str(raised.value)

    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        refused(data[:size])
    refused(data + b"x")
    metadata = "__metadata__"
    refused(spoilt(data, lambda h: h[metadata].update(format="pt")), "format")
    refused(spoilt(data, lambda h: h[metadata].update(window="9" * 30)), "window")
    refused(spoilt(data, lambda h: h[metadata].update(training="[]")), "training")
    refused(spoilt(data, lambda h: h[metadata].update(training="[" * 100_000)), "training")
    refused(spoilt(data, lambda h: h[metadata].update(moe_layers="[0, 5000000]")), "moe_layers")
    refused(spoilt(data, lambda h: h["head.weight"].update(dtype="F16")), "found F16")
    refused(spoilt(data, lambda h: h["head.weight"].update(shape=[64, 12])), "found shape")
    refused(spoilt(data, lambda h: h.update(x=h.pop("head.bias"))), "'head.bias'.*missing")
    with pytest.raises(MissingFileError, match="none"):
        PathPredictor.open(tmp_path / "none.safetensors")
    with pytest.raises(FileError):
        PathPredictor.open(tmp_path)
    with pytest.raises(FileError):
        read_info(tmp_path)
    with pytest.raises(MissingFileError, match="moe-predictor train"):
        read_info(tmp_path / "none.safetensors")


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    file = tmp_path / "p.safetensors"
    info, weights = random_predictor(file)
    for name in "embedding.weight", "head.bias":
        for wrong in np.nan, np.inf, -np.inf:
            broken = {**weights, name: weights[name].copy()}
            broken[name].flat[4] = wrong
            write_predictor(file, info, broken)
            with pytest.raises(FormatError, match=f"{name}.*entry 4.*not a finite number"):
                PathPredictor.open(file)


def test_shapes():
    large = default_shape(50304, 16 * 64)
    assert large.embedding_size == 32
    assert 3_000_000 < large.num_parameters(50304, 16 * 64) < 5_000_000
    assert default_shape(1_000_000, 1024).embedding_size == 32
    assert default_shape(4096, 8 * 32) == NetShape(128, 128, 512, 3, 4, 64)
    narrow = default_shape(4096, 256, hidden_size=64, window=9)
    assert (narrow.mlp_size, narrow.num_heads, narrow.window) == (256, 2, 9)
    for wrong in ({"hidden_size": 48}, {"num_heads": 5}, {"window": 0}, {"num_blocks": 2.0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            NetShape(**wrong)


def test_sequences_are_told_apart_by_their_tokens():
    ids = np.arange(10, dtype=np.int32)
    assert sequence_hash(ids) == sequence_hash(ids[::1].copy())
    assert sequence_hash(ids) != sequence_hash(ids[:9])
    assert -(2**63) <= sequence_hash(ids) < 2**63


def test_importing_it_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import moerun; moerun.predictor.PathPredictor; "
        "assert 'torch' not in {name for name, each in sys.modules.items() if each}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert moerun.predictor is sys.modules["moerun.predictor"]
