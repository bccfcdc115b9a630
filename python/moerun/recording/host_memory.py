"""How much memory a process may still use."""

from __future__ import annotations

from pathlib import Path


def available_memory_bytes() -> int | None:
    """Return what is free in this machine, or in this container if that is less.

    None where the system does not say.
    """
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = int(Path(folder, limit).read_text())
            limits.append(max(0, most - int(Path(folder, usage).read_text())))
        except (OSError, ValueError):  # no such control group, or no limit: "max"
            continue
    return min(limits, default=None)
