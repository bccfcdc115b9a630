"""moe-predictor as a user runs it."""

import json

import pytest
from click.testing import CliRunner
from predictors import random_predictor, ruled_trace

from moerun.identity import ModelIdentity
from moerun_tools.predictor import main


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def failed(done, *expected, code=1):
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    for text in expected:
        assert text in done.output


@pytest.fixture
def trace(tmp_path):
    return ruled_trace(tmp_path / "t.safetensors", ("python", "english") * 3)


@pytest.fixture
def predictor(tmp_path, default_path):
    facts = ModelIdentity(default_path)
    path = tmp_path / "p.safetensors"
    random_predictor(
        path,
        vocab_size=4096,
        layers=8,
        experts=32,
        top_k=4,
        model="tiny-olmoe",
        model_id=facts.model_id,
        tokenizer_hash=facts.tokenizer_hash,
        training={"domains": ["python"], "tokens": 1234, "recall": 0.875, "seed": 3},
    )
    return path


def test_help_shows_groups_and_examples():
    for command in "train", "eval", "info":
        done = run(command, "--help")
        assert done.exit_code == 0
        assert "Examples:" in done.output
        assert f"moe-predictor {command}" in done.output
        assert "Output:" in done.output
    assert "Exit codes" in run("--help").output


def test_info(predictor):
    done = run("info", predictor)
    assert done.exit_code == 0, done.output
    assert "4 of 32 a token, in 8 layers (0-7), 4,096 token ids" in done.output
    assert "2 blocks of 64" in done.output
    assert "1,234 tokens of python, seed 3" in done.output
    assert "recall 87.5 %" in done.output
    facts = json.loads(run("info", "--json", predictor).output)
    assert facts["training"]["recall"] == 0.875
    assert facts["state_bytes"] == 2 * 2 * 6 * 64 * 4
    assert facts["shape"]["window"] == 6


def test_info_checks_the_model(predictor, model_copy):
    assert run("info", predictor, "-m", model_copy).exit_code == 0
    (model_copy / "tokenizer.json").unlink()
    failed(run("info", predictor, "-m", model_copy), "moe-predictor train")
    data = predictor.read_bytes()
    predictor.write_bytes(data[:-1])
    failed(run("info", predictor), "cut off")
    failed(run("info", predictor.with_name("none")), "no such file")


def test_eval(predictor, trace, tmp_path):
    picture = tmp_path / "c.svg"
    done = run("eval", predictor, trace, "--batch", 1, "--batch", 2, "--batch", 99, "-o", picture)
    assert done.exit_code == 0, done.output
    assert "6 sequences, 378 tokens" in done.output
    assert "english (not trained on)" in done.output
    assert "prev. token" in done.output
    assert "skipped: batch 99 (only 6 sequences)" in done.output
    assert picture.read_text().startswith("<?xml")
    facts = json.loads(run("eval", predictor, trace, "--json", "-q").output)
    assert {row["batch_size"] for row in facts["recall"]} == {1, 4}
    assert {each["name"]: each["in_domain"] for each in facts["domains"]} == {
        "python": True,
        "english": False,
    }
    assert len(facts["calibration"]) == 20
    assert facts["num_skipped"] == 0


def test_eval_refuses_wrong_usage(predictor, trace, tmp_path):
    failed(run("eval", predictor, trace, "-o", tmp_path / "c.pdf"), ".png and .svg", code=2)
    failed(run("eval", predictor, code_of := tmp_path / "no.safetensors"), str(code_of.name))
    failed(run("eval", predictor), "TRACE", code=2)
    failed(run("eval", trace, trace), "expected 'moerun-predictor'", "moe-predictor train")
    link = tmp_path / "link.png"
    link.symlink_to(trace)
    failed(run("eval", predictor, trace, "-o", link), "reads from it")


def test_train(trace, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "p.safetensors"
    quick = ("--hidden", 32, "--mlp", 64, "--window", 4, "--blocks", 1, "--embedding", 32)
    quick += ("--max-steps", 2, "--threads", 1, "--seed", 5, "--domain", "python")
    done = run("train", trace, "-o", out, *quick)
    assert done.exit_code == 0, done.output
    assert "parameters on 128 tokens" in done.output
    assert str(out) in done.output
    again = tmp_path / "q.safetensors"
    facts = json.loads(run("train", trace, "-o", again, "--json", "-q", *quick).output)
    assert facts["training"]["domains"] == ["python"]
    assert facts["training"]["steps"] == 2
    assert facts["shape"]["num_heads"] == 1
    assert out.read_bytes() == again.read_bytes()
    assert run("train", trace, "-o", again, "-q", *quick).output == ""


def test_train_refuses_wrong_usage_before_the_work(trace, tmp_path):
    out = tmp_path / "p.safetensors"
    failed(run("train", trace), "--output", code=2)
    failed(run("train", trace, "-o", ""), "not empty", code=2)
    failed(run("train", "-o", out), "TRACE", code=2)
    failed(run("train", trace, "-o", out, "--held-out", 0), "held-out", code=2)
    failed(run("train", trace, "-o", trace), "reads from it")
    failed(run("train", trace, "-o", tmp_path / "no" / "p"), "there is no folder")
    failed(run("train", trace, "-o", out, "--hidden", 40), "multiple of 32")
    failed(run("train", trace, "-o", out, "--heads", 7), "num_heads")
    assert not out.exists()
