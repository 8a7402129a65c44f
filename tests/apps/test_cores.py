"""How many cores and threads: what the user, the scheduler and the run itself say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metapl.apps.machine.cores import available_cores, default_threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_cores_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    allowed = os.sched_getaffinity(0)
    assert default_threads() == available_cores() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert (available_cores(), default_threads()) == (1, 1)
    finally:
        os.sched_setaffinity(0, allowed)


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
    monkeypatch.setattr("metapl.apps.machine.cores.CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == expected


@pytest.mark.parametrize(("given", "expected"), [("3", 3), ("4,2", 4), ("0", 7), ("many", 7), ("", 7)])
def test_omp_num_threads_is_heeded(given: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.apps.machine.cores.available_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert default_threads() == expected
