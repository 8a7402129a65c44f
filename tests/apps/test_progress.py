"""The time that is left, where early steps cost less than later ones."""

from __future__ import annotations

import re

import pytest

from metapl.apps.machine import progress as module
from metapl.apps.machine.progress import Progress


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def each_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each, however soon it comes."""
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rpartition(", ")[2] for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("each_validation")
def test_steps_that_become_dearer_are_forecast_by_the_last_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps of a second, then six of ten."""
    clock = Clock(monkeypatch)
    shown = Progress("fit", 0, 10, lines=True)
    for step in range(10):
        clock.now += 1.0 if step < 4 else 10.0
        shown.advance([], {}, due=step % 2 == 1)
    assert lines(capsys) == [f"about {seconds} s left" for seconds in (8, 6, 40, 20)] + ["after 64 s"]


def test_a_log_gets_the_first_line_the_last_one_and_one_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty validations of a training of five minutes, and of one of ten hours."""
    clock = Clock(monkeypatch)
    written = {}
    for seconds in (3.0, 360.0):
        shown = Progress("fit", 0, 100, lines=True)
        for step in range(100):
            clock.now += seconds
            shown.advance([], {}, due=step % 5 == 4)
        written[seconds] = re.findall(r"step (\d+) of", capsys.readouterr().err)
    assert written[3.0] == ["5", "25", "45", "65", "85", "100"]
    assert written[360.0] == [str(step) for step in range(5, 101, 5)]
