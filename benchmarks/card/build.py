"""Builds the module and the tests from this checkout, without a network and without installing."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from card.process import Deadline, run
from card.rows import Row, check, failed

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0

# The program with the tests of kernels and models, by device.
TESTS = {"cuda": "moerun_cuda_tests", "cuda-host": "moerun_cuda_host_tests"}


def program_with_tests(folder: Path, device: str) -> Path:
    return folder / "tests" / "cuda_host" / TESTS[device]


def link_package(build: Path, folder: Path) -> Path:
    """Makes `folder` one for PYTHONPATH: the sources' packages with the build's native parts."""
    package = folder / "moerun"
    package.mkdir(parents=True)
    for file in (ROOT / "python" / "moerun").iterdir():
        if file.suffix != ".so" and file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    (module,) = (build / "python").glob("_moerun*.so")
    (package / module.name).symlink_to(module.resolve())
    (package / "libmoerun.so").symlink_to((build / "cpp" / "libmoerun.so").resolve())
    (folder / "moerun_tools").symlink_to(ROOT / "tools" / "moerun_tools")
    return folder


def build(folder: Path, device: str, deadline: Deadline) -> tuple[Row, Path | None]:
    """Returns what to report, and the folder for PYTHONPATH."""
    cmake = shutil.which("cmake")
    if cmake is None:
        return failed("check", "build", "cmake was not found; pip install cmake ninja"), None
    for_device = {
        "cuda": ["-DMOERUN_CUDA=ON"],
        "cuda-host": ["-DMOERUN_CUDA=OFF", "-DMOERUN_CUDA_HOST=ON"],
    }
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder)),
        *("-DMOERUN_PYTHON=ON", "-DMOERUN_TESTS=ON", "-DMOERUN_WERROR=OFF"),
        *for_device[device],
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"]
    compile_all = [cmake, "--build", str(folder), "-j", str(os.cpu_count() or 1), "--target"]
    for command in (configure, [*compile_all, "_moerun", "moerun_c", TESTS[device]]):
        done = run(command, min(LIMIT_S, deadline.left()))
        if done.status != 0:
            print("\n".join(done.lines[-40:]), file=sys.stderr)
            why = f"not done in {LIMIT_S:.0f} s" if done.status is None else "its output is above"
            return failed("check", "build", why), None
    packages = folder / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    return check("build", device, True), link_package(folder, packages)
