"""``BilevelTrainer(teacher, student, mode="reinforce")`` and ``step`` in a plain loop come out."""

from __future__ import annotations

import pytest
from test_modes import COSINE, MODES
from trainings import Loop, Row, check, controls, marked

from metapl.feedback import Forward

RATES = ("default", "SGD 0.3")
"""Both networks' optimizers: the default, whose rate is 0.05, and the same at 0.3."""

QUICK = [Row("reinforce", Loop(way="step"))]

CONSTANT = [
    Row(mode, Loop(way="step", optimizer=rate)) for rate in RATES for mode in (*MODES, COSINE)
]
NORMALIZED = [
    Row(mode, Loop(way="step", optimizer=rate))
    for rate in RATES
    for mode in (Forward(normalization="learning_rate"), Forward(normalization="cosine"))
]

# Algorithm 1 as it is written: its mean over the batch keeps this weight small.
WRITTEN = [
    Row(mode, Loop(way="step", optimizer=rate), feedback_weight=1.0)
    for rate in RATES
    for mode in ("reinforce", "loss_difference")
]

WITHOUT_FEEDBACK = controls(Loop(way="step", optimizer=rate) for rate in RATES)

LONG = [row for row in CONSTANT + NORMALIZED + WRITTEN + WITHOUT_FEEDBACK if row not in QUICK]


@pytest.mark.parametrize("row", marked(QUICK, LONG))
def test_a_plain_loop_comes_out(row: Row) -> None:
    check(row)
