"""The modes come out with the optimizers that people use, at usual rates."""

from __future__ import annotations

import pytest
from test_modes import MODES
from trainings import Loop, Row, check, controls, marked

from metapl.feedback import Reinforce

LOOPS = [Loop(optimizer=optimizer) for optimizer in ("Adam 1e-3", "AdamW 1e-3", "AdamW 1e-2", "Muon")]

QUICK = [Row("reinforce", Loop(optimizer="AdamW 1e-2"))]

COSINE = Reinforce(similarity="cosine", baseline=0.99)

OTHERS = [Row(mode, loop) for loop in LOOPS for mode in (*MODES, COSINE)] + controls(LOOPS)

LONG = [row for row in OTHERS if row not in QUICK]


@pytest.mark.parametrize("row", marked(QUICK, LONG))
def test_a_mode_comes_out_with_this_optimizer(row: Row) -> None:
    check(row)
