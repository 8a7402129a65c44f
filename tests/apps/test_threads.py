"""How many cores and threads: what the user, the scheduler and the run itself say."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from forked import context

from metapl import MetaplError
from metapl.apps.experiments import jobs
from metapl.apps.run import RunFolder, describe
from metapl.apps.compare import Job
from metapl.apps.recipes import Digits
from metapl.apps.recipes.base import Method
from metapl.apps.recipes.methods import MetaPseudoLabels


def threads(cores: str) -> list[int]:
    """Cores and threads as a process on these cores alone sees them."""
    code = (
        f"import os; os.sched_setaffinity(0, {{{cores}}}); from metapl.apps.machine.cores import *; "
        "print(available_cores(), default_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def test_a_run_goes_on_with_as_many_threads_as_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = Silent()
    before = torch.get_num_threads()
    folder = RunFolder(tmp_path)
    monkeypatch.setattr("metapl.apps.experiments.experiment.Experiment.run", lambda self: torch.get_num_threads())
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
    method: Method = field(default_factory=MetaPseudoLabels)

    def by(self, name: str) -> Silent:
        return self


def _killed(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_reported_and_the_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_run", _killed)
    server = context()  # whose processes have imported everything
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)
    two = [Job(Digits(seed=seed), "mpl", tmp_path / str(seed), False) for seed in (0, 1)]
    with pytest.raises(MetaplError, match=r"was killed \(mpl, seed 0, mpl, seed 1\): was there too little memory"):
        list(jobs.run_all(two, workers=2))
    assert multiprocessing.active_children() == []
