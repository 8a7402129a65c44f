"""How many cores this process may use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """The cores that this process may use, by its CPU affinity and the CPU limit of its container; 1 or more.

    >>> 1 <= available_cores() <= os.cpu_count()
    True
    """
    from joblib import cpu_count

    found: int = cpu_count()
    return found


def default_threads() -> int:
    """Threads of a process that runs alone: ``OMP_NUM_THREADS`` where that is set, else one for each available core.

    PyTorch's own default heeds the first and the affinity, and not the limit of a container: with 64 threads on 2
    cores' worth of time, these mostly wait for each other.
    """
    first, _, _ = os.environ.get("OMP_NUM_THREADS", "").partition(",")  # a list is for nested regions
    asked = first.strip()
    return int(asked) if asked.isdecimal() and int(asked) >= 1 else available_cores()
