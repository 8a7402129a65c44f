"""Versions and hardware, for the record of a run."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metapl.apps.machine.cores import available_cores


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
