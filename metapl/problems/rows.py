"""Whether an inner loss, or a signal, is one of each example, and not one of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metapl.execution.batch import Batch, joined
from metapl.execution.numerics import as_real
from metapl.execution.state import RandomState, trainable
from metapl.problems.base import BilevelProblem, Signal, enters_input, modules_in
from metapl.problems.means import has_norms_without_statistics

# Numbers of a relative difference up to this are the same number, rounded.
ROUNDING = 1e-5

# A signal with smaller entries than this is rounding.
SMALLEST = 1e-6


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


def signal_reads_other_rows(
    problem: BilevelProblem,
    teacher: nn.Module,
    student: nn.Module,
    parts: Sequence[Batch],
    *,
    generator: torch.Generator | None,
    tolerance: float,
) -> bool:
    """Return whether the signal about two micro-batches together is another one than about each.

    The teacher is left in evaluation mode, where batch norm and dropout read no other row. What
    cannot be told is False: where a batch norm keeps no statistics, what comes out otherwise when
    it is asked for again, and of a signal that draws all but the probabilities.

    Args:
        problem, teacher: whose signal it is, as copies.
        student: a copy, for the outputs that the signal is asked for with.
        parts: the micro-batches.
        generator: draws labels.
        tolerance: of the greatest difference, relative to the greatest entry.

    Cost: a pass of the student, and two passes of the teacher on both micro-batches together.
    """
    networks = [teacher, *modules_in(problem)]
    if any(map(has_norms_without_statistics, networks)):
        return False
    for network in networks:
        network.eval()

    def signal_of(batch: Batch, outputs: Tensor | None) -> dict[str, Tensor]:
        signal = problem.signal(teacher, batch, outputs, generator=generator)
        return {name: as_real(t.detach()).double() for name, t in signal.fields().items()}

    outputs_of_parts: list[Tensor | None] = [None] * len(parts)
    outputs = None
    if not enters_input(problem):
        of_parts = [student(problem.student_input(part)).detach() for part in parts]
        outputs_of_parts = [*of_parts]
        outputs = joined(of_parts)
    device = next(student.parameters()).device
    random = RandomState.now(device, generator)
    # Loaded where it is used.
    from metapl.execution.joined_batches import joined_batches

    whole = signal_of(joined_batches(parts), outputs)
    draws = not RandomState.now(device, generator).equals(random)
    again = signal_of(joined_batches(parts), outputs)
    signals = [signal_of(part, z) for part, z in zip(parts, outputs_of_parts, strict=True)]
    for name, t in whole.items():
        if (draws and name != "probs") or not t.equal(again[name]):
            continue
        allowed = tolerance * max(float(t.abs().max()), SMALLEST)
        # Without rows, such as a matrix or one number, it is the same about every micro-batch.
        has_rows = t.ndim > 0 and t.shape != signals[0][name].shape and len(t) >= len(parts)
        pieces = t.chunk(len(parts)) if has_rows else [t] * len(parts)
        for signal, piece in zip(signals, pieces, strict=True):
            if not is_near(signal[name], piece, allowed):
                return True
    return False


def is_near(t: Tensor, expected: Tensor, allowed: float) -> bool:
    """Return whether no entry differs by more than is allowed; that is of one shape."""
    if t.shape != expected.shape:
        return False
    # Infinite entries have no difference.
    return bool(((t == expected) | ((t - expected).abs() <= allowed)).all())
