"""Training on routing that follows a rule, and the native net beside the PyTorch one."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from predictors import SMALL, random_predictor, ruled_trace
from traces import random_trace

from moerun.errors import InvalidArgumentError, UnsupportedModelError
from moerun.predictor import NetShape, PathPredictor, evaluate, read_info, train
from moerun.predictor.files import bf16_rounded, sequence_hash
from moerun.predictor.training import _imported, split
from moerun.trace import Trace

torch = pytest.importorskip("torch")

TINY = NetShape(embedding_size=32, hidden_size=32, mlp_size=64, num_blocks=1, num_heads=2, window=4)
QUICK = {"shape": TINY, "max_steps": 3, "threads": 1}


def probabilities(info, weights, ids):
    from moerun.predictor.net import PathNet

    net = PathNet(info.shape, info.vocab_size, info.num_outputs)
    net.load({k: bf16_rounded(v) if v.ndim == 2 else v for k, v in weights.items()})
    net.eval()
    with torch.no_grad():
        logits = net(torch.from_numpy(np.asarray(ids))[None])[0]
    return torch.sigmoid(logits).numpy().reshape(len(ids), len(info.moe_layers), info.num_experts)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        NetShape(128, 256, 1024, 2, 8, 64),
        NetShape(32, 96, 32, 3, 1, 1),
        NetShape(64, 32, 160, 1, 4, 300),
    ],
)
def test_the_native_net_computes_what_the_torch_one_does(tmp_path, shape):
    file = tmp_path / "p.safetensors"
    info, weights = random_predictor(file, shape, vocab_size=90, layers=3, experts=7)
    ids = np.random.default_rng(5).integers(90, size=400)
    expected = probabilities(info, weights, ids)
    for kernels in "auto", "portable":
        found = PathPredictor.open(file, cpu_kernels=kernels).predict(ids)
        assert np.abs(found - expected).max() <= 1e-5


def test_a_rule_is_learned_and_the_trained_net_is_the_same_in_cpp(tmp_path):
    trace = ruled_trace(tmp_path / "t.safetensors", ("a",) * 30, vocab_size=20)
    seen = []
    shape = NetShape(64, 64, 128, 1, 2, 4)
    result = train(
        trace,
        tmp_path / "p.safetensors",
        shape=shape,
        max_steps=80,
        epochs=1000,
        learning_rate=1e-2,
        patience=1000,
        threads=1,
        progress=seen.append,
    )
    training = result.info.training
    assert training["recall"] > 0.8  # without the token before, half
    assert training["sequences"] + training["held_out_sequences"] == 30
    assert seen[-1].step == seen[-1].steps == 80
    assert seen[-1].recall == pytest.approx(training["recall"], abs=1e-5)
    assert seen[0].validation_loss is None
    info = read_info(result.path)
    assert info.training == training
    assert info.model == "tiny-olmoe"
    assert len(info.trained_sequences) == training["sequences"]

    # What is held out is what an evaluation measures; its recall is the same by another way.
    found = evaluate(result.path, trace, batch_sizes=(1, 2))
    assert found.num_sequences == training["held_out_sequences"]
    assert found.num_skipped == training["sequences"]
    whole = found.recall.row(by_predicate=_is(found, 1, "path"), named=True)
    assert whole["recall"] == pytest.approx(training["recall"], abs=0.03)  # without first tokens
    assert whole["recall"] > found.recall.row(by_predicate=_is(found, 1, "previous_token"))[4]

    shard = next(Trace.open(trace).shards())
    ids = shard.tensor("token_ids")[0]
    from safetensors.torch import load_file

    weights = {name: each.float().numpy() for name, each in load_file(result.path).items()}
    del weights["trained_sequences"]
    expected = probabilities(info, weights, ids.astype(np.int64))
    assert np.abs(PathPredictor.open(result.path).predict(ids) - expected).max() <= 1e-5


def _is(found, size, predictor):
    import polars as pl

    assert found.recall.columns[4] == "recall"
    return (
        (pl.col("batch_size") == size)
        & pl.col("domain").is_null()
        & pl.col("layer").is_null()
        & (pl.col("predictor") == predictor)
    )


def test_a_seed_makes_the_same_bytes_and_leaves_torch_as_it_was(tmp_path):
    trace = ruled_trace(tmp_path / "t.safetensors")
    before = torch.get_num_threads(), torch.random.get_rng_state()
    files = []
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        torch.rand(3)
        train(trace, tmp_path / f"{name}.safetensors", seed=seed, **QUICK)
        files.append((tmp_path / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    assert torch.get_num_threads() == before[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_ends_when_the_held_out_sequences_get_no_better(tmp_path):
    random = np.random.default_rng(0)
    domains = ("a",) * 12
    trace = ruled_trace(tmp_path / "t.safetensors", domains, tokens=16)
    # Nothing to learn: the tokens say nothing about the experts.
    opened = Trace.open(trace)
    ids = next(opened.shards()).tensor("token_ids")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(trace)
    tensors["token_ids"] = random.permutation(ids.ravel()).reshape(ids.shape)
    import safetensors

    with safetensors.safe_open(str(trace), "np") as file:
        metadata = file.metadata()
    save_file(tensors, trace, metadata)
    result = train(
        trace,
        tmp_path / "p.safetensors",
        shape=TINY,
        epochs=500,
        patience=2,
        learning_rate=0.05,
        threads=1,
    )
    assert result.stopped_early
    assert result.info.training["epochs"] < 500


def test_domains_are_left_out_and_remembered(tmp_path):
    trace = ruled_trace(tmp_path / "t.safetensors", ("a",) * 5 + ("b",) * 4)
    result = train(trace, tmp_path / "p.safetensors", domains=["a"], **QUICK)
    assert result.info.training["domains"] == ["a"]
    assert result.info.training["sequences"] == 4
    found = evaluate(result.path, trace, batch_sizes=(1,))
    assert found.domains == {"a": 1, "b": 4}
    assert found.trained_domains == ["a"]


def test_what_cannot_be_trained_is_refused_before_work(tmp_path):
    out = tmp_path / "p.safetensors"
    trace = ruled_trace(tmp_path / "t.safetensors")
    foreign = random_trace(tmp_path / "f.safetensors")
    one = ruled_trace(tmp_path / "one.safetensors", ("a",))
    beyond = ruled_trace(tmp_path / "b.safetensors", vocab_size=5000)
    for arguments, what in (
        ({"traces": []}, "at least one trace"),
        ({"traces": foreign}, "2 of 6 experts in 2 layers.*expected 4 of 32"),
        ({"traces": [trace, foreign]}, "different models"),
        ({"traces": one}, "at least two different sequences"),
        ({"traces": [one, one]}, "at least two different sequences"),
        ({"domains": ["x"]}, "expected some of a, found 'x'"),
        ({"held_out": 0}, "held_out"),
        ({"epochs": 0}, "epochs"),
        ({"max_steps": 0}, "max_steps"),
        ({"seed": -1}, "seed"),
        ({"shape": 3}, "NetShape"),
        ({"threads": 0}, "threads"),
    ):
        with pytest.raises(InvalidArgumentError, match=what):
            train(arguments.pop("traces", trace), out, **{**QUICK, **arguments})
    with pytest.raises(ValueError, match=r"token_ids\[0, \d+\].*from 0 to 4095"):
        train(beyond, out, **QUICK)
    assert not out.exists()


def test_held_out_sequences_are_a_share_of_every_domain_and_none_was_learned():
    class Sequence:
        def __init__(self, domain, number):
            self.domain, self.hash = domain, sequence_hash(np.array([number], np.int32))

    sequences = [Sequence("a", n) for n in range(20)] + [Sequence("b", n % 5) for n in range(10)]
    learned, checked = split(sequences, 0.2, 0)
    assert sum(each.domain == "a" for each in checked) <= 4
    assert sum(each.domain == "a" for each in learned) == 16
    assert not {each.hash for each in learned} & {each.hash for each in checked}


def test_without_torch_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "moerun.predictor.optimizer", raising=False)
    monkeypatch.delitem(sys.modules, "moerun.predictor.net", raising=False)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'moerun\[predictor\]'"):
        _imported()


def test_an_exception_in_progress_leaves_the_file_that_was_there(tmp_path):
    trace = ruled_trace(tmp_path / "t.safetensors")
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"before")

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trace, out, progress=stop, **QUICK)
    assert out.read_bytes() == b"before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.safetensors", "t.safetensors"]


def test_ctrl_c_leaves_nothing(tmp_path):
    trace = ruled_trace(tmp_path / "t.safetensors", ("a",) * 40, tokens=256)
    out = tmp_path / "p.safetensors"
    arguments = ["train", trace, "-o", out, "--epochs", "10000", "--threads", "1", "--hidden", "32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moerun_tools.predictor", *map(str, arguments)],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stderr.read(1)  # of the progress bar, which comes after some seconds
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"Traceback" not in error
    assert [each.name for each in tmp_path.iterdir()] == ["t.safetensors"]
