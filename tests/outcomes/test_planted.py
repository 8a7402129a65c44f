"""The suite can fail.

Where a default is put back to what it was, the rows named beside it go red.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_first_call
import test_modes
from outcome_table import all_rows
from test_command_outcomes import Train, digits_comparisons, no_figures, train
from trainings import Loop, Row, check_all

from metapl.feedback import Forward, loss_difference, reinforce
from metapl.training import trainer

__all__ = ["no_figures", "train"]  # fixtures

Plant = Callable[[pytest.MonkeyPatch], None]


def summed(patch: pytest.MonkeyPatch) -> None:
    """Sum the cross-entropies of sampled labels over the batch; Algorithm 1 has their mean."""
    for module in (reinforce, loss_difference):
        patch.setattr(module, "examples_of_mean", lambda reduction, step: 1)


def unbounded(patch: pytest.MonkeyPatch) -> None:
    """Give the feedback the weight 1, whatever its size."""
    patch.setattr(trainer, "DEFAULT_BOUND", None)


def summed_and_unbounded(patch: pytest.MonkeyPatch) -> None:
    """Do what ``mode="reinforce"`` did by default up to metapl 0.3."""
    summed(patch)
    unbounded(patch)


@dataclass(frozen=True)
class Fault:
    """A default that is put back, and the row that then has to be red in the test of its file."""

    plant: Plant
    test: Callable[[Row], None]
    row: Row

    @property
    def title(self) -> str:
        return f"{self.plant.__name__}, {self.row.title}"


FAST = Loop(way="step", optimizer="SGD 0.3")
IN_A_LOOP = test_first_call.test_a_plain_loop_comes_out
BY_FIT = test_modes.test_a_mode_comes_out

QUICK = [
    Fault(summed, IN_A_LOOP, Row("reinforce", FAST, feedback_weight=1.0)),
    Fault(unbounded, IN_A_LOOP, Row(test_modes.IDENTITY, FAST)),
]

LONG = [
    Fault(summed, IN_A_LOOP, Row("loss_difference", FAST, feedback_weight=1.0)),
    Fault(summed, IN_A_LOOP, Row("reinforce", Loop(way="step"), feedback_weight=1.0)),
    Fault(summed_and_unbounded, IN_A_LOOP, Row("reinforce", Loop(way="step"))),
    Fault(unbounded, IN_A_LOOP, Row(Forward(normalization="learning_rate"), FAST)),
    Fault(unbounded, BY_FIT, Row(Forward(normalization="learning_rate"))),
    Fault(unbounded, BY_FIT, Row(test_modes.IDENTITY)),
]

MARKED = [pytest.param(fault, id=fault.title) for fault in QUICK]
MARKED += [pytest.param(fault, id=fault.title, marks=pytest.mark.long) for fault in LONG]


@pytest.mark.parametrize("fault", MARKED)
def test_a_row_goes_red(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    # No fault reaches the controls, which have no feedback: they may be trained, and stay in the
    # cache, beside one.
    fault.plant(monkeypatch)
    with pytest.raises(AssertionError, match="beside"):
        fault.test(fault.row)


def test_the_rows_that_faults_redden_are_in_the_suite() -> None:
    assert {fault.row for fault in QUICK + LONG} <= {*all_rows()}


@pytest.mark.long
def test_a_training_by_the_command_goes_red(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    summed_and_unbounded(monkeypatch)
    with pytest.raises(AssertionError, match="beside"):
        check_all(digits_comparisons(train, "reinforce", steps=600, seeds=(0,)))
