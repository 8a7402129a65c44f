"""The teacher's gradient through student steps, as a function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import both_batches
from metapl.execution.checks import generator_of
from metapl.execution.layout import layouts
from metapl.execution.local import NOTHING, LocalStudent
from metapl.execution.numerics import deterministic, float32_products, no_fast_path
from metapl.execution.sharded import ShardedStudent
from metapl.execution.state import RandomState, one_at_a_time, replayed, restored
from metapl.feedback import Estimator, Mode, check_mode, check_teacher, estimator, prepare
from metapl.feedback.advice import advice_on
from metapl.feedback.door import (
    has_direct_term,
    outer_loss_reads_more,
    refuse_direct_term_in_parts,
    refuse_gradients_of_batches,
    refuse_learned_settings,
)
from metapl.feedback.lookahead import Lookahead, outer_batches
from metapl.feedback.order import Order, Orders
from metapl.feedback.path import OuterLosses, take_steps
from metapl.feedback.replays import REPLAY_TOLERANCE, ReplayCheck, Tolerance
from metapl.feedback.teacher import Teaching
from metapl.problems.base import BilevelProblem, kind_of
from metapl.runs.fields import AboveZero, MicroBatches, check_arguments
from metapl.runs.terminal import step_bar
from metapl.updates import Clipped, Options, as_one, entry_shape, options_of, update_of
from metapl.words import summary


@dataclass(frozen=True)
class Hypergradient:
    """The result of :func:`hypergradient`.

    Args:
        grads: dL(θ′)/dθ_T by teacher parameter name; zeros where the signal does not reach a parameter; empty without
            a teacher.
        feedback: h, minus the gradient of the labeled loss with respect to the signal, as the mode shapes it; of a dict
            of tensors, a dict of those of floating point. A tuple of K for a :class:`metapl.Lookahead`.
        inner_loss, outer_loss: the student's mean loss on the signal at θ, and L(θ′), scalars; of a
            :class:`metapl.Lookahead` of outer batches Σ_k weight_k L_k(θ_k).
        student_params: θ′ by parameter name, after the last step; of the real one where the problem revises its signal.
        inner_state: the TorchOpt state after the step, for the next call; None with a ``torch.optim`` optimizer.
        kept: which steps of a look-ahead kept their states, in words; empty without one.
        start: dL(θ_K)/dθ_0 by student parameter name, where ``wrt`` names it.
        settings: by the names in ``wrt``: dL(θ_K)/d(setting) of each step and param group, (K, groups); of ``betas``,
            (K, groups, 2); float64. Where a group has a rate for each entry of its weight, ``settings["lr"]`` is a list
            by group: (K, ...) with the shape of the group's rate, (K,) of a group with a number.
        direct: where the outer loss reads the teacher, through a module that the problem holds or by
            ``outer_input(batch, signal)``: ∂L(θ′; φ)/∂φ at fixed θ′ by teacher parameter name, a part of ``grads``;
            empty elsewhere, and in the modes that leave it out (``none`` and the sampled ones).
        order: in which order the second derivative was taken (:mod:`metapl.feedback.order`): ``"graph"``,
            ``"tangent"``, ``"double_backward"``, ``"outputs"`` or ``"losses"``; empty in modes that take none, and
            compiled. ``Forward(by=result.order)`` takes the same without trying.
        outer_losses: L_k(θ_k) after each step, (K,), for a :class:`metapl.Lookahead` of outer batches; else None.
        replay_error: the largest relative difference, in the weights or in the optimizer's state, between a state that
            was kept and the same state computed again; 0.0 where they are equal bit for bit, or no step was computed
            again.
        float32_products: in what precision matrix products and convolutions of float32 were taken on the device:
            ``"ieee"``, ``"tf32"`` or ``"bf16"`` by name; empty for a device that has no such switches.
    """

    grads: dict[str, Tensor]
    feedback: Any
    inner_loss: Tensor
    outer_loss: Tensor
    student_params: dict[str, Tensor]
    inner_state: Any
    kept: str = ""
    start: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    order: str = ""
    direct: dict[str, Tensor] = field(default_factory=dict)
    outer_losses: Tensor | None = None
    replay_error: float = 0.0
    float32_products: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        state = None if self.inner_state is None else type(self.inner_state).__name__
        return summary("Hypergradient", **{**vars(self), "inner_state": state})


def stacked_settings(found: Sequence[Any], names: Sequence[str], options: Options) -> dict[str, Any]:
    """Gradients in settings by name, (K, groups, ...); 0 where a group has no such setting. Of a setting with a value
    for each entry of a weight in one of the groups' ``options``, a list by group, (K, ...)."""

    def of_groups(groups: Sequence[Mapping[str, Any]], name: str) -> list[Tensor]:
        held = [group.get(name) for group in groups]
        values = [torch.stack([*t]) if isinstance(t, tuple | list) else t for t in held]  # betas
        nothing = torch.zeros_like(min((t for t in values if t is not None), key=Tensor.numel))
        return [nothing if t is None else t for t in values]

    stacked = dict[str, Any]()
    for name in names:
        by_step = [of_groups(groups, name) for groups in found]
        if any(entry_shape(group.get(name)) for group in options):
            stacked[name] = [torch.stack(of_group) for of_group in zip(*by_step, strict=True)]
        else:
            stacked[name] = torch.stack([torch.stack(of_step) for of_step in by_step])
    return stacked


def as_leaf(setting: Any) -> Tensor:
    """Return a setting as a leaf of a graph, in float64."""
    return torch.as_tensor(setting, dtype=torch.float64).detach().clone().requires_grad_()


@one_at_a_time
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
    accumulate: MicroBatches = 1,
    clip_norm: AboveZero | None = None,
    progress: bool = False,
    wrt: str | Sequence[str] = ("teacher",),
    compile: bool = False,
    verify: bool | Literal["warn"] = False,
    replay_tolerance: Tolerance = REPLAY_TOLERANCE,
) -> Hypergradient:
    r"""The gradient of the labeled loss after the student's step or steps, with respect to the teacher's weights.

    .. math:: \frac{d}{d\theta_T} L\big(U(\theta_S, \nabla_{\theta_S} \tfrac1B\sum_i
              \ell_i(S(x_u;\theta_S), \mathrm{signal}(\theta_T)))\big)

    Args:
        teacher, student: modules on one device, in the mode (train or eval) that they are in. In several processes,
            both in ``DistributedDataParallel`` or sharded by ``fully_shard``: the batches are then this rank's equal
            share, and the results of sharded networks DTensors. No teacher, None, for a problem that has none, such as
            :class:`metapl.problems.LearningToReweight`.
        labeled: (x_l, y_l) of the outer loss, B_l rows, or what :meth:`metapl.BilevelProblem.outer_batch` reads; x_l is
            a tensor, or a dict or tuple of them. A dict that also holds the labels, under ``labels``, is such a pair.
        unlabeled: x_u, or (weak, strong), of the inner step, B rows; any batch that ``problem`` reads. Or a
            :class:`metapl.Lookahead` of K such batches, for K student steps.
            Or a :class:`metapl.Lookahead` of K outer batches, one for each of K student steps: L is then the sum
            Σ_k weight_k L_k(θ_k) of the losses after the steps (MAML++), at the cost of one path and K outer passes.
            Modes ``forward`` and ``unrolled``, without ``verify``; the batches of a function are held.
        outer, inner: other names of ``labeled`` and ``unlabeled``.
        mode: one of :data:`metapl.MODES`, or an estimator value.
        problem: default :class:`metapl.PseudoLabels`, mean cross-entropy on both levels.
        inner_optimizer: a TorchOpt transform, or ``torch.optim`` SGD, Adam, AdamW or Muon over the student's
            parameters, or a tuple of these, whose states stay as they are. Muon's products are taken in the type of the
            weights.
        inner_state: the transform's state, from an earlier call.
        generator: for drawing labels; default: the default generator of the device.
        recompute_teacher, accumulate, clip_norm: as for :class:`metapl.BilevelTrainer`; with micro-batches the
            teacher's pass is recomputed too.
        progress: show on a terminal how far a look-ahead is: the steps, and the steps back.
        wrt: what to differentiate with respect to: ``"teacher"``; ``"start"``, the student's first weights; names of
            settings of ``torch.optim``'s inner optimizer, step by step and by param group: ``"lr"``, ``"momentum"``,
            ``"dampening"``, ``"weight_decay"`` of SGD, ``"lr"``, ``"betas"``, ``"eps"``, ``"weight_decay"`` of Adam and
            AdamW, ``"lr"``, ``"momentum"``, ``"eps"``, ``"weight_decay"`` of Muon. ``torch.optim.SGD`` may have a rate
            for each entry of a weight, ``{"params": [p], "lr": torch.full_like(p, 0.1)}``. Modes ``forward`` and
            ``unrolled``; without a teacher, ``problem=EqualWeights()``. Cost: of the start, the Hessian product of the
            first step; of settings, a few operations per weight. With ``truncate=T`` in the mode, the gradient in the
            start is that in θ_{K-T}: dθ_{K-T}/dθ_0 counts as the identity. ``truncate=0`` is first-order MAML, ∇L(θ_K).
            The bias is the factor (∂θ_{K-T}/∂θ_0)ᵀ - 1 = O(η(K-T)‖∂²ℓ/∂θ²‖); settings take all steps.
        compile: one step, and its adjoint, as two graphs of ``torch.compile`` that are looped over
            (:mod:`metapl.functional.training`): modes ``forward`` and ``unrolled``, ``torch.optim`` and signals that
            are not drawn, in one process. It pays from some hundreds of steps on, or where calls are repeated: one for
            networks of the same architecture, such as another student, with optimizers and a problem of the same types
            and numbers, compiles nothing (:mod:`metapl.functional.architecture`).
        verify: refuse a gradient that is not the derivative of the loss (:func:`metapl.check_gradient`), or ``"warn"``
            of it; for its cost see there.
        replay_tolerance: the most that the result's ``replay_error`` may be: a look-ahead whose steps come out
            otherwise when they are computed again is refused above it, and a larger number allows more. Deterministic
            algorithms are asked for while a look-ahead runs.

    Returns: a :class:`Hypergradient`. Weights, buffers, gradients and optimizer states stay bit for bit as they were;
    drawing labels without a generator, and dropout, advance the default generator as the passes forward do.
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
    if estimator(mode).credits != "nothing":
        refuse_gradients_of_batches(labeled, unlabeled)
    several_outer = labeled if not isinstance(labeled, Tensor) and isinstance(labeled, Lookahead) else None
    if verify and several_outer is not None:
        raise MetaplError(f"verify={verify!r} was given with an outer loss for each step; expected verify=False.")
    if verify:  # by a module above this one, which calls this function on copies
        check = import_module("metapl.training.verification").check_gradient
        given = {"problem": problem, "inner_optimizer": inner_optimizer, "inner_state": inner_state, "mode": mode}
        given |= {"generator": generator, "accumulate": accumulate, "clip_norm": clip_norm}
        check(teacher, student, labeled=labeled, unlabeled=unlabeled, **given).refuse_or_warn(verify)
    estimate, given_problem = estimator(mode), problem
    problem, inner_optimizer = prepare(problem, estimate), as_one(inner_optimizer)
    check_teacher(teacher, problem, recompute_teacher=recompute_teacher)
    check_arguments(hypergradient, {**locals(), "mode": estimate})
    differentiates = estimate.credits != "nothing" or compile
    of_teacher, of_student, device = layouts(teacher, student, differentiated=differentiates)
    generator_of(generator, device, "the networks are on")
    update = update_of(inner_optimizer, of_student.parameters(), inner_state)
    if estimate.credits != "nothing":
        refuse_learned_settings(update)
    update = update if clip_norm is None else Clipped(update, clip_norm, of_student.space)
    ahead = unlabeled if isinstance(unlabeled, Lookahead) else Lookahead([unlabeled])
    if estimate.keep_on not in (None, "cpu") and not compile:
        raise MetaplError(f"keep_on={estimate.keep_on!r} is a folder; expected compile=True with it, or keep_on='cpu'.")
    batches = ahead if callable(ahead.batches) else list(ahead)
    if ahead.weights is not None:
        raise MetaplError(
            "inner=Lookahead(weights=) was given; weights are of outer batches, outer=Lookahead(weights=)."
        )
    judged_by_step = None if several_outer is None else outer_batches(several_outer, ahead)
    options = ahead.options(inner_optimizer)
    check_mode(estimate, len(batches), problem, of_student)
    wrt = [wrt] if isinstance(wrt, str) else [*wrt]
    if several_outer is not None and estimate.name not in ("forward", "unrolled"):
        whose = f"an outer loss for each step was given with mode {estimate.name!r}"
        raise MetaplError(f"{whose}; expected 'forward' or 'unrolled', or one outer batch.")
    truncate = getattr(estimate, "truncate", None)
    if truncate == 0 and wrt != ["start"]:
        unreached = f"truncate=0, which differentiates no step, was given with wrt={wrt!r}"
        raise MetaplError(f"{unreached}; expected wrt='start', or a truncate of 1 or more.")
    known, settings = ("teacher", "start", *update.numbers), [name for name in wrt if name in update.numbers]
    for name in (name for name in wrt if name not in known):
        raise MetaplError(f"wrt={name!r} was given; expected, with this inner optimizer, {', '.join(known)}.")
    of_steps: list[Any] = [*options] or [update.options]
    by_sgd = [groups for groups in zip(*of_steps, strict=True) if "dampening" in groups[0]]
    moving = [{now["momentum"] != 0 for now in groups} for groups in by_sgd if "momentum" in wrt]
    still = not compile and not estimate.keep_graph and any(False in found for found in moving)
    refused = {
        f"mode {estimate.name!r}; expected 'forward' or 'unrolled'": estimate.name not in ("forward", "unrolled"),
        "truncate; expected all steps, or wrt='start'": truncate is not None and settings,
        "a sharded student; expected one process, or DistributedDataParallel": of_student.is_sharded and settings,
        "momentum=0, which keeps no buffer; expected more, or compile=True": still,
        "momentum=0 in some steps, which keep no buffer; expected more": any(len(found) > 1 for found in moving),
    }
    for what in (what for what, is_so in refused.items() if is_so and {*wrt} - {"teacher"}):
        raise MetaplError(f"wrt={wrt!r} was given with {what}.")
    if compile:
        if outer_loss_reads_more(problem, teacher):
            raise MetaplError(f"the outer loss of {kind_of(problem)} may read the teacher; expected compile=False.")
        pure = import_module("metapl.functional.training")
        given = {"clip_norm": clip_norm, "accumulate": accumulate, "progress": progress, "wrt": wrt}
        given["replay_tolerance"] = replay_tolerance
        networks = teacher, student, problem, inner_optimizer, estimate
        if judged_by_step is not None:
            given |= {"outer_losses": OuterLosses(*judged_by_step)}
            labeled = judged_by_step[0][-1]
        found: Hypergradient = pure.differentiate(*networks, labeled, ahead, **given)
        return found if ahead is unlabeled else replace(found, feedback=found.feedback[0], kept="")
    takes_direct_term = "teacher" in wrt and has_direct_term(estimate.name, problem, teacher)
    if takes_direct_term:
        refuse_direct_term_in_parts(problem, parts=accumulate, is_alone=of_student.ranks.alone)
        if several_outer is not None:
            whose = f"an outer loss for each step was given, and that of {kind_of(problem)} may read the teacher"
            raise MetaplError(f"{whose}; expected one outer batch.")
    kind = ShardedStudent if of_student.is_sharded else LocalStudent
    local_student, ranks = kind(of_student, double_backward=estimate.keep_graph), of_student.ranks
    local_student.slots.meet(problem)
    shown = partial(step_bar, progress and ranks.first, len(batches))
    if settings and estimate.keep_graph:  # double backward ends in leaves
        for number, groups in enumerate(options := options or [options_of(inner_optimizer)] * len(batches)):
            held = [{n: group[n] for n in settings if n in group} for group in groups]  # betas are two
            leaves = pytree.tree_map(as_leaf, held)
            options[number] = [{**group, **own} for group, own in zip(groups, leaves, strict=True)]
    how: dict[str, Any] = {"parts": accumulate, "keep_graph": estimate.keep_graph, "keep": estimate.keeping}
    how |= {"credits": "example" if estimate.credits == "example" else "signal"}
    how |= {"truncate": getattr(estimate, "truncate", None), "updates": [update.at(of_step) for of_step in options]}
    how |= {"wrt": [name for name in wrt if name != "teacher"]}

    def begin() -> None:
        for layout in (of_teacher, of_student):
            if layout is not None:
                layout.begin_step()

    def in_order(order: Order | None, is_tried: bool) -> Hypergradient:
        """Return the result with the feedback's second derivative in one order; nothing moves."""
        if judged_by_step is None:
            outer_losses, judged = None, problem.outer_batch(labeled)
        else:
            judged_batches, weights = judged_by_step
            outer_losses = OuterLosses([problem.outer_batch(one) for one in judged_batches], weights)
            judged = outer_losses.batches[-1]
        teach = Teaching(
            of_teacher, problem, estimate, generator, ranks, device, batches, accumulate, recompute_teacher
        )
        kernels = no_fast_path(math=True) if estimate.keep_graph or order == "graph" else NOTHING
        as_it_was = restored(teach.slots, local_student.slots, device=device, generator=generator, always=True)
        local_student.inspects_graph = is_tried
        local_student.chooses_order = is_tried
        replays = ReplayCheck(replay_tolerance, ranks)
        repeatable = deterministic(device) if len(batches) > 1 else NOTHING
        with as_it_was, kernels, repeatable:
            with shown("steps", 0) as tell:  # θ′ = U(θ, g), g = ∇ (1/B) Σ ℓ_i(S(x_u; θ), signal)
                path = take_steps(
                    local_student, update, problem, judged, batches, teach,
                    progress=tell, order=order, outer=outer_losses, replays=replays, **how,
                )  # fmt: skip
            path.is_tried = is_tried
            with shown("steps back", 0) as path.progress:
                feedback, _ = estimate.checked_feedback(path, estimate.init())  # h = −dL(θ′)/d(signal)
            direct = teach.direct_gradient(path) if takes_direct_term else {}
            grads = teach.gradient(path, feedback) if "teacher" in wrt else {}  # of −Σ h·signal(θ_T)
            grads = {name: g + direct[name] for name, g in grads.items()} if direct else grads
            of_settings = stacked_settings(path.in_settings[::-1], settings, update.options)
            h = tuple(found.of_batch(step) for step, found in zip(path.steps, feedback, strict=True))
            start = path.start if "start" in wrt else {}
            path = path.revised(h[-1])
            return Hypergradient(
                grads=grads,
                feedback=h if ahead is unlabeled else h[0],
                inner_loss=path.inner_loss,
                outer_loss=path.whole_outer_loss,
                student_params=of_student.as_parameters(path.params),
                inner_state=None if isinstance(inner_optimizer, torch.optim.Optimizer) else path.state,
                kept=path.keeping.words(len(batches)) if ahead is unlabeled else "",
                start=of_student.as_parameters(start),
                settings=of_settings,
                order=order or "",
                direct=direct,
                outer_losses=path.outer_losses,
                replay_error=replays.error,
                float32_products=float32_products(device),
            )

    def by_another(other: Estimator, one_step: bool) -> Hypergradient:
        inner_of_one = batches[0] if one_step else unlabeled
        begin()
        with replayed(RandomState.now(device, generator)):
            return hypergradient(
                teacher, student, outer=labeled, inner=inner_of_one, mode=other, problem=given_problem,
                inner_optimizer=inner_optimizer, inner_state=inner_state, generator=generator, accumulate=accumulate,
                clip_norm=clip_norm, wrt=wrt,
            )  # fmt: skip

    begin()
    candidates = estimate.orders(len(batches), problem, local_student, how["wrt"])
    with advice_on(estimate, len(batches), by_another if ranks.alone else None):
        return Orders().take(candidates, in_order, begin_again=begin)
