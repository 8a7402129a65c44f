"""How many cores and threads: what the user, the scheduler and the run itself say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metapl.runs.cores import available_cores, default_threads


def threads(cores: str) -> list[int]:
    """Cores and threads as a process on these cores alone sees them."""
    code = (
        f"import os; os.sched_setaffinity(0, {{{cores}}}); from metapl.runs.cores import *; "
        "print(available_cores(), default_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cores_are_those_that_the_process_may_use() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert threads(str(allowed[0])) == [1, 1]
    assert threads(", ".join(map(str, allowed))) == [available_cores()] * 2


@pytest.mark.parametrize(
    ("file", "quota", "expected"),
    [
        ("cpu.max", "150000 100000\n", 2),
        ("cpu.max", "max 100000\n", 8),
        ("cpu.max", "9900000 100000\n", 8),
        ("cpu/cpu.cfs_quota_us", "50000\n", 1),
        ("cpu/cpu.cfs_quota_us", "-1\n", 8),
    ],
)
def test_a_limit_of_the_container_counts(
    file: str, quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(quota)
    (tmp_path / "cpu").mkdir(exist_ok=True)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr("metapl.runs.cores.CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == expected


@pytest.mark.parametrize(("given", "expected"), [("3", 3), ("4,2", 4), ("0", 7), ("many", 7), ("", 7)])
def test_omp_num_threads_is_heeded(given: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.runs.cores.available_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert default_threads() == expected
