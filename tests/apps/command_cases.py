"""What the ranks of the tests of the command run."""

from __future__ import annotations

import io
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import pytest

import metapl
from metapl.apps.commands import main
from metapl.errors import MetaplError


def command(arguments: list[str]) -> tuple[int, str, str]:
    """The exit code of the command on this rank, and what it showed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def failing(arguments: list[str], rank: int, how: str) -> tuple[int, str, str]:
    """The same where the third step of one process fails in some way, and the others do not."""
    from metapl.apps.commands import launch

    real, mine = metapl.BilevelTrainer.step, os.environ["RANK"] == str(rank)

    def step(self: metapl.BilevelTrainer, labeled: Any, unlabeled: Any = None) -> Any:
        if mine and self.steps_done == 2:
            if how == "refuses":
                raise MetaplError("the third")
            if how == "breaks":
                raise ZeroDivisionError
            time.sleep(4)  # beyond the others' patience
        return real(self, labeled, unlabeled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metapl.BilevelTrainer, "step", step)
        patch.setattr(launch, "PATIENCE", timedelta(seconds=3))
        patch.setattr(launch, "HEARD_WITHIN", 1.0)
        try:
            return command(arguments)
        except ZeroDivisionError:
            return -1, "", ""


def slowly_refused(arguments: list[str]) -> tuple[tuple[int, str, str], float, float]:
    """The command where what is said comes late, after the SIGTERM that ``torchrun`` sends when a process has left.

    Returns: what it showed, when it had said why it ended, and when it left.
    """
    from metapl.apps.commands import launch

    real, said = launch.tell, [0.0]

    def tell(*parts: Any, **options: Any) -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        real(*parts, **options)
        said.append(time.monotonic())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tell", tell)
        return command(arguments), said[-1], time.monotonic()
