"""Programs that look whether the CUDA part is right: the C++ tests, and compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from card.build import program_with_tests
from card.process import Deadline, run
from card.rows import Row, check, failed, not_run

TESTS_LIMIT_S = 120.0
SANITIZER_LIMIT_S = 60.0
# The quick run shows that the program can be run, no more.
QUICK_TESTS = ["argmax finds the first of the largest logits"]


def run_tests(folder: Path, device: str, quick: bool, deadline: Deadline) -> Row:
    """The C++ tests: kernels against the CPU's operations, and whole models."""
    program = program_with_tests(folder, device)
    if not program.exists():
        return not_run("check", program.name, f"{program} is not there; leave --no-build out")
    names = QUICK_TESTS if quick else []
    done = run([str(program), *names], min(TESTS_LIMIT_S, deadline.left()))
    if done.status is None:
        return failed("check", program.name, "not done in time")
    if done.status != 0:
        print("\n".join(done.lines), file=sys.stderr)
    return check(program.name, re.sub(r" passed$", "", done.last_line()), done.status == 0)


def find_sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    folders = [
        os.environ.get("PATH", ""),
        *(f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ),
        *([str(Path(nvcc).resolve().parent)] if nvcc else []),
        "/usr/local/cuda/bin",
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run_sanitizer(device: str, tool: str, deadline: Deadline) -> Row:
    """A short generation of the shipped model under compute-sanitizer."""
    name = f"compute-sanitizer {tool}"
    program = find_sanitizer()
    if program is None:
        return not_run("check", name, "compute-sanitizer was not found")
    code = (
        "import moerun\n"
        f"m = moerun.Model.load(device={device!r}, expert_budget='25%', prefetch=True)\n"
        "list(m.generate(list(range(5, 25)), 4, ignore_eos=True, temperature=0))\n"
    )
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = run(command, min(SANITIZER_LIMIT_S, deadline.left()))
    if done.status is None:
        return not_run("check", name, "not done in time")
    if "Device not supported" in "\n".join(done.lines):
        return not_run("check", name, "it does not support this device")
    if done.status != 0:
        print("\n".join(done.lines[-60:]), file=sys.stderr)
    return check(name, done.last_line().lstrip("= "), done.status == 0)
