"""How many cores and threads: what the user, the scheduler and the run itself say."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import context

from metapl import MetaplError
from metapl.apps import compare
from metapl.apps.compare import Job
from metapl.apps.digits import METHODS, Digits, fitting


def threads(cores: str) -> list[int]:
    """Cores and threads as a process on these cores alone sees them."""
    code = (
        f"import os; os.sched_setaffinity(0, {{{cores}}}); from metapl.apps.machine.cores import *; "
        "print(available_cores(), default_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def _killed(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_a_worker_that_is_killed_is_reported_and_the_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_run_apart", _killed)
    server = context()  # whose processes have imported everything
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)
    two = [Job(Digits(fitting=fitting(seed=s)), METHODS["mpl"], tmp_path / str(s), False, 1) for s in (0, 1)]
    with pytest.raises(MetaplError, match="killed"):
        list(compare.run_all(two, workers=2))
    assert multiprocessing.active_children() == []
