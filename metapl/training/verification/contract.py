"""What a step must keep whatever the differences say: the requirements of docs/contract.md, one function for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metapl.errors import few
from metapl.execution.batch import rows
from metapl.execution.state import trainable
from metapl.feedback import LossDifference
from metapl.problems.base import has_own, has_rows, sum_and_weight
from metapl.training.verification.case import EXACT, Case, flat
from metapl.training.verification.causes import likely_causes
from metapl.training.verification.real_step import Evaluation, Move


def breach_of_contract(case: Case) -> str:
    """Return in words the first of :data:`CONTRACT` that a step breaks; empty where it keeps all."""
    for breach in CONTRACT:
        text = breach(case)
        if text:
            return text
    return ""


def writes_weights(case: Case) -> str:
    """Return which weights a pass of the student, or a loss, has changed."""
    if not case.real.written:
        return ""
    return f"a pass of the student, or a loss, writes to its weights ({few(sorted(case.real.written), 3)})."


def has_another_outer_loss(case: Case) -> str:
    """Return both values of L(θ′) where the mode's is not that of the real step."""
    if has_own(case.step.problem, "revised_signal"):
        # The mode's value is that of a later step.
        return ""
    real, by_mode = float(case.real.loss), float(case.by_mode.outer_loss)
    if abs(by_mode - real) <= max(1e-6, 1000 * case.eps) * max(abs(real), 1e-3):
        return ""
    likely = "; ".join(likely_causes(case)) or (
        "state or random numbers of its own, a shared memory, or a loss that reads the network where inner_loss is "
        "given params"
    )
    return f"its L(θ′) is {by_mode:.6g}, and {real:.6g} after real steps: likely {likely}."


def has_another_difference(case: Case) -> str:
    """Return both values of L(θ) − L(θ′) where h of ``loss_difference`` is another one."""
    if not isinstance(case.mode, LossDifference):
        return ""
    before = float(Evaluation(case.step, takes_steps=False).loss)
    after = float(case.real.loss)
    h = float(flat(case.h))
    if abs(before - after - h) <= EXACT * abs(h) + max(1e-6, 1000 * case.eps) * 1e-3 * abs(after):
        return ""
    return f"h is {h:.6g}, and L(θ) − L(θ′) is {before - after:.6g}."


def has_no_log_probability(case: Case) -> str:
    """Return what is wrong with a ``log_prob`` that is not the logarithm of its value's probability."""
    for signal in case.real.signals:
        log_prob, value = signal.log_prob, signal.value
        is_of_classes = log_prob is not None and not value.is_floating_point() and value.shape == log_prob.shape
        if log_prob is None or not is_of_classes:
            continue
        if signal.probs is None:
            expected = log_prob.clamp(max=0)
        else:
            expected = signal.probs.gather(-1, value[..., None])[..., 0].log()
        if not torch.allclose(log_prob, expected, 1e-6, max(1e-6, 10 * case.eps)):
            return "log_prob is not the logarithm of a probability, that of the value that was drawn."
    return ""


def moves_past_the_signal(case: Case) -> str:
    """Return a sentence where the student's step moves with the teacher while the signal is held."""
    draw = torch.Generator().manual_seed(2)
    direction = {name: torch.randn(t.shape, generator=draw).to(t) for name, t in case.teacher_gradient.items()}
    if not direction:
        return ""
    held = Evaluation(case.step, Move("teacher", direction, 1e-2), signals=case.signals)
    rounding = 1000 * case.eps
    # Also the gradient, which a small rate or a fresh Adam hides from the loss.
    g, g_held = flat(case.real.gradients["inner"]), flat(held.gradients["inner"])
    gradient_moves = float(torch.dist(g, g_held)) > rounding * float(g.norm())
    loss = float(case.real.loss)
    loss_moves = abs(float(held.loss) - loss) > rounding * max(abs(loss), 1e-3)
    if case.outer_loss_reads_teacher:
        # The loss moves by the direct term, which the differences see.
        loss_moves = False
    if gradient_moves or loss_moves:
        return "the student's step moves while the signal is held: there is a way past the signal to it."
    return ""


def has_another_teacher_gradient(case: Case) -> str:
    """Return a sentence where the mode's gradient in the teacher is not that of −Σ h·signal."""
    by_mode = case.by_mode.grads
    if not by_mode:
        return ""
    of_h = flat({name: case.whole_gradient[name] for name in by_mode})
    if torch.dist(flat(by_mode), of_h) > case.tolerance * of_h.norm():
        return "the mode's gradient in the teacher is not that of its h."
    return ""


def has_losses_that_are_no_means(case: Case) -> str:
    """Return a loss of micro-batches that is no mean, by halves of the rows.

    That is an inner loss that is no mean over examples, or the (sum, weight) of an outer loss. An outer loss that
    returns a scalar is taken of all rows, and may be any function of them.
    """
    if case.step.micro_batches == 1:
        return ""
    copies, signal, theta = case.step.copied(), case.signals[0], trainable(case.step.student)
    problem, inner_batch = copies.problem, copies.inner_batches[0]
    outer_batch = problem.outer_batch(copies.outer_batch)
    inner_outputs, outer_outputs = case.real.outputs[0], case.real.outputs[-1].detach()
    has_rows_by_field = has_rows(problem, signal, len(inner_outputs))

    def inner_loss(begin: int, end: int) -> Any:
        fields = {}
        for name, t in signal.fields().items():
            fields[name] = t[begin:end] if has_rows_by_field.get(name, True) else t
        losses = problem.inner_loss(
            inner_outputs[begin:end], signal.having(fields), rows(inner_batch, begin, end), theta
        )
        return losses.mean()

    def outer_loss(begin: int, end: int) -> Any:
        return problem.outer_loss(outer_outputs[begin:end], rows(outer_batch, begin, end))

    for name, loss_of_rows, count in (
        ("inner_loss", inner_loss, len(inner_outputs)),
        ("outer_loss", outer_loss, len(outer_outputs)),
    ):
        half = count // 2
        if half == 0:
            continue
        total, weight = sum_and_weight(loss_of_rows(0, 2 * half))
        if name == "outer_loss" and not isinstance(weight, Tensor):
            # A scalar is taken of all rows at once, so that it may be any function of them.
            continue
        first_total, first_weight = sum_and_weight(loss_of_rows(0, half))
        second_total, second_weight = sum_and_weight(loss_of_rows(half, 2 * half))
        whole = (total / weight).item()
        by_halves = ((first_total + second_total) / (first_weight + second_weight)).item()
        if abs(whole - by_halves) > max(1e-6, 100 * case.eps) * max(abs(whole), abs(by_halves)):
            return f"{name} is {whole:.6g}, and {by_halves:.6g} by halves of the batch: no mean over examples."
    return ""


CONTRACT: tuple[Callable[[Case], str], ...] = (
    writes_weights,
    has_another_outer_loss,
    has_another_difference,
    has_no_log_probability,
    moves_past_the_signal,
    has_another_teacher_gradient,
    has_losses_that_are_no_means,
)
"""What a step must keep, in the order in which it is looked at; docs/contract.md has the table."""
