"""Versions and hardware, for the record of a run; and how many threads a process takes."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count


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
        "cpus": cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def default_threads() -> int:
    """Threads of a process that runs alone: ``OMP_NUM_THREADS`` where that is set, else one for each core it may use.

    PyTorch's own default heeds the first and the affinity, and not the limit of a container: with 64 threads on 2
    cores' worth of time, these mostly wait for each other.
    """
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")  # a list is for nested regions
    asked = first.strip()
    return int(asked) if asked.isdecimal() and int(asked) >= 1 else cpu_count()
