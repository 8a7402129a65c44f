"""A training keeps to its minutes: where the machine becomes slower, an even part is skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metapl import LossTrainer
from metapl.apps.pace import FINETUNED, FIRST_STEPS, SHARE, Part, Timetable

STEPS = 400


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fitted(
    slowness: list[float], clock: Clock, *, stops_at: int | None = None, **options: Any
) -> tuple[list[int], Timetable, Any]:
    """Fit for a minute of the clock; return the steps that were taken.

    Args:
        slowness: of the steps of each tenth of the fit, against what was measured.
        stops_at: the step in which the fit is stopped.
    """
    minutes = 1 / SHARE
    timetable = Timetable(clock, minutes=minutes)
    # Of 60 seconds for 400 steps, those of the last 160 take twice as long.
    measured = 60 / (240 + 2 * 160)
    if not options.get("resume"):
        timetable.parts = {"fit": [Part(0.0, 0.6, measured), Part(0.6, 1.0, 2 * measured)]}
    network = torch.nn.Linear(2, 2)
    trainer = LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    taken: list[int] = []
    step = trainer.step

    def timed_step(outer: Any, inner: Any = None) -> Any:
        number = trainer.steps_done
        if number == stops_at:
            raise KeyboardInterrupt
        taken.append(number)
        usual = measured if number < 240 else 2 * measured
        clock.now += usual * slowness[number * len(slowness) // STEPS]
        assert outer[0][0, 0] == number
        return step(outer, inner)

    trainer.step = timed_step  # type: ignore[method-assign]
    labels = torch.zeros(4, dtype=torch.int64)
    batches = [(torch.full((4, 2), float(number)), labels) for number in range(STEPS)]
    result = trainer.fit(
        batches,
        steps=STEPS,
        callbacks=timetable.pacers("fit", STEPS),
        progress=False,
        log_every=20,
        **options,
    )
    assert trainer.steps_done == STEPS
    return taken, timetable, result


def test_at_the_measured_pace_or_faster_every_step_is_taken() -> None:
    for slowness in ([1.0], [0.5]):
        taken, timetable, result = fitted(slowness, Clock())
        assert taken == [*range(STEPS)]
        assert timetable.counts == {"fit": {"taken": STEPS, "skipped": 0}}
        assert not any("skipped_steps" in row for row in result.history)


@pytest.mark.parametrize(("slowness", "left"), [(0.5, 28.0), (1.0, 56.0), (2.0, 56.0)])
def test_the_time_left_is_that_of_longer_steps_to_come_and_ends_with_the_phase(
    slowness: float, left: float
) -> None:
    """The first 37 of 400 steps say what the last 160 take, which are twice as long."""
    clock = Clock()
    timetable = Timetable(clock, minutes=1 / SHARE)
    measured = 60 / (240 + 2 * 160)
    timetable.parts = {"fit": [Part(0.0, 0.6, measured), Part(0.6, 1.0, 2 * measured)]}
    (pacer,) = timetable.pacers("fit", STEPS)
    for step in range(37):
        assert pacer.takes_step(step, is_needed=True)
        assert (pacer.seconds_left(step) is None) == (step < FIRST_STEPS)
        clock.now += slowness * measured
    seconds = pacer.seconds_left(37)
    assert seconds == pytest.approx(min(left, 60 - clock.now), abs=1.5)


@pytest.mark.parametrize("slowness", [[2.0], [1.0, 3.0], [3.0, 1.0], [1.0, 1.0, 1.0, 6.0]])
def test_on_a_slower_machine_an_even_part_is_skipped_and_the_fit_ends_in_time(
    slowness: list[float],
) -> None:
    clock = Clock()
    taken, timetable, result = fitted(slowness, clock)
    assert 55 < clock.now < 64
    assert len(taken) == STEPS - timetable.skipped < STEPS
    assert timetable.counts == {"fit": {"taken": len(taken), "skipped": STEPS - len(taken)}}
    # The rows say so, of all steps until then.
    assert result.history[-1]["skipped_steps"] == timetable.skipped
    # The rate falls to the end as it was planned, and rows are recorded as often.
    assert [row["step"] for row in result.history] == [*range(20, STEPS + 1, 20)]
    rates = [row["lr"] for row in result.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-4
    # What is skipped is spread: a row is recorded after a step of its own.
    gaps = [after - before for before, after in zip(taken, taken[1:], strict=False)]
    assert max(gaps) <= 20


@pytest.mark.parametrize("slowness", [1.0, 3.0])
def test_a_resumed_fit_has_the_minutes_that_are_left(slowness: float, tmp_path: Path) -> None:
    """The clock of another program begins anew, and its machine may be slower."""
    options: dict[str, Any] = {"out": tmp_path, "save_every": 20}
    first_clock = Clock()
    with pytest.raises(KeyboardInterrupt):
        fitted([1.0], first_clock, stops_at=210, **options)
    # At step 200 of 240 of the first kind it was saved.
    saved = 200 * 60 / (240 + 2 * 160)
    clock = Clock()
    clock.now = 1000.0
    taken, timetable, _ = fitted([slowness], clock, resume=True, **options)
    assert taken[0] == 200
    assert (timetable.skipped > 0) == (slowness > 1)
    # Those of the first part are counted too.
    assert timetable.counts["fit"]["taken"] == 200 + len(taken)
    assert 58 < saved + clock.now - 1000 < 64
    assert timetable.begun == pytest.approx(1000 - saved)


def test_without_minutes_or_for_a_phase_that_was_not_measured_nothing_is_skipped() -> None:
    timetable = Timetable()
    timetable.parts = {"fit": [Part(0.0, 1.0, 1.0)]}
    assert timetable.pacers("fit", 10) == []
    clock = Clock()
    timetable = Timetable(clock, minutes=1.0)
    timetable.parts = {"teacher": [Part(0.0, 1.0, 1.0)], "fit": [Part(0.0, 1.0, 3.0)]}
    (unmeasured,) = timetable.pacers("round-1", 100)
    clock.now = 99.0
    assert all(unmeasured.takes_step(step, is_needed=False) for step in range(100))
    (finetuning,) = timetable.pacers("finetune", 10)
    assert finetuning.ends == timetable.begun + FINETUNED * 60
    (first,) = timetable.pacers("teacher", 10)
    (second,) = timetable.pacers("fit", 10)
    # A phase leaves the time that the later ones take.
    assert second.ends - first.ends == pytest.approx(30.0)
