"""Kernels that spill are told by name: by cuda/resource_table.py, and by the build itself."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
SPILLS = DATA / "spills.cu"
# Major version of nvcc -> bytes that it stores and loads on sm_90, as it recorded them in DATA.
RECORDED = {12: 2 * 316, 13: 2 * 320}


def resource_table(*arguments, log=""):
    return subprocess.run(
        [sys.executable, ROOT / "cuda" / "resource_table.py", *arguments],
        input=log,
        capture_output=True,
        text=True,
    )


def rows(done):
    """The table by kernels: namespaces and parameters are gone where c++filt is there."""
    cells = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    return {re.sub(r".*?(\w+_kernel).*", r"\1", row[0]): row[1:] for row in cells}


@pytest.mark.parametrize("version", RECORDED)
def test_a_spill_fails_and_names_kernel_and_architecture(version):
    done = resource_table("--log", DATA / f"ptxas_cuda{version}.txt")
    assert done.returncode == 1
    on_80, on_90 = done.stderr.splitlines()
    assert "spilling_kernel" in on_80
    assert "sm_80: 640 bytes of spill stores and loads, 320 bytes of stack" in on_80
    assert f"sm_90: {RECORDED[version]} bytes of spill stores and loads" in on_90
    assert "sound_kernel" not in done.stderr


@pytest.mark.parametrize("version", RECORDED)
def test_the_table_has_a_figure_for_each_architecture(version):
    done = resource_table("--log", DATA / f"ptxas_cuda{version}.txt")
    assert done.stdout.startswith("| kernel | threads | registers, sm_80 / sm_90 | ")
    table = rows(done)
    assert table["sound_kernel"][1:] == ["12 / 14", "1024", "0", "0"]
    spills = {12: "640 / 632", 13: "640"}[version]  # one figure where all are the same
    assert table["spilling_kernel"][1:] == ["32 / 32", "0", "320", spills]


def test_kernels_that_do_not_spill_pass():
    log = (DATA / "ptxas_cuda13.txt").read_text()
    done = resource_table("--log", "-", log=re.sub(r"\b320 bytes", "0 bytes", log))
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done).keys() == {"sound_kernel", "spilling_kernel"}


def test_a_log_without_kernels_is_refused():
    done = resource_table("--log", "-", log="ptxas info    : 0 bytes gmem\n")
    assert done.returncode == 2
    assert "expected lines of ptxas about kernels, found none" in done.stderr


def test_a_missing_nvcc_is_named():
    done = resource_table("--nvcc", "/nowhere/nvcc")
    assert done.returncode == 2
    assert "/nowhere/nvcc was not found" in done.stderr


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not here")


@needs_nvcc
def test_the_table_is_made_with_nvcc_and_knows_the_threads():
    done = resource_table("--arch", "80", "--", SPILLS)
    assert done.returncode == 1, done.stderr
    table = rows(done)
    assert (table["sound_kernel"][0], table["spilling_kernel"][0]) == ("256", "1024")


@needs_nvcc
@pytest.mark.parametrize("is_strict", [False, True])
def test_the_flags_of_the_build_tell_of_spills_and_stop_where_warnings_are_errors(
    tmp_path, is_strict
):
    given = re.findall(r"\b_ptxas ,?(--[\w,-]+)\)", (ROOT / "cuda" / "CMakeLists.txt").read_text())
    always, only_strict = given
    flags = f"{always},{only_strict}" if is_strict else always
    done = subprocess.run(
        ["nvcc", "-cubin", "-arch=sm_80", f"-Xptxas={flags}", "-o", tmp_path / "out", SPILLS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode != 0) == is_strict, done.stdout
    word = "error" if is_strict else "warning"
    assert re.search(rf"ptxas {word} *: Registers are spilled .*spilling_kernel", done.stdout)
    assert "sound_kernel" not in done.stdout
