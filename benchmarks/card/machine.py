"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,pcie.link.gen.max"


def output_of(*command: str) -> str | None:
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=20, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.machine()


def describe() -> dict[str, Any]:
    root = str(Path(__file__).parents[2])
    return {
        "host": platform.node(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"),
        "nvcc": (output_of("nvcc", "--version") or "").splitlines()[-1:],
        "commit": output_of("git", "-C", root, "describe", "--always", "--dirty"),
    }
