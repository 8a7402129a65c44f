"""Versions and hardware, for the record of a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metapl.apps.machine.cores import available_cores


def environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "metapl": version("metapl"),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "torchopt": _version("torchopt"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, None) or platform.processor()
