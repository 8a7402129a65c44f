"""What the ranks of tests/apps/test_two_moons_mesh.py run."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
from command_cases import command

from metapl.apps.experiments.two_moons import TwoMoonsRuns
from metapl.distributed import launch
from metapl.errors import MetaplError

__all__ = ["command", "failing", "slowly_refused"]


def failing(arguments: list[str], rank: int, how: str) -> tuple[int, str, str]:
    """The command where something happens to one process as it hears of the others for the third time."""
    real, times = TwoMoonsRuns._heed, iter(range(1000))

    def heed(self: TwoMoonsRuns) -> None:
        if os.environ["RANK"] == str(rank) and next(times) == 2:
            if how == "refuses":
                raise MetaplError("the third")
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoMoonsRuns, "_heed", heed)
        patch.setattr(launch, "PATIENCE", timedelta(seconds=5))
        patch.setattr(launch, "HEARD_WITHIN", 1.0)
        return command(arguments)


def slowly_refused(arguments: list[str]) -> tuple[tuple[int, str, str], float, float]:
    """The command where what is said comes late, after the SIGTERM that ``torchrun`` sends when a process has left.

    Returns: what it showed, when it had said why it ended, and when it left.
    """
    real, said = launch.tell, [0.0]

    def tell(*parts: Any, **options: Any) -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        real(*parts, **options)
        said.append(time.monotonic())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tell", tell)
        return command(arguments), said[-1], time.monotonic()
