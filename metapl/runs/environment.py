"""Versions and hardware, for the record of a run."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from metapl.cores import available_cores


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record of a run."""
    cuda = torch.cuda.is_available()
    return {
        "metapl": version("metapl"),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "torchopt": version("torchopt"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
