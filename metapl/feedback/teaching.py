"""What the teacher says along a path, and the gradient of −Σ h·signal in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution.batch import micro_batches
from metapl.execution.buffers import Slots
from metapl.execution.kernels import overwritten_explained
from metapl.execution.layout import Layout
from metapl.execution.sharded import by_backward
from metapl.feedback.base import Estimator, Feedback
from metapl.feedback.compatible import check_kind
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.path import Path
from metapl.feedback.teacher import Known, TeacherPass
from metapl.problems.base import Problem, Signal


class Teaching:
    """The teacher's passes on the inner batches of a path, in their order.

    Args:
        layout: of the teacher; None: the problem has none, and is given an empty module.
        problem, estimate: the signal, and the mode that takes it.
        generator: of labels that are drawn.
        student: as it is laid out.
        batches: the inner ones; those of a look-ahead are read as they are taken, and not held.
        parts: micro-batches of each of them.
        recompute: as for :class:`TeacherPass`; True wherever batches are not held, or come in parts.
    """

    def __init__(
        self,
        layout: Layout | None,
        problem: Problem,
        estimate: Estimator,
        generator: torch.Generator | None,
        student: Layout,
        batches: Sequence[Any],
        parts: int,
        recompute: bool,
    ) -> None:
        self.layout, self.problem, self.estimate, self.generator = layout, problem, estimate, generator
        self.ranks, self.parts, self.steps = student.ranks, parts, len(batches)
        self.rereads, self.student = isinstance(batches, Lookahead), student.network if self.steps > 1 else None
        self.recompute = layout is not None and (recompute or parts > 1 or self.rereads)
        self.network = nn.Module() if layout is None else layout.network
        self.slots, self.passes = Slots(self.network), list[TeacherPass]()

    def __call__(self, batch: Any, outputs: Tensor | None) -> Signal:
        """The signal about a micro-batch, given the student's outputs on it."""
        step = self.made(batch, outputs)
        if self.rereads:
            step.batch = None
        if self.layout is not None:
            self.passes.append(step)
        check_kind(step.signal, self.estimate, self.problem, self.steps)
        return step.signal

    def made(self, batch: Any, outputs: Tensor | None, known: Known | None = None) -> TeacherPass:
        """A pass that is run, or that is known from before."""
        given = self.problem, batch, outputs, self.generator, self.recompute, self.ranks, self.slots
        return TeacherPass(self.network, *given, student=self.student, records=False, known=known)

    def gradient(self, path: Path, feedback: Sequence[Feedback]) -> dict[str, Tensor]:
        """The gradient of −Σ h·signal, over the passes on all micro-batches; empty without a teacher."""
        if self.layout is None:
            return {}
        grads: dict[str, Tensor] = {}
        given = [h.on_given(step) if step.normalized else h for step, h in zip(path.steps, feedback, strict=True)]
        pieces = [piece for found in given for piece in found.chunks(self.parts)]

        def loss_of(number: int) -> Tensor:
            step = self.passes[number]
            if self.rereads:
                whole = micro_batches(path.batch(number // self.parts), self.parts, "unlabeled")
                step.batch = whole[number % self.parts]
            loss = pieces[number].teacher_loss(step.with_graph())
            step.batch = None if self.rereads else step.batch
            return loss

        losses = map(loss_of, range(len(self.passes)))
        # Where the passes were recomputed, one graph at a time.
        for loss in losses if self.recompute else (torch.stack(list(losses)).sum(),):
            found = _gradient(self.layout, loss)
            grads = {name: grads[name] + g for name, g in found.items()} if grads else found
        return grads


def _gradient(layout: Layout, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss of which each rank has the terms of its rows."""
    parameters = layout.parameters()
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    if layout.is_sharded:
        found = by_backward(layout.ranks.size * loss, parameters)
        return {name: found[name] if name in found else torch.zeros_like(p) for name, p in parameters.items()}
    with overwritten_explained("teacher"):
        grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return {name: layout.ranks.sum(g) for name, g in zip(parameters, grads, strict=True)}
