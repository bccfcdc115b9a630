"""Threads: idle ones take no processor time, and their number changes no bit."""

import subprocess
import sys
import time

import numpy as np
from test_benchmarks import run

import moerun

PROMPT = list(range(5, 300))


def test_a_model_that_does_nothing_takes_no_processor_time():
    with moerun.Model.load(threads=2, expert_budget="25%") as model:
        model.forward(PROMPT)
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.05


def test_taken_cores_and_withheld_threads_change_no_bit():
    with moerun.Model.load(threads=1) as model:
        expected = model.forward(PROMPT)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for threads in (2, 3):
            with moerun.Model.load(threads=threads) as model:
                for _ in range(4):
                    assert np.array_equal(model.forward(PROMPT), expected)
                stats = model.stats()
                at_work, withheld = stats["threads_at_work"], stats["threads_withheld"]
                assert 1 <= at_work <= threads
                assert 0 <= withheld <= threads - at_work + 1e-9
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_stats_tell_how_many_threads_were_at_work():
    with moerun.Model.load(threads=1) as model:
        assert model.stats()["threads_at_work"] is None
        model.forward(PROMPT)
        assert model.stats()["threads_at_work"] == 1
        assert model.stats()["threads_withheld"] == 0


def test_the_benchmark_of_busy_machines_prints_a_table():
    sizes = ["--rounds", "1", "--decode-tokens", "1", "--prompt-tokens", "4"]
    lines = run("bench_busy.py", "--busy", "0", "--busy", "1", *sizes).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[0] == "| busy processes | threads | shipped: decode | shipped: prefill |"
    assert [row.split("|")[1:3] for row in rows[1:]] == [
        [f" {busy} ", f" {threads} "] for busy in (0, 1) for threads in (1, 2)
    ]
