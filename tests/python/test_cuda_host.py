"""The CUDA backend from Python, on the host: a module that is built with MOERUN_CUDA_HOST.

It runs in processes of its own, for this one has the module without it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import reference
from card.build import ROOT, link_package

import moerun

CASE_OF = {case.name: case for case in reference.CASES}

# Tokens that go through one by one are computed in float32. Those of a prompt are rounded to bf16
# where the weights are; a choice of experts that is nearly a tie may then go the other way, so
# these models have none.
MAX_ERROR = {"f32": 1e-5, "bf16": 1e-2}
PROMPT = "import os"


@pytest.fixture(scope="session")
def python_path(cpp_build, tmp_path_factory):
    return link_package(cpp_build, tmp_path_factory.mktemp("cuda-host") / "packages")


@pytest.fixture(scope="session")
def run_python(python_path):
    """Runs Python with that module; returns the finished process."""

    def run(*arguments, timeout=120):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": str(python_path), "HF_HUB_OFFLINE": "1"},
        )

    return run


@pytest.fixture(scope="session")
def evaluate(run_python):
    """Runs a script that prints one JSON value last, and returns that."""

    def run(script, *arguments, **options):
        done = run_python("-c", script, *arguments, **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


FORWARD = """
import json, sys
import numpy as np
import moerun

directory, output, chunk, *ids = sys.argv[1:]
with moerun.Model.load(directory, device="cuda-host", prefill_chunk=int(chunk)) as model:
    np.save(output, model.forward(list(map(int, ids))))
print(json.dumps(True))
"""


@pytest.mark.parametrize(
    ("name", "dtype", "chunk", "num_tokens"),
    [
        ("olmoe", "f32", 1, 5),
        ("qwen2_moe", "f32", 1, 5),
        ("phimoe", "f32", 8, 16),
        ("olmoe", "bf16", 512, 20),
        ("qwen3_moe", "bf16", 512, 12),
    ],
)
def test_logits_are_those_of_transformers(evaluate, tmp_path, name, dtype, chunk, num_tokens):
    expected = reference.make_reference(CASE_OF[name], dtype, tmp_path / "model")
    ids = expected.token_ids[:num_tokens]
    evaluate(FORWARD, expected.directory, tmp_path / "logits.npy", chunk, *ids)
    logits = np.load(tmp_path / "logits.npy")
    error = reference.relative_error(logits, expected.logits[:num_tokens])
    assert error <= MAX_ERROR[dtype]


GENERATE = """
import json, sys
import moerun

prompt, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
results = []
for options in settings:
    with moerun.Model.load(**options) as model:
        tokens = list(model.generate(prompt, 5, ignore_eos=True, temperature=0))
        stats = model.stats()
    results.append([tokens, stats["logits_hash"], stats["device"], stats["cache"]["state"]])
print(json.dumps(results))
"""


def test_text_is_that_of_the_cpu_and_keeps_its_bits_over_budgets(evaluate, tokenizer):
    on_host = {"device": "cuda-host"}
    settings = [
        {"device": "cpu"},
        on_host,
        on_host | {"expert_budget": "25%", "prefetch": True},
        on_host | {"expert_budget": "60%", "split": 0.4, "policy": "lru"},
    ]
    prompt = tokenizer.encode(PROMPT)
    cpu, *others = evaluate(GENERATE, json.dumps(prompt), json.dumps(settings))
    assert cpu[2:] == ["cpu", "resident"]
    for tokens, logits_hash, device, _ in others:
        assert (tokens, logits_hash, device) == (cpu[0], others[0][1], "cuda-host")
    assert [state for *_, state in others] == ["resident", "cached", "cached"]
    # Its sums are in another order than the CPU's: it is another backend that ran.
    assert others[0][1] != cpu[1]


THREADS = """
import json, threading
import moerun

texts = [None] * 3
with moerun.Model.load(device="cuda-host") as shared:
    def run(index):
        if index < 2:
            texts[index] = list(shared.generate([5], 3, ignore_eos=True, temperature=0))
            return
        with moerun.Model.load(device="cuda-host", expert_budget="25%") as own:
            texts[index] = list(own.generate([5], 3, ignore_eos=True, temperature=0))
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print(json.dumps(texts))
"""


def test_threads_take_turns_on_the_device(evaluate):
    texts = evaluate(THREADS)
    assert texts[0] is not None
    assert texts == [texts[0]] * 3


def test_bandwidths_are_measured(evaluate):
    script = """
import json
from moerun import _moerun
print(json.dumps(_moerun.device_bandwidth("cuda-host", 1 << 20)))
"""
    rates = evaluate(script)
    assert set(rates) == {"read_gb_per_s", "copy_gb_per_s", "from_host_gb_per_s"}
    assert all(rate > 0 for rate in rates.values())


def test_gpu_check_checks_and_measures_a_little_of_everything(run_python, cpp_build, tmp_path):
    script = ROOT / "benchmarks" / "gpu_check.py"
    options = ["--device", "cuda-host", "--quick", "--no-build", "--build-folder", cpp_build]
    output = tmp_path / "result.json"
    done = run_python(script, *options, "--folder", tmp_path, "-o", output, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["machine"]["cores"] > 0
    assert not result["interrupted"]
    assert result["moerun"][0]["build"]["cpu_kernels"]
    rows = result["rows"]
    checks = [row for row in rows if row["kind"] == "check"]
    assert len(checks) == 5
    assert {row["status"] for row in checks} == {"ok"}
    targets = [row["target"] for row in rows if row["kind"] == "speed" and row.get("target")]
    assert targets == [">= 0.7", ">= 0.85", "<= 1.2", "<= 1.25"]
    others = [row["name"] for row in rows if row["status"] == "not run"]
    assert all("torch" in name or "accelerate" in name for name in others)
    # The table comes last, and nothing stays behind.
    assert done.stdout.splitlines()[-1].startswith(rows[-1]["name"])
    assert list(tmp_path.iterdir()) == [output]


def test_moe_run_prints_text_and_statistics(run_python, model, tokenizer):
    command = ("-m", "moerun_tools.run", "--device", "cuda-host", "-n", "3", "--temperature", "0")
    done = run_python(*command, "--stats", "--expert-budget", "50%", PROMPT)
    assert done.returncode == 0, done.stderr
    ids = list(model.generate(tokenizer.encode(PROMPT), 3, temperature=0))
    assert done.stdout == PROMPT + tokenizer.decode(ids) + "\n"
    assert "\nmemory " in done.stderr
    assert "\nexperts " in done.stderr


def test_without_a_card_cuda_is_refused_in_a_sentence(run_python):
    done = run_python("-m", "moerun_tools.run", "--device", "cuda", PROMPT)
    if done.returncode == 0:
        pytest.skip("this machine has a card")
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.startswith("moe-run: error: device cuda: ")
    assert done.stderr.count("\n") == 1


def test_other_builds_do_not_know_the_device(run_cli):
    done = run_cli("--device", "cuda-host", PROMPT)
    assert done.returncode == 2
    assert "'cuda-host' is not one of 'auto', 'cpu', 'cuda'" in done.stderr
    with pytest.raises(moerun.errors.InvalidArgumentError, match="auto, cpu or cuda"):
        moerun.Model.load(device="cuda-host")
