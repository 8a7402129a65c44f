"""The gradient through student steps as a function.

Its first call is verified, on either road.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from metapl.core.lookahead import require_batches
from metapl.core.replays import REPLAY_TOLERANCE, Tolerance
from metapl.execution.batch import Batch
from metapl.execution.state import one_at_a_time
from metapl.feedback import Mode, estimator
from metapl.feedback.hypergradient import Differentiation, Hypergradient, Request
from metapl.guards.door import look_at_call
from metapl.problems.base import BilevelProblem
from metapl.runs.fields import AboveZero, MicroBatches, check_arguments
from metapl.updates import InnerOptimizer, Update
from metapl.updates.base import OptimizerState


@one_at_a_time
def hypergradient(
    teacher: nn.Module | None,
    student: nn.Module,
    *,
    outer: Batch,
    inner: Batch,
    mode: Mode = "forward",
    problem: BilevelProblem | None = None,
    inner_optimizer: InnerOptimizer | Update,
    inner_state: OptimizerState = None,
    generator: torch.Generator | None = None,
    recompute_teacher: bool = False,
    accumulate: MicroBatches = 1,
    clip_norm: AboveZero | None = None,
    progress: bool = False,
    wrt: str | Sequence[str] = ("teacher",),
    tasks: bool = False,
    compile: bool = False,
    verify: bool | Literal["warn"] = True,
    replay_tolerance: Tolerance = REPLAY_TOLERANCE,
) -> Hypergradient:
    r"""Return the gradient, in the teacher's weights, of the outer loss after student steps.

    .. math:: \frac{d}{d\theta_T} L\big(U(\theta_S, \nabla_{\theta_S} \tfrac1B\sum_i
              \ell_i(S(x_u;\theta_S), \mathrm{signal}(\theta_T)))\big)

    Args:
        teacher, student: modules on one device, which train or evaluate, as they are. In
            several processes, both in ``DistributedDataParallel`` or sharded by ``fully_shard``:
            the batches are then this rank's equal share, and the results of sharded networks
            DTensors. No teacher, None, for a problem that has none, such as
            :class:`metapl.problems.LearningToReweight`.
        outer: (x_l, y_l) of the outer loss, B_l rows, or what
            :meth:`metapl.BilevelProblem.outer_batch` reads; x_l is a tensor, or a dict or tuple of
            them. A dict that also holds the labels, under ``labels``, is such a pair.
        inner: x_u, or (weak, strong), of the inner step, B rows; any batch that ``problem`` reads.
            Or a :class:`metapl.Lookahead` of K such batches, for K student steps.
        mode: one of :data:`metapl.MODES`, or an estimator value.
        problem: default :class:`metapl.PseudoLabels`, mean cross-entropy on both levels.
        inner_optimizer: a TorchOpt transform, or ``torch.optim`` SGD, Adam, AdamW or Muon over the
            student's parameters, or a tuple of these, whose states stay as they are. Muon's
            products are taken in the type of the weights.
        inner_state: the transform's state, from an earlier call.
        generator: for drawing labels; default: the default generator of the device.
        recompute_teacher, accumulate, clip_norm: as for :class:`metapl.BilevelTrainer`; with
            micro-batches the teacher's pass is recomputed too.
        progress: show on a terminal how far a look-ahead is: the steps, and the steps back.
        wrt: what to differentiate with respect to: ``"teacher"``; ``"start"``, the student's first
            weights; names of settings of ``torch.optim``'s inner optimizer, step by step and by
            param group: ``"lr"``, ``"momentum"``, ``"dampening"``, ``"weight_decay"`` of SGD,
            ``"lr"``, ``"betas"``, ``"eps"``, ``"weight_decay"`` of Adam and AdamW, ``"lr"``,
            ``"momentum"``, ``"eps"``, ``"weight_decay"`` of Muon. Modes ``forward`` and
            ``unrolled``, and no problem that revises its signal. Cost: of the start, the
            Hessian product of the first step; of settings, a few operations per weight. With
            ``truncate=T``, the gradient in the start is that in θ_{K-T}: dθ_{K-T}/dθ_0 counts as
            the identity; ``truncate=0`` is first-order MAML, ∇L(θ_K). The bias is the factor
            (∂θ_{K-T}/∂θ_0)ᵀ - 1 = O(η(K-T)‖∂²ℓ/∂θ²‖). Settings of earlier steps get zeros.
        tasks: whether every tensor of the batches has a first dimension of T tasks, each of which
            begins with the student's weights, with draws and batch statistics of its own. Gradients
            and losses are means over the tasks, the feedback is of that mean, and it and
            ``student_params`` have that dimension too. The steps are recorded once, some ms an
            operation, and mapped (:mod:`metapl.functional.tasks`); the first task is verified.
            Modes and optimizers as for ``compile``; the memory of T trainings with their graphs.
        compile: one step, and its adjoint, recorded and compiled, in a loop over the steps
            (:mod:`metapl.functional.training`): modes ``forward`` and ``unrolled``, ``torch.optim``
            and signals that are not drawn, in one process. It pays from some hundreds of steps on,
            or where calls are repeated: one for networks of the same architecture, such as another
            student, with optimizers and a problem of the same types and numbers, compiles nothing
            (:mod:`metapl.functional.architecture`). With tasks, all steps as one graph.
        verify: compare the teacher's gradient, or without a teacher h, with differences of the loss
            after real steps, and refuse one that is wrong (:func:`metapl.check_gradient`); or
            ``"warn"`` of it; or never, False. That is done in the first call: a later one is known
            by its networks (their modes, frozen parts and hooks), problem, optimizer and its step's
            hooks, mode, ``wrt``, ``accumulate`` and number of steps, up to three; or, where some of
            these are new objects, by what they compute, so that another student of one architecture
            is known. What cannot be described (a hook, a tensor in an attribute, a transform) is
            known by its object. Cost of the first call: the mode once and some six real steps on
            copies in float64, of a look-ahead the first three; of another, a look-up. Above 50
            million weights and in several processes nothing is verified, and a line says so.
            Gradients in the start and in settings are not compared.
        replay_tolerance: the most that the result's ``replay_error`` may be: a look-ahead whose
            steps come out otherwise when they are computed again is refused above it, and a larger
            number allows more. Deterministic algorithms are asked for while a look-ahead runs.

    Returns: a :class:`Hypergradient`. Weights, buffers, gradients and optimizer states stay bit for
    bit as they were; drawing labels without a generator, and dropout, advance the default generator
    as the passes forward do. Cost, bias: see the mode (:mod:`metapl.feedback`). Raises:
    :class:`metapl.MetaplError` before anything moves.

    >>> import torch, torchopt
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> result = hypergradient(teacher, student, outer=(torch.randn(5, 4), torch.arange(5) % 3),
    ...                        inner=torch.randn(6, 4), inner_optimizer=torchopt.sgd(0.1))
    >>> result.feedback.shape, sorted(result.grads)
    (torch.Size([6, 3]), ['bias', 'weight'])

    Source: Meta Pseudo Labels, eq. (3) and eq. (12).
    """
    require_batches(outer, inner)
    check_arguments(hypergradient, {**locals(), "mode": estimator(mode)})
    request = Request(
        teacher=teacher,
        student=student,
        outer=outer,
        inner=inner,
        mode=mode,
        problem=problem,
        inner_optimizer=inner_optimizer,
        inner_state=inner_state,
        generator=generator,
        recompute_teacher=recompute_teacher,
        accumulate=accumulate,
        clip_norm=clip_norm,
        shows_progress=progress,
        wrt=wrt,
        replay_tolerance=replay_tolerance,
    )
    if tasks:
        # Loaded where it is used. What is looked at and verified is the first task.
        from metapl.functional.tasks import Tasks, over_tasks

        stacked = Tasks.of(outer, inner)
        request = stacked.request_of(0, request)
    differentiation = Differentiation(request, compiles=compile)
    look_at_call(differentiation)
    orders = None
    if verify and differentiation.estimate.gives_gradient:
        # Loaded where it is used.
        from metapl.guards.verification.first_calls import verify_first_call

        orders = verify_first_call(differentiation, verify)
    if tasks:
        return over_tasks(differentiation, stacked, compile=compile)
    if compile:
        from metapl.functional.training import compiled

        return compiled(differentiation)
    return differentiation.find(orders)


@one_at_a_time
def verify_hypergradient(
    student: nn.Module,
    *,
    outer: Batch,
    inner: Batch,
    problem: BilevelProblem,
    inner_optimizer: InnerOptimizer,
    clip_norm: float | None,
    verify: bool | Literal["warn"],
) -> None:
    """Look at a call of :func:`hypergradient` without a teacher, and verify it, where it is new.

    The arguments are those of that call.
    """
    from metapl.guards.verification.first_calls import verify_first_call

    request = Request(
        teacher=None,
        student=student,
        outer=outer,
        inner=inner,
        mode="forward",
        problem=problem,
        inner_optimizer=inner_optimizer,
        clip_norm=clip_norm,
    )
    differentiation = Differentiation(request)
    look_at_call(differentiation)
    verify_first_call(differentiation, verify)
