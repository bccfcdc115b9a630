"""Builds and runs the C++ tests, then uses the installed CMake package as a stranger would."""

import re

import pytest
from cpp_build import ROOT, configure, run, tool

# Folders of tests/ and the programs that are built from them.
PROGRAMS = {"cpp": "moerun_tests", "cuda_host": "moerun_cuda_host_tests"}


def test_names(folder):
    """What the TEST("...") lines of the sources name, so that collecting needs no build."""
    names = []
    for path in sorted((ROOT / "tests" / folder).glob("*.cc")):
        names += re.findall(r'^TEST\(\s*"([^"]+)"\s*\)', path.read_text(), re.MULTILINE)
    return sorted(names)


test_names.__test__ = False


@pytest.mark.parametrize("folder", PROGRAMS)
def test_every_cpp_test_is_known_here(cpp_build, folder):
    program = cpp_build / "tests" / folder / PROGRAMS[folder]
    assert run(program, "--list").splitlines() == test_names(folder)


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in PROGRAMS for name in test_names(folder)]
)
def test_cpp(cpp_build, folder, name, tmp_path):
    run(cpp_build / "tests" / folder / PROGRAMS[folder], name, cwd=tmp_path)


def test_a_kernel_file_shares_no_function_with_files_for_lesser_processors(cpp_build):
    """An inline function compiled for AVX-512 must not be the copy that the linker keeps."""
    objects = sorted(cpp_build.glob("cpp/CMakeFiles/moerun.dir/device/cpu/kernels_*.o"))
    assert len(objects) == 4
    for file in objects:
        kernel_set = file.name.removeprefix("kernels_").removesuffix(".cc.o")
        symbols = run(tool("nm"), "-C", "--defined-only", "--extern-only", file).splitlines()
        names = [line.split(maxsplit=2)[2] for line in symbols]
        assert names == [f"moerun::cpu_kernels_{kernel_set}()"]


CONSUMER_CMAKE = """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES C CXX)
find_package(moerun 0.1 REQUIRED)
add_executable(consumer_c main.c)
target_link_libraries(consumer_c PRIVATE moerun::capi)
add_executable(consumer_cpp main.cc)
target_link_libraries(consumer_cpp PRIVATE moerun::moerun)
"""

CONSUMER_C = """
#include <moerun.h>
#include <stdio.h>

int main(void) {
  moerun_model* model = 0;
  if (moerun_open("/nonexistent", 0, &model) != MOERUN_FILE_ERROR) return 1;
  printf("%s\\n%s\\n", moerun_version(), moerun_last_error());
  moerun_close(model);
  return 0;
}
"""

CONSUMER_CPP = """
#include <iostream>

#include "base/version.h"
#include "device/cuda_query.h"

int main() {
  const moerun::CudaInfo cuda = moerun::query_cuda();
  std::cout << moerun::version() << "\\n" << (cuda.available ? "" : cuda.reason) << "\\n";
}
"""


def test_the_installed_package_serves_c_and_cpp_programs(cpp_build, tmp_path):
    prefix = tmp_path / "prefix"
    run(tool("cmake"), "--install", cpp_build, "--prefix", prefix)
    source = tmp_path / "consumer"
    source.mkdir()
    (source / "CMakeLists.txt").write_text(CONSUMER_CMAKE)
    (source / "main.c").write_text(CONSUMER_C)
    (source / "main.cc").write_text(CONSUMER_CPP)
    configure(source, tmp_path / "build", f"-Dmoerun_ROOT={prefix}")
    run(tool("cmake"), "--build", tmp_path / "build")

    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    c_output = run(tmp_path / "build" / "consumer_c").splitlines()
    assert c_output[0] == version
    assert "/nonexistent" in c_output[1]
    assert run(tmp_path / "build" / "consumer_cpp").splitlines()[0] == version
