"""The machine that a program runs on: what a file was made with, and how many threads it has."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metapl.errors import MetaplError, needed_for
from metapl.execution.numerics import float32_products


def environment() -> dict[str, Any]:
    """Return what a file was made with: the versions, the machine, and its precision.

    The precision is that in which products of float32 are taken on its GPU, or on its CPU where it
    has none.
    """
    about: dict[str, Any] = {}
    for package in ("metapl", "torch", "torchvision", "torchopt"):
        about[package] = None
        with suppress(PackageNotFoundError):
            about[package] = version(package)
    has_gpu = torch.cuda.is_available()
    about["torch"] = torch.__version__
    about["python"] = platform.python_version()
    about["machine"] = platform.machine()
    about["processor"] = processor()
    about["cpus"] = cpu_count()
    about["threads"] = torch.get_num_threads()
    about["gpu"] = torch.cuda.get_device_name() if has_gpu else None
    device = torch.device("cuda" if has_gpu else "cpu")
    for kind, precision in float32_products(device).items():
        about[f"float32 {kind}"] = precision
    return about


def processor() -> str:
    """Return the model of the processor, which on Linux the platform module does not know."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.startswith("model name") and value.strip():
                return value.strip()
    return platform.processor()


def cpu_count() -> int:
    """Return the cores that this process may use, by its affinity and its container's limit."""
    with needed_for("the number of cores"):
        from joblib import cpu_count as count_cores

    cores: int = count_cores()
    return cores


def default_threads() -> int:
    """Return the threads of a process that runs alone.

    They are ``OMP_NUM_THREADS`` where it is set, else one for each core that it may use.

    PyTorch's own default heeds the first and the affinity, and not the limit of a container: with
    64 threads on 2 cores' worth of time, these mostly wait for each other.
    """
    # A list is for nested regions.
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")
    asked = first.strip()
    if asked.isdecimal() and int(asked) >= 1:
        return int(asked)
    return cpu_count()


def device(asked: str) -> torch.device:
    """Return the device of ``--device``; refuse cuda where there is no GPU."""
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise MetaplError("--device cuda was given, and PyTorch sees no GPU; use auto or cpu.")
    return torch.device("cuda" if asked != "cpu" and has_gpu else "cpu")
