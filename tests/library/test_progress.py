"""The time that is left, where early steps cost less than later ones."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import nn

import metapl
from metapl.training import progress as module
from metapl.training.progress import Progress

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


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
def test_a_late_start_is_not_forecast_from_the_steps_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps of a second, then six of ten: the first ones bound the time from below, and do not count later."""
    clock = Clock(monkeypatch)
    shown = Progress("fit", 0, 10, lines=True, dearer=[0, 4, 10])
    for step in range(10):
        clock.now += 1.0 if step < 4 else 10.0
        shown.advance([], {}, due=step % 2 == 1)
    assert lines(capsys) == [
        "at least 8 s left",
        "at least 6 s left",
        "about 40 s left",
        "about 20 s left",
        "after 64 s",
    ]


@pytest.mark.usefixtures("each_validation")
def test_steps_that_cost_the_same_are_forecast_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    shown = Progress("fit", 2, 8, lines=True, dearer=[0, 2])
    for _ in range(6):
        clock.now += 5.0
        shown.advance([], {}, due=True)
    assert lines(capsys) == [f"about {seconds} s left" for seconds in (25, 20, 15, 10, 5)] + ["after 30 s"]


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


def uda(start: int) -> metapl.LossTrainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    losses = metapl.CrossEntropy(), metapl.UDA(start=start)
    return metapl.LossTrainer(model, losses, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def bilevel(**options: Any) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    return metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), **options)


def words(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.partition(" ")[0] if line.startswith("after") else line[:5] for line in lines(capsys)]


@pytest.mark.usefixtures("each_validation")
def test_a_fit_knows_when_its_steps_become_dearer(capsys: pytest.CaptureFixture[str]) -> None:
    late = (metapl.CrossEntropy(), metapl.UDA(start=3))
    cases = [(uda(2), {}), (bilevel(teacher_losses=late), {"wait": 1}), (bilevel(), {"wait": 3}), (bilevel(), {})]
    known = [2, 3, 3, 0]
    for (trainer, options), cheap in zip(cases, known, strict=True):
        trainer.fit([(X, Y)], [(X, X)], steps=5, validate_every=1, **options)
        assert words(capsys) == ["at le"] * cheap + ["about"] * (4 - cheap) + ["after"]


@pytest.mark.usefixtures("each_validation")
def test_a_second_fit_counts_the_steps_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """UDA begins by the steps of the trainer, of which two were done before."""
    trainer = uda(3)
    trainer.fit([(X, Y)], [(X, X)], steps=2, progress=False)
    trainer.fit([(X, Y)], [(X, X)], steps=4, validate_every=1)
    assert words(capsys) == ["at le", "about", "about", "after"]


def test_the_bar_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    with module.progress(True, name="fit", start=0, steps=4, dearer=[2]) as shown:
        for _ in range(4):
            shown.advance([], {})
            shown.bar.refresh()
    left = re.findall(r"(\d)/4, (at least )?\S+ left", terminal.getvalue())
    assert ("1", "at least ") in left
    assert ("3", "") in left
    assert not {step for step, bound in left if bound} & {"3", "4"}
