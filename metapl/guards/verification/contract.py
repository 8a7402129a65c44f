"""What a step must keep whatever the differences say.

The requirements of docs/contract.md, one function for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.batch import rows
from metapl.execution.checks import described
from metapl.execution.graphs import leaves_in_graph
from metapl.execution.state import trainable
from metapl.guards.door import ids, name_in
from metapl.guards.verification.case import EXACT, Case, flat
from metapl.guards.verification.causes import changing_loss, likely_causes
from metapl.guards.verification.real_step import Evaluation
from metapl.problems.base import enters_input, has_rows, kind_of, overrides, sum_and_weight
from metapl.problems.rows import is_one_row, reads_other_rows, signal_reads_other_rows


def breach_of_contract(case: Case) -> str:
    """Return in words the first of :data:`CONTRACT` that a step breaks.

    Empty where it keeps all.
    """
    for breach in CONTRACT:
        text = breach(case)
        if text:
            return text
    return ""


def writes_weights(case: Case) -> str:
    """Return which weights a pass of the student, or a loss, has changed."""
    if not case.real.written:
        return ""
    return (
        "a pass of the student, or a loss, writes to its weights "
        f"({few(sorted(case.real.written), 3)})."
    )


def has_another_outer_loss(case: Case) -> str:
    """Return both values of L(θ′) where the mode's is not that of the real step."""
    if overrides(case.step.problem, "revised_signal"):
        # The mode's value is that of a later step.
        return ""
    real = float(case.real.loss)
    by_mode = float(case.by_mode.outer_loss)
    if abs(by_mode - real) <= max(1e-6, 1000 * case.eps) * max(abs(real), 1e-3):
        return ""
    likely = "; ".join(likely_causes(case)) or (
        "state or random numbers of its own, a shared memory, or a loss that reads the network "
        "where inner_loss is given params"
    )
    return f"its L(θ′) is {by_mode:.6g}, and {real:.6g} after real steps: likely {likely}."


def has_another_difference(case: Case) -> str:
    """Return both values of h where it is made of L(θ) and L(θ′), and is another one."""
    if case.mode.h_of_losses(case.real.loss, case.real.loss) is None:
        return ""
    before = Evaluation(case.step, takes_steps=False).loss
    after = case.real.loss
    expected = case.mode.h_of_losses(before, after)
    assert expected is not None, "it is made of these"
    h = flat(case.h)
    rounding = max(1e-6, 1000 * case.eps) * 1e-3 * after.abs()
    if bool((expected - h).abs() <= EXACT * h.abs() + rounding):
        return ""
    return f"h is {float(h):.6g}, and by L(θ) and L(θ′) it is {float(expected):.6g}."


def has_no_log_probability(case: Case) -> str:
    """Return a sentence on a ``log_prob`` that is not the logarithm of its value's probability."""
    for signal in case.real.signals:
        log_prob = signal.log_prob
        value = signal.value
        if log_prob is None or value.is_floating_point() or value.shape != log_prob.shape:
            continue
        expected = log_prob.clamp(max=0)
        if signal.probs is not None:
            expected = signal.probs.gather(-1, value[..., None])[..., 0].log()
        if not torch.allclose(log_prob, expected, 1e-6, max(1e-6, 10 * case.eps)):
            return "log_prob is not the logarithm of the probability of the value that was drawn."
    return ""


def has_another_teacher_gradient(case: Case) -> str:
    """Return a sentence where the mode's gradient in the teacher is not that of −Σ h·signal."""
    by_mode = case.by_mode.grads
    if not by_mode:
        return ""
    if not flat(by_mode).isfinite().all():
        return (
            "h is finite, and its gradient in the teacher is NaN or infinite: the signal has no "
            "derivative here, as a square root at 0."
        )
    of_h = flat({name: case.whole_gradient[name] for name in by_mode})
    if torch.dist(flat(by_mode), of_h) > case.tolerance * of_h.norm():
        return "the mode's gradient in the teacher is not that of its h."
    return ""


def has_a_signal_of_other_weights(case: Case) -> str:
    """Return which parameters a signal is made of that are of neither network."""
    if not case.by_mode.grads or not case.h:
        return ""
    copies = case.real.copies
    of_problem = ids(copies.problem_parameters)
    assert copies.teacher is not None, "the gradient is in its parameters"
    of_networks = ids(nn.ModuleList([copies.teacher, copies.student]).parameters())
    others = []
    for leaf in leaves_in_graph(case.score(case.real)):
        lasts = isinstance(leaf, nn.Parameter) or id(leaf) in of_problem
        if lasts and id(leaf) not in of_networks:
            others.append(name_in(copies.problem, leaf) or described(leaf))
    if not others:
        return ""
    return (
        f"the signal depends on {few(others, 3)} of neither network, which nothing learns; "
        "expected a parameter of the teacher, or .detach() of it."
    )


def reads_more_than_labels(case: Case) -> str:
    """Return what an inner loss differentiably reads of a drawn signal beside its labels."""
    reached = ids(leaves_in_graph(case.real.inner_loss))
    read = [name for name, t in case.real.beside_labels.items() if id(t) in reached]
    if not read:
        return ""
    return (
        f"the inner loss reads {few(read)} of a signal of drawn labels, through which no feedback "
        "goes; expected .detach() of it there, or a signal without log_prob, which is soft."
    )


def has_losses_that_are_no_means(case: Case) -> str:
    """Return a loss of micro-batches that is no mean, by halves of the rows.

    That is an inner loss that is no mean over examples, or an outer loss that is neither that nor
    a sum and its weight. Or a signal about two micro-batches that is not that about each.
    """
    if case.step.micro_batches == 1:
        return ""
    copies = case.step.copied()
    signal = case.signals[0]
    problem = copies.problem
    outer_batch = problem.outer_batch(copies.outer_batch)
    inner_outputs = case.real.outputs[0]
    outer_outputs = case.real.outputs[-1].detach()
    has_rows_by_field = has_rows(problem, signal, len(inner_outputs))

    def inner_loss(begin: int, end: int) -> Any:
        fields = {}
        for name, t in signal.fields().items():
            fields[name] = t[begin:end] if has_rows_by_field.get(name, True) else t
        of_rows = rows(copies.inner_batches[0], begin, end)
        signal_of_rows = signal.having(fields)
        # The loss may read what a forward leaves, such as an auxiliary loss: that of these rows. A
        # batch norm takes no single row.
        copies.random.restore()
        if end - begin > 1:
            entering = [signal_of_rows] if enters_input(problem) else []
            copies.student(problem.student_input(of_rows, *entering))
        theta = trainable(copies.student)
        try:
            losses = problem.inner_loss(inner_outputs[begin:end], signal_of_rows, of_rows, theta)
        except (IndexError, RuntimeError) as error:
            cut = f"{kind_of(problem)}.inner_loss, of some rows of its signal: {reason_of(error)}"
            raise MetaplError(f"{cut}; expected signal_has_rows = False without rows.") from error
        return losses.mean().detach()

    def outer_loss(begin: int, end: int) -> Any:
        return problem.outer_loss(outer_outputs[begin:end], rows(outer_batch, begin, end))

    text = ""
    with copies.in_the_originals():
        for name, loss_of_rows, count in (
            ("inner_loss", inner_loss, len(inner_outputs)),
            ("outer_loss", outer_loss, len(outer_outputs)),
        ):
            text = text or difference_of_halves(case, name, loss_of_rows, half=count // 2)
    text = text or signal_of_the_batch(case)
    return (changing_loss(case.real) or text) if text else ""


def has_one_mean_for_all_losses(case: Case) -> str:
    """Return a sentence where each example's loss is a mean over the batch, times its weight.

    Its shape is that of losses by example, and each weight gets the feedback of all examples.
    """
    if not is_one_row(case.h.get((0, "value"))):
        return ""
    copies = case.step.copied()
    first = (copies.inner_batches[0], case.signals[0], case.real.outputs[0])
    with copies.in_the_originals():
        if reads_other_rows(copies.problem, copies.student, *first):
            return "inner_loss is a mean; expected one loss per example, by reduction='none'."
    return ""


def signal_of_the_batch(case: Case) -> str:
    """Return a sentence on a signal about two micro-batches that is not that about each."""
    # Weights that are all the same, as of a fresh teacher, would hide that they are normalized.
    copies = case.step.perturbed()
    problem = copies.problem
    parts = [copies.inner_batches[0], copies.other_part]
    networks = nn.Module() if copies.teacher is None else copies.teacher, copies.student
    tolerance = max(1e-6, 1e4 * case.eps)
    with copies.in_the_originals():
        if problem.signal_of_batch or not signal_reads_other_rows(
            problem, *networks, parts, generator=copies.generator, tolerance=tolerance
        ):
            return ""
    return (
        f"the signal of {kind_of(problem)} about two micro-batches is not that about each: it "
        "depends on other rows; expected signal_of_batch = True, by which it is asked for once "
        "about the whole batch, or accumulate=1."
    )


def difference_of_halves(
    case: Case, name: str, loss_of_rows: Callable[[int, int], Any], half: int
) -> str:
    """Return a sentence on a loss that is not the mean of those of two halves of its rows.

    Args:
        name: of the loss.
        loss_of_rows: the loss of the rows from one number to another.
        half: of the number of rows.
    """
    if half == 0:
        return ""
    total, weight = sum_and_weight(loss_of_rows(0, 2 * half))
    first_total, first_weight = sum_and_weight(loss_of_rows(0, half))
    second_total, second_weight = sum_and_weight(loss_of_rows(half, 2 * half))
    of_all_rows = (total / weight).item()
    by_halves = ((first_total + second_total) / (first_weight + second_weight)).item()
    size = max(abs(of_all_rows), abs(by_halves))
    if abs(of_all_rows - by_halves) <= max(1e-6, 100 * case.eps) * size:
        return ""
    # A signal with as many numbers as there are rows was halved as the rows are.
    cut = ", signal_has_rows = False of a signal without rows" if name == "inner_loss" else ""
    return (
        f"{name} is {of_all_rows:.6g}, and {by_halves:.6g} by halves of the batch: no mean over "
        f"examples; expected one{cut}, (sum, weight) from outer_loss (mean_over of a teacher's own "
        "loss), or accumulate=1, as for a loss that draws."
    )


CONTRACT: tuple[Callable[[Case], str], ...] = (
    writes_weights,
    has_another_outer_loss,
    has_another_difference,
    has_no_log_probability,
    has_another_teacher_gradient,
    has_a_signal_of_other_weights,
    reads_more_than_labels,
    has_losses_that_are_no_means,
    has_one_mean_for_all_losses,
)
"""What a step must keep, in the order in which it is looked at; docs/contract.md has the table."""
