"""The parts of gpu_check.py that need neither a card nor its stand-in."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from card import build, programs, rows
from card.process import Background, Deadline, run
from card.speeds import prefill_flops

GPU_CHECK = build.ROOT / "benchmarks" / "gpu_check.py"


@pytest.mark.parametrize(
    ("value", "target", "status"),
    [
        (0.7, {"at_least": 0.7}, "ok"),
        (0.69, {"at_least": 0.7}, "MISSED"),
        (1.25, {"at_most": 1.25}, "ok"),
        (1.26, {"at_most": 1.25}, "MISSED"),
        (float("nan"), {"at_most": 1.25}, "MISSED"),
        (5.0, {}, ""),
    ],
)
def test_a_speed_is_held_against_its_target(value, target, status):
    assert rows.speed("a speed", value, **target)["status"] == status


def test_the_exit_status_is_that_of_the_checks():
    right, wrong = rows.check("a", 1, True), rows.check("b", 1, False)
    absent = rows.not_run("check", "c", "it was not found")
    slow = rows.speed("d", 0.1, at_least=0.7)
    assert rows.exit_status([right, slow, rows.not_run("speed", "e", "no time")]) == 0
    assert rows.exit_status([right, absent]) == 3
    assert rows.exit_status([right, absent, wrong]) == 1
    assert rows.exit_status([slow]) == 1


def test_the_table_names_every_row_and_its_outcome():
    found = [rows.speed("decode", 0.1234, "times", at_most=1), rows.failed("check", "bits", "why")]
    lines = rows.table(found).splitlines()
    assert lines[1].split() == ["bits", "FAILED:", "why"]
    assert lines[-1].split() == ["decode", "0.123", "times", "<=", "1", "ok"]


def is_running(process_id):
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_a_command_that_takes_too_long_is_ended_with_what_it_started():
    lines = []
    begin = time.monotonic()
    done = run(["bash", "-c", "sleep 60 & echo $!; wait"], 0.5, lines.append)
    assert done.status is None
    assert time.monotonic() - begin < 20
    for _ in range(100):
        if not is_running(int(lines[0])):
            return
        time.sleep(0.05)
    pytest.fail("what it started still runs")


def test_the_last_lines_of_a_command_are_kept():
    done = run(["bash", "-c", "seq 1000; echo; exit 3"], 20)
    assert done.status == 3
    assert done.last_line() == "1000"
    assert len(done.lines) == 200
    background = Background(["true"])
    assert background.wait(20).status == 0
    background.end()


def test_a_missing_program_is_not_run(tmp_path, monkeypatch):
    row = programs.run_tests(tmp_path, "cuda", False, Deadline(10))
    assert row["status"] == "not run"
    monkeypatch.setattr(programs, "find_sanitizer", lambda: None)
    row = programs.run_sanitizer("cuda", "memcheck", Deadline(10))
    assert row["status"] == "not run"
    assert "compute-sanitizer was not found" in row["why"]


@pytest.mark.parametrize(("status", "outcome"), [(0, "ok"), (9, "FAILED")])
def test_what_compute_sanitizer_finds_decides(tmp_path, monkeypatch, status, outcome):
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!/bin/sh\necho '========= ERROR SUMMARY: {status} errors'\nexit {status}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(programs, "find_sanitizer", lambda: str(program))
    row = programs.run_sanitizer("cuda", "racecheck", Deadline(10))
    assert row["status"] == outcome
    assert row["value"] == f"ERROR SUMMARY: {status} errors"


def test_a_build_without_cmake_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    row, packages = build.build(tmp_path, "cuda", Deadline(10))
    assert packages is None
    assert row["status"] == "FAILED"
    assert "pip install cmake" in row["why"]


def test_the_work_of_a_prompt_is_counted():
    config = {
        "hidden_size": 8,
        "head_dim": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 3,
        "top_k": 2,
        "moe_intermediate_size": 5,
        "num_hidden_layers": 7,
    }
    products = 8 * (2 + 2) * 4 + 2 * 4 * 8 + 8 * 3 + 2 * 3 * 8 * 5
    attention = 2 * 4 * 2 * (1 + 2 + 3)  # scores and sums, over 1, 2 and 3 keys
    assert prefill_flops(config, 3) == 7 * 2 * (3 * products + attention)


def test_without_a_card_it_says_so_and_does_not_measure(tmp_path):
    import moerun

    if moerun.build_info()["cuda"]["available"]:
        pytest.skip("this machine has a card")
    command = [sys.executable, str(GPU_CHECK), "--no-build", "--no-speed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "a card that this build can use" in done.stdout
    assert "FAILED: " in done.stdout


def test_an_interrupt_ends_it_cleanly(tmp_path):
    # Its models take long to write: it is interrupted while that goes on.
    folder = tmp_path / "files"
    folder.mkdir()
    output = tmp_path / "result.json"
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cmake").write_text("#!/bin/sh\nsleep 60\n")
    (tools / "cmake").chmod(0o755)
    command = [sys.executable, str(GPU_CHECK), "--device", "cuda-host", "--quick"]
    command += ["--folder", str(folder), "-o", str(output)]
    command += ["--build-folder", str(tmp_path / "build")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
    )
    try:
        for _ in range(200):
            if any(folder.glob("*/*")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert '"interrupted": true' in output.read_text()
    assert not list(folder.iterdir())
