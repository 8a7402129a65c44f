"""Checks that a mode, a problem, networks and batches are compatible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import check_copies
from metapl.execution.layout import Layout
from metapl.execution.ranks import Ranks
from metapl.feedback import Estimator, modes_for
from metapl.problems import PseudoLabels
from metapl.problems.base import BilevelProblem, Problem, Signal, as_problem, enters_input, kind_of, revises


def prepare(problem: BilevelProblem | None, mode: Estimator) -> Problem:
    """The problem (default: pseudo-labels) with a kind of signal that the mode takes."""
    problem = PseudoLabels() if problem is None else problem
    if isinstance(problem, type):
        raise MetaplError(
            f"problem is the class {problem.__name__}; expected an instance: problem={problem.__name__}()."
        )
    if not isinstance(problem, BilevelProblem):
        raise MetaplError(
            f"problem is {checks.described(problem)}; expected an object with signal, inner_loss and outer_loss "
            "(metapl.BilevelProblem)."
        )
    return as_problem(problem).for_modes(mode.labels, mode.name)


def check_teacher(teacher: nn.Module | None, problem: Problem, **given: bool) -> None:
    """Refuse a problem without the teacher that makes its signal, and a teacher that is not used.

    Args:
        teacher, problem: None: no teacher.
        given: whether an option of the teacher was given, by its name; refused without one.
    """
    kind = kind_of(problem)
    if teacher is None and problem.has_teacher:
        raise MetaplError(f"teacher is None, and {kind} takes its signal from a teacher; expected a torch.nn.Module.")
    if teacher is not None and not problem.has_teacher:
        raise MetaplError(f"a teacher was given, and {kind} has none; expected teacher=None.")
    for name, is_given in given.items():
        if teacher is None and is_given:
            raise MetaplError(f"{name} was given with teacher=None, and there is no teacher to use it; leave it out.")


def check_batches(labeled: Any, unlabeled: Sequence[Any], device: torch.device, ranks: Ranks) -> None:
    """Refuse batches that are wrong, on one rank or on all, and ranks with unequal shares of a batch."""
    with ranks.agreed():
        checks.batches(labeled, unlabeled, device)
    if not ranks.alone:
        lengths = [len(next(t for t in pytree.tree_leaves(b) if isinstance(t, Tensor))) for b in (labeled, *unlabeled)]
        ranks.equal(
            lengths,
            "the ranks have unequal shares of a batch (rows of the labeled batch, then of the unlabeled: {counts}); "
            "expected the same number of rows on every rank, since a loss is the mean of the ranks' means.",
        )
        _check_same_rows((labeled, *unlabeled), ranks)


def _check_same_rows(batches: Sequence[Any], ranks: Ranks) -> None:
    """Refuse, in processes that have the same rows, batches that differ; columns of images cannot be compared."""
    if ranks.copies == 1:
        return
    leaves = [t for t in pytree.tree_leaves(list(batches)) if isinstance(t, Tensor)]
    leaves = [t for t in leaves if t.ndim < 3 or not ranks.columns]
    check_copies([t for t in leaves if not t.is_floating_point()], "labels, or other whole numbers of a batch,", ranks)
    check_copies([t for t in leaves if t.is_floating_point()], "rows of a batch", ranks)


def check_steps(mode: Estimator, steps: int, problem: Problem) -> None:
    """Refuse more student steps than a mode, or a problem, takes."""
    if steps > 1 and revises(problem):
        kind = kind_of(problem)
        raise MetaplError(
            f"{kind} takes the student's step again on a signal that it makes of the feedback, and this goes with one "
            f"step, but {steps} were given; give one batch (lookahead=1)."
        )
    if steps > 1 and not mode.looks_ahead:
        raise MetaplError(
            f"mode '{mode.name}' looks one student step ahead, and {steps} were given; give one batch (lookahead=1), "
            f"or use a mode that takes several: {', '.join(modes_for(looks_ahead=True))}."
        )


def check_layout(mode: Estimator, steps: int, problem: Problem, student: Layout) -> None:
    """Refuse what takes the student's weights and batch as a whole, where several processes share them."""
    if student.kind == "plain":
        return
    taken = (
        f"mode {mode.name!r}"
        if mode.one_process
        else f"a look-ahead of {steps} student steps"
        if steps > 1
        else f"{kind_of(problem)}, which makes its signal of the feedback,"
        if revises(problem)
        else None
    )
    how = "sharded" if student.is_sharded else "in DistributedDataParallel"
    if mode.credits == "signal" and enters_input(problem):
        raise MetaplError(
            f"the signal of {kind_of(problem)} enters the student's input, and mode {mode.name!r} takes no derivative "
            f"through the input of a student that is {how}; train in one process, or with sampled signals in mode "
            '"reinforce" or "loss_difference".'
        )
    if taken is not None:
        exact = "mode 'forward' (as exact as 'unrolled'), " if student.product_ranks == 1 else ""
        raise MetaplError(
            f"{taken} does not run on a student that is {how}. With one student step {exact}'difference' and the "
            "sampled modes run there; else train in one process."
        )


def check_input(mode: Estimator, problem: Problem) -> None:
    """Refuse what a signal in the student's input does not go with."""
    if not enters_input(problem):
        return
    if revises(problem):
        raise MetaplError(
            f"{kind_of(problem)} has revised_signal and student_input(batch, signal), and a step that is taken again "
            "on a revised signal has the first one's input; expected one of the two."
        )
    if mode.credits == "example":
        raise MetaplError(
            f"mode {mode.name!r} credits each label with its effect on the loss of its own example alone, and the "
            f"labels of {kind_of(problem)} enter the student's input, where they act on others too, such as through "
            'batch statistics; use mode "reinforce" or "loss_difference", or a differentiable signal.'
        )


def check_tangent(mode: Estimator, student: Layout) -> None:
    """Refuse forward mode where PyTorch has none, through the exchanges of tensor parallelism."""
    if student.product_ranks > 1 and mode.forward_mode:
        raise MetaplError(
            f"mode {mode.name!r} takes a pass in forward mode, which PyTorch does not have through the exchanges of "
            'parallelize_module; use mode="difference", or '
            'metapl.feedback.ReinforcePerExample(tangent="difference").'
        )


def check_kind(signal: Signal, mode: Estimator, problem: Problem, steps: int) -> None:
    """Refuse a signal of a kind that the mode cannot differentiate; ``steps`` of the student are taken."""
    sampled = signal.sampled
    if sampled and mode.credits == "signal" and enters_input(problem):
        raise MetaplError(
            f"mode {mode.name!r} takes the expectation over sampled labels, for which the inner loss must be linear in "
            f'the label, and the label of {kind_of(problem)} enters the student\'s input; use mode "reinforce" or '
            '"loss_difference", or a differentiable signal (without log_prob).'
        )
    if not sampled and not signal.differentiable() and mode.credits != "nothing":
        raise MetaplError(
            f"the problem's signal is {checks.described(signal.value)} without a log_prob, so mode '{mode.name}' has "
            "nothing to differentiate; expected a floating-point tensor, or the log_prob of each sampled value."
        )
    if ("hard" if sampled else "soft") not in mode.labels:
        if sampled:
            kinds = "is for differentiable signals, and the problem's signal is sampled (it carries log_prob)"
        else:
            kinds = "is for sampled signals, and the problem's signal is differentiable (it carries no log_prob)"
        fitting = ", ".join(modes_for("hard" if sampled else "soft", looks_ahead=steps > 1))
        raise MetaplError(f"mode '{mode.name}' {kinds}; expected one of the modes {fitting}.")
