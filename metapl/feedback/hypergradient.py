"""The teacher's gradient through student steps, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution import checks
from metapl.execution.batch import micro_batches
from metapl.execution.buffers import Slots, explain_types, step_guard
from metapl.execution.kernels import NotByThisMode, checkpoints_without_reentry, overwritten_explained
from metapl.execution.layout import Layout, layouts
from metapl.execution.local import NOTHING
from metapl.execution.sharded import by_backward, student_of
from metapl.execution.writes import refuse_changed, tensors_in
from metapl.feedback import Feedback, Mode, estimator
from metapl.feedback.compatible import (
    both_batches,
    check_batches,
    check_kind,
    check_mode,
    check_teacher,
    name_others,
    prepare,
)
from metapl.feedback.inner_step import read_batch
from metapl.feedback.keeping import folder_of
from metapl.feedback.path import Lookahead, Path, inner_batches, take_steps
from metapl.feedback.resuming import Folder, settings, told
from metapl.feedback.teacher import TeacherPass
from metapl.problems.base import BilevelProblem, Signal
from metapl.runs.ownership import owned
from metapl.runs.progress import counted
from metapl.updates import Clipped, Update, options_by_step, update_of
from metapl.words import summary


@dataclass(frozen=True)
class Hypergradient:
    """The result of :func:`hypergradient`.

    Args:
        grads: dL(θ′)/dθ_T by teacher parameter name; zeros where the signal does not reach a parameter; empty without
            a teacher.
        feedback: h, minus the gradient of the labeled loss in the signal, in its shape; of a signal that is a dict of
            tensors, a dict of the same keys, without tensors of whole numbers. A tuple of K for a
            :class:`metapl.Lookahead`.
        inner_loss: the student's mean loss on the signal at θ, a scalar.
        outer_loss: L(θ′), a scalar.
        student_params: θ′ by parameter name, after the last step. Where the problem revises its signal, these and the
            losses are of the real step.
        inner_state: the TorchOpt state after the step, for the next call; None with a ``torch.optim`` optimizer.
        kept: which steps of a look-ahead kept their states, in words.
    """

    grads: dict[str, Tensor]
    feedback: Tensor | dict[str, Tensor] | tuple[Tensor | dict[str, Tensor], ...]
    inner_loss: Tensor
    outer_loss: Tensor
    student_params: dict[str, Tensor]
    inner_state: Any
    kept: str = ""

    def __repr__(self) -> str:
        state = None if self.inner_state is None else type(self.inner_state).__name__
        return summary("Hypergradient", **{**vars(self), "inner_state": state})


def hypergradient(
    teacher: nn.Module | None,
    student: nn.Module,
    *,
    labeled: Any = None,
    unlabeled: Any = None,
    outer: Any = None,
    inner: Any = None,
    mode: Mode = "forward",
    problem: BilevelProblem | None = None,
    inner_optimizer: Any,
    inner_state: Any = None,
    generator: torch.Generator | None = None,
    recompute_teacher: bool = False,
    accumulate: int = 1,
    progress: bool = False,
) -> Hypergradient:
    r"""The gradient of the labeled loss after the student's step or steps, in the teacher's weights.

    .. math:: \frac{d}{d\theta_T} L\big(U(\theta_S, \nabla_{\theta_S} \tfrac1B\sum_i
              \ell_i(S(x_u;\theta_S), \mathrm{signal}(\theta_T)))\big)

    Args:
        teacher, student: modules on one device; they run in the mode (train or eval) that they are in. In several
            processes, both in ``DistributedDataParallel`` or sharded by ``fully_shard``: the batches are then this
            rank's equal share, and the results of sharded networks DTensors. No teacher, None, for a problem that has
            none, such as :class:`metapl.problems.LearningToReweight`.
        labeled: (x_l, y_l) of the outer loss, B_l rows; x_l is a tensor, or a dict or tuple of tensors. A dict that
            also holds the labels, under ``labels``, is such a pair. For other batches see
            :meth:`metapl.problems.Problem.outer_batch`.
        unlabeled: x_u, or (weak, strong), of the inner step, B rows; any batch that ``problem`` reads. Or a
            :class:`metapl.Lookahead` of K such batches, for K student steps.
        outer, inner: other names of ``labeled`` and ``unlabeled``.
        mode: one of :data:`metapl.MODES`, or an estimator value. Take ``forward``; ``reinforce`` is the paper's
            Algorithm 1 and stays the trainer's default.
        problem: default :class:`metapl.PseudoLabels`, mean cross-entropy on both levels.
        inner_optimizer: a TorchOpt transform, or ``torch.optim`` SGD, Adam or AdamW over the student's parameters
            (its current state is read and left as it is).
        inner_state: the transform's state, from an earlier call.
        generator: for drawing labels; default: the default generator of the device.
        recompute_teacher, accumulate: as for :class:`metapl.BilevelTrainer`; with micro-batches the teacher's pass is
            recomputed too.
        progress: show on standard error how far a look-ahead is: the steps, and the steps back; a bar on a terminal,
            else a line a minute at most.

    Returns: a :class:`Hypergradient`. Weights, buffers, gradients and optimizer states stay bit for bit as they were;
    drawing labels without a generator, and dropout, advance the default generator once, as one forward pass would.

    Cost, bias: see the mode (:mod:`metapl.feedback`).

    Raises: :class:`metapl.MetaplError` before anything moves.

    >>> import torch, torchopt
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> result = hypergradient(teacher, student, labeled=(torch.randn(5, 4), torch.arange(5) % 3),
    ...                        unlabeled=torch.randn(6, 4), inner_optimizer=torchopt.sgd(0.1))
    >>> result.feedback.shape, sorted(result.grads)
    (torch.Size([6, 3]), ['bias', 'weight'])

    Source: Meta Pseudo Labels, eq. (3) and eq. (12).
    """
    labeled, unlabeled = both_batches(labeled, unlabeled, outer, inner)
    estimate = estimator(mode)
    problem = prepare(problem, estimate)
    check_teacher(teacher, problem, recompute_teacher=recompute_teacher)
    checks.whole_number(accumulate, f"accumulate={accumulate!r}", "a number of micro-batches")
    checks.is_generator(generator)
    of_teacher, of_student, device = layouts(teacher, student)
    student = of_student.network
    teacher = None if of_teacher is None else of_teacher.network
    asked = nn.Module() if teacher is None else teacher  # a problem without a teacher is given an empty module
    folder = folder_of(getattr(estimate, "keep_on", None)) if isinstance(unlabeled, Lookahead) else None
    update = update_of(inner_optimizer, of_student.parameters(), inner_state)
    labeled, batches = read_batch(problem, "outer_batch", labeled), _batches(unlabeled, made=folder is not None)
    options = _options_by_step(update, unlabeled)
    lazy = isinstance(batches, Lookahead)
    held = [batches[0]] if lazy else batches
    check_batches(labeled, held, device, of_student.ranks)
    slots, passes = Slots(asked), list[TeacherPass]()
    begun = student_of(of_student, update.parameters, double_backward=estimate.keep_graph, first=True)
    asked_of = estimate, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    begun.recall(asked_of)
    slots.recall(asked_of)
    for role, one in (("teacher", slots), ("student", begun.slots)):
        one.weights = one.compared(role, begun.waits) if len(batches) == 1 else None
    reader = teacher if problem.teacher_reads_inputs else None
    read = [(t, t._version) for t in tensors_in((labeled, held))]

    def explain(error: BaseException) -> None:
        if isinstance(error, RuntimeError):  # autograd's own, where a graph has saved what was changed
            refuse_changed(read, error)
        explain_types(labeled, held, {"student": student, "teacher": reader}, error)

    def teach(batch: Any, outputs: Tensor | None) -> Signal:
        recompute = of_teacher is not None and (recompute_teacher or accumulate > 1 or lazy)
        given = problem, batch, outputs, generator, recompute, of_student.ranks, slots
        step = TeacherPass(asked, *given, records=False)
        if lazy:
            step.batch = None
        if of_teacher is not None:
            passes.append(step)
        check_kind(step.signal, estimate, problem, len(batches))
        return step.signal

    with (
        NOTHING if folder is None else owned(folder, leaves_lock=False),
        step_guard(slots, begun.slots, device=device, generator=generator, moves=False, explain=explain),
        checkpoints_without_reentry(),
    ):
        check_mode(estimate, len(batches), problem, of_student)
        kept = None
        if folder is not None:
            of = {
                "a student": told(student),
                "a teacher": told(asked, recompute_teacher),
                "an outer batch": told(labeled),
                "inner batches": told(held),
                "a number of steps": len(batches),
                "an inner optimizer": told(
                    inner_optimizer,
                    settings(inner_optimizer),
                    getattr(update, "group_of", None),
                    update.read_state(),
                    str(options),
                ),
                "a problem": told(settings(problem)),
                "autocast": told(torch.is_autocast_enabled(device.type), str(torch.get_autocast_dtype(device.type))),
                "a generator=": told(generator is None),
                "a mode": told(estimate.name, str({**vars(estimate), "keep_on": None}), accumulate),
            }
            kept = Folder(folder, of, len(batches), problem, update, begun, (asked, slots), passes, generator)
        shown = partial(counted, progress, len(batches))
        with shown("steps", 0 if kept is None else kept.done) as tell:
            path = take_steps(
                begun,
                update,
                problem,
                labeled=labeled,
                batches=batches,
                teach=teach,
                parts=accumulate,
                keep_graph=estimate.keep_graph,
                keep_graphs=estimate.keep_graphs,
                keep=estimate.keeping,
                kept=kept,
                updates=[update.at(of_step) for of_step in options],
                credits=estimate.credits,
                first=True,
                tell=tell,
            )
        path.refuse_other(0, held[0])  # read twice
        with shown("steps back", len(path.found)) as path.tell:
            try:
                feedback, _ = estimate.checked_feedback(path, estimate.init())
            except (NotByThisMode, RuntimeError) as error:
                name_others(error, estimate, path)
                raise
        grads = {} if of_teacher is None else _teacher_gradient(of_teacher, path, passes, feedback, accumulate)
        h = tuple(found.of_batch(step) for step, found in zip(path.steps, feedback, strict=True))
        path = path.revised(h[-1])
        result = Hypergradient(
            grads=grads,
            feedback=h if isinstance(unlabeled, Lookahead) else h[0],
            inner_loss=path.inner_loss,
            outer_loss=path.outer_loss,
            student_params=of_student.as_parameters(path.params),
            inner_state=None if isinstance(inner_optimizer, torch.optim.Optimizer) else path.state,
            kept=path.keeping.words(len(batches)),
        )
        if kept is not None:
            kept.finish()
        for one, found in ((slots, True), (begun.slots, (begun.narrowed, begun.graphs))):
            if one.weights is not None:
                one.weights.check()
                refuse_changed(read)
            one.note(asked_of, found)
        return result


def _teacher_gradient(
    layout: Layout, path: Path, passes: Sequence[TeacherPass], feedback: Sequence[Feedback], parts: int
) -> dict[str, Tensor]:
    """The gradient of −Σ h·signal in the teacher's weights, over its passes on all micro-batches."""
    grads: dict[str, Tensor] = {}
    given = [h.on_given(step) if step.normalized else h for step, h in zip(path.steps, feedback, strict=True)]
    pieces = [piece for found in given for piece in found.chunks(parts)]

    def loss_of(number: int) -> Tensor:
        step = passes[number]
        if path.lazy:
            whole = micro_batches(path.batch(number // parts), parts, "unlabeled")
            step.batch = whole[number % parts]
        loss = pieces[number].teacher_loss(step.with_graph())
        step.batch = None if path.lazy else step.batch
        return loss

    losses = map(loss_of, range(len(passes)))
    # Where the passes were recomputed, one graph at a time.
    for loss in losses if passes[0].recompute else (torch.stack(list(losses)).sum(),):
        found = _gradient(layout, loss)
        grads = {name: grads[name] + g for name, g in found.items()} if grads else found
    return grads


def _batches(unlabeled: Any, *, made: bool) -> Sequence[Any]:
    """The inner batches, as a list unless they are to be read as they are taken, or are ``made`` so."""
    if isinstance(unlabeled, Lookahead):
        return unlabeled if made or unlabeled.lazy else list(unlabeled)
    return inner_batches(unlabeled)


def _options_by_step(update: Update, unlabeled: Any) -> list[list[dict[str, Any]]]:
    """The options of the inner optimizer in each step, where a schedule makes them differ."""
    schedule = unlabeled.schedule if isinstance(unlabeled, Lookahead) else None
    if schedule is None:
        return []
    optimizer: Any = getattr(update.inner if isinstance(update, Clipped) else update, "optimizer", None)
    if optimizer is None:
        update.at(())  # which refuses it
    return options_by_step(optimizer, schedule, len(unlabeled))


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
