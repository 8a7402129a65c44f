"""Every mode and its options come out, at the defaults and by ``fit``.

As the loop without feedback, or above it.
"""

from __future__ import annotations

import pytest
from trainings import Loop, Row, check, controls, marked

from metapl.feedback import (
    Difference,
    Forward,
    Implicit,
    LossDifference,
    Reinforce,
    ReinforcePerExample,
)

IDENTITY = Implicit(solver="identity")
"""What the error of ``mode="implicit"`` sends people to.

The default solver refuses networks in training.
"""

MODES = (
    "forward",
    "reinforce",
    "loss_difference",
    "reinforce_per_example",
    "difference",
    "unrolled",
    IDENTITY,
)

COSINE = Reinforce(similarity="cosine", baseline=0.99)

SHORT = Loop(steps=200)

QUICK = [Row(mode, SHORT) for mode in ("forward", "reinforce", "loss_difference", COSINE)]

OPTIONS = [
    Row("forward"),
    Row("reinforce"),
    Row("loss_difference"),
    Row(COSINE),
    Row("forward", hard=True),
    Row(Forward(by="graph")),
    Row(Forward(by="tangent")),
    Row(Forward(by="double_backward")),
    Row(Forward(normalization="learning_rate")),
    Row(Forward(normalization="cosine")),
    Row("difference"),
    Row("difference", hard=True),
    Row("unrolled"),
    Row("reinforce_per_example"),
    Row(Reinforce(similarity="cosine")),
    Row(Reinforce(baseline=0.99)),
    Row(Reinforce(normalization="learning_rate")),
    Row(Reinforce(reduction="sum")),
    Row(ReinforcePerExample(normalization="learning_rate")),
    Row(ReinforcePerExample(normalization="cosine")),
    Row(ReinforcePerExample(tangent="difference")),
    Row(Difference(normalization="learning_rate")),
    Row(LossDifference(baseline=0.99)),
    Row(LossDifference(normalization="learning_rate")),
    Row(LossDifference(reduction="sum")),
    Row(IDENTITY),
    Row(Implicit(damping=1.0, iterations=3)),
    # Algorithm 1 as it is written, whose mean over the batch keeps this weight small.
    Row("reinforce", feedback_weight=1.0),
    Row("loss_difference", feedback_weight=1.0),
]

LOOPS = (
    Loop(unlabeled_batch=32),
    Loop(unlabeled_batch=512),
    Loop(labeled=20),
    Loop(noise=0.2),
    Loop(data="wine", labeled=30, unlabeled_batch=64),
    Loop(data="breast_cancer", labeled=20),
)

# ``difference`` and ``unrolled`` have the gradient of ``forward``, so that these say nothing more
# of another loop.
DISTINCT = ("forward", "reinforce", "loss_difference", "reinforce_per_example", IDENTITY)

LONG = (
    OPTIONS + [Row(mode, loop) for loop in LOOPS for mode in DISTINCT] + controls([Loop(), *LOOPS])
)


@pytest.mark.parametrize("row", marked(QUICK, LONG))
def test_a_mode_comes_out(row: Row) -> None:
    check(row)
