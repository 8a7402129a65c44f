"""Whether an inner loss is one of each example, and not a mean over the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metapl.execution.batch import Batch
from metapl.execution.state import trainable
from metapl.problems.base import BilevelProblem, Signal, enters_input

# Numbers of a relative difference up to this are the same number, rounded.
ROUNDING = 1e-5


def is_one_row(h: Tensor | None) -> bool:
    """Return whether all rows of a feedback are the same, and not 0."""
    if h is None or h.ndim == 0 or len(h) == 1:
        return False
    size = h.norm()
    return bool((h - h[:1]).norm() <= ROUNDING * size) and bool(size > 0)


def reads_other_rows(
    problem: BilevelProblem, student: nn.Module, batch: Batch, signal: Signal, outputs: Tensor
) -> bool:
    """Return whether the inner loss of the first example depends on the outputs on the others."""
    outputs = outputs.detach().clone().requires_grad_()
    # The loss may read what a forward leaves, such as an auxiliary loss.
    entering = [signal] if enters_input(problem) else []
    student(problem.student_input(batch, *entering))
    losses = problem.inner_loss(outputs, signal, batch, trainable(student))
    (in_outputs,) = torch.autograd.grad(losses[0], outputs, materialize_grads=True)
    return bool(in_outputs[1:].any())
