"""How many cores and threads: what the user, the scheduler and the run itself say."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from metapl import MetaplError
from metapl.cores import available_cores, default_threads
from metapl.experiments import jobs
from metapl.experiments.jobs import Job
from metapl.experiments.store import describe
from metapl.recipes import Digits
from metapl.runs.folder import RunFolder


def threads(cores: str) -> list[int]:
    """Cores and threads as a process on these cores alone sees them."""
    code = (
        f"import os; os.sched_setaffinity(0, {{{cores}}}); from metapl.cores import *; "
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
    monkeypatch.setattr("metapl.cores.CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert available_cores() == expected


@pytest.mark.parametrize(("given", "expected"), [("3", 3), ("4,2", 4), ("0", 7), ("many", 7), ("", 7)])
def test_omp_num_threads_is_heeded(given: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.cores.available_cores", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert default_threads() == expected


def test_a_run_goes_on_with_as_many_threads_as_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = Silent()
    before = torch.get_num_threads()
    folder = RunFolder(tmp_path)
    monkeypatch.setattr("metapl.experiments.experiment.Experiment.run", lambda self, method: torch.get_num_threads())
    try:
        torch.set_num_threads(3)
        with folder.claimed(describe(recipe, method="mpl"), resume=False):
            pass
        assert json.loads((tmp_path / "recipe.json").read_text())["made_with"]["threads"] == 3
        torch.set_num_threads(1)
        assert Job(recipe, "mpl", tmp_path, True).run() == 3
        assert Job(recipe, "mpl", tmp_path, True, threads=2).run() == 2
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Silent:
    """A recipe that does not say how many threads."""

    name: ClassVar[str] = "silent"
    seed: int = 0


def _killed(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_reported_and_the_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_run", _killed)
    two = [Job(Digits(seed=seed), "mpl", tmp_path / str(seed), False) for seed in (0, 1)]
    with pytest.raises(MetaplError, match=r"was killed \(mpl, seed 0, mpl, seed 1\): was there too little memory"):
        list(jobs.run_all(two, workers=2))
    assert multiprocessing.active_children() == []
