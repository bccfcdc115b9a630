"""Builds everything from C++: the tests, and a module that has the CUDA backend on the host."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "pytest-cpp"
MAX_SHOWN = 8000  # characters of a failed command's output


def tool(name):
    """The tool that pip put beside this Python, or the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} was not found; install it with: pip install {name}"
    return found


def run(*command, **options):
    done = subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        **options,
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-MAX_SHOWN:]}"
    return done.stdout


def configure(source, build, *definitions):
    run(
        tool("cmake"),
        *("-S", source),
        *("-B", build),
        *("-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        *definitions,
    )


def build_everything():
    """Returns the build folder; it is kept, so that the next run compiles only what has changed."""
    configure(
        ROOT,
        BUILD,
        *("-DMOERUN_TESTS=ON", "-DMOERUN_PYTHON=ON", "-DMOERUN_CUDA_HOST=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    run(tool("cmake"), "--build", BUILD, "-j", os.cpu_count() or 1)
    return BUILD
