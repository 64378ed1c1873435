"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus() -> int:
    """Logical CPUs that this process may keep busy: those it may run on, within its container's quota."""
    return min(affinity_cpus(), container_cpus(CPU_MAX) or affinity_cpus())


def affinity_cpus() -> int:
    """Logical CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def container_cpus(cpu_max: Path) -> int | None:
    """The CPU quota of a Linux container (``docker run --cpus``), in whole CPUs; None where there is none."""
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        # No such file, or no quota: "max 100000".
        return None
