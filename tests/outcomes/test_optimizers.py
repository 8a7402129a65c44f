"""The modes come out with the optimizers that people use, at usual rates."""

from __future__ import annotations

import pytest
from test_modes import COSINE, MODES
from trainings import Loop, Row, check, controls, marked

LOOPS = [
    Loop(optimizer=optimizer) for optimizer in ("Adam 1e-3", "AdamW 1e-3", "AdamW 1e-2", "Muon")
]

LONG = [Row(mode, loop) for loop in LOOPS for mode in (*MODES, COSINE)] + controls(LOOPS)

SLOW = (
    "300 steps at 1e-3 are few for sampled labels, whatever the feedback: 76.6 beside 87.0 by "
    "plain training"
)
RED = {
    Row("none", Loop(optimizer=optimizer), hard=True): SLOW
    for optimizer in ("Adam 1e-3", "AdamW 1e-3")
}


@pytest.mark.parametrize("row", marked([], LONG, RED))
def test_a_mode_comes_out_with_this_optimizer(row: Row) -> None:
    check(row)
