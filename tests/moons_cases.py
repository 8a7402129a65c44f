"""What the ranks of tests/test_two_moons_mesh.py run."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
from sharded_cases import command

from metapl.distributed import launch
from metapl.errors import MetaplError
from metapl.experiments.two_moons import TwoMoonsRuns

__all__ = ["command", "failing"]


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
