"""Versions and hardware, for the record of a run; and how many cores this process may use."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for package in ("metapl", "torch", "torchvision", "torchopt"):
        found[package] = None
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return found | {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": next(named, None) or platform.processor(),
        "cpus": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def available_cores() -> int:
    """The cores that this process may use, by its CPU affinity and the CPU limit of its container; 1 or more."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _limit() or cores)


def _limit() -> int | None:
    """The cores' worth of time that a container has, rounded up, by either version of control groups."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, " ".join((CONTROL_GROUPS / name).read_text() for name in names).split())
            if quota > 0 and period > 0:
                return math.ceil(quota / period)
    return None


def default_threads() -> int:
    """Threads of a process that runs alone: ``OMP_NUM_THREADS`` where that is set, else one for each available core.

    PyTorch's own default heeds the first and the affinity, and not the limit of a container: with 64 threads on 2
    cores' worth of time, these mostly wait for each other.
    """
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")  # a list is for nested regions
    asked = first.strip()
    return int(asked) if asked.isdecimal() and int(asked) >= 1 else available_cores()
