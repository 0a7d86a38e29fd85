"""How many threads a call may use, and torch's pool set to that for its duration."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import ArgumentError

_CGROUP = Path("/sys/fs/cgroup")


def cgroup_cpus(root: Path = _CGROUP) -> float | None:
    """CPUs that the container's quota grants (cgroup v2, then v1), or None without a quota."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return quota / int((root / "cpu/cpu.cfs_period_us").read_text()) if quota > 0 else None
    return None


@functools.cache
def default_threads() -> int:
    """NARROWCAST_THREADS, else the CPU quota of the container capped by the affinity mask."""
    setting = os.environ.get("NARROWCAST_THREADS")
    if setting is not None:
        if not setting.isdecimal() or int(setting) < 1:
            raise ArgumentError(f"NARROWCAST_THREADS must be a positive integer, got {setting!r}")
        return int(setting)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_cpus()
    return max(1, min(available or 1, math.ceil(quota) if quota else available or 1))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's thread count is `count` inside, and what it was afterwards."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
