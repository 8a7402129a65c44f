"""A mode's gradient beside plain double backward, on copies of one's own networks, problem and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, either, few
from metapl.execution.layout import layouts
from metapl.feedback import Estimator, Implicit, Mode, estimator
from metapl.feedback.compatible import prepare
from metapl.feedback.hypergradient import Hypergradient
from metapl.feedback.lookahead import Lookahead, inner_batches
from metapl.problems.base import BilevelProblem, kind_of
from metapl.runs.fields import Range, check_arguments
from metapl.runs.generators import rng_state, set_rng_state
from metapl.training.by_hand import SEED, Case, Run, Tree, trained
from metapl.training.trainer import BilevelTrainer
from metapl.updates import unwrapped
from metapl.words import summary

ROUNDING, APPROXIMATION = 1e-6, 1e-2
"""How far an exact mode may be from double backward in float64, and any other that draws nothing; relative errors."""

MOVES, OFF_BY_MOVE = (1e-5, 1e-6, 1e-7), 1e-2
"""Moves of weights for a difference of real losses, and how far the gradient may be from it: ReLUs that switch within
the move stay far below. What is further off is moved by less: a first step of Adam is the sign of a gradient, whatever
its size, and some of these change theirs within a long move."""


@dataclass(frozen=True)
class Agreement:
    """A gradient a beside the exact one, b.

    Args:
        relative_error: ‖a − b‖ / ‖b‖; of one parameter, over 1e-6 of the whole gradient's norm where that is greater.
        cosine: of the angle between them; NaN where one is zero.
        scale: ‖a‖ / ‖b‖; of a mean over draws ⟨a, b⟩ / ‖b‖², into which noise does not enter.
    """

    relative_error: float
    cosine: float
    scale: float

    @staticmethod
    def between(a: Tensor, b: Tensor, least: float = 0.0) -> Agreement:
        a, b = _flat(a), _flat(b)
        of_a, of_b, error = float(a.norm()), float(b.norm()), float((a - b).norm())
        relative = error / max(of_b, least, 1e-300) if error else 0.0
        angle = float(torch.dot(a / of_a, b / of_b)) if of_a and of_b else math.nan
        return Agreement(relative, angle, of_a / of_b if of_b else math.nan)

    def __str__(self) -> str:
        return f"error {self.relative_error:8.2g}   cosine {self.cosine:9.6f}   length {self.scale:7.4g}"


@dataclass(frozen=True, repr=False)
class GradientCheck:
    """The result of :func:`check_gradient`; ``print`` says it in words.

    Args:
        mode: its name.
        exact: whether the mode is to give the whole gradient, but for rounding.
        dtype: of the student's weights, or of its passes under autocast.
        overall: the mode's gradient in all of the teacher's weights (of a problem without a teacher, in the signal)
            beside double backward by hand, both in float64. Of a mode that draws labels, the mean over the draws.
        parameters: the same for each parameter of the teacher.
        rounded_by_hand: double backward by hand in ``dtype``: what rounding alone does.
        rounded, rounded_parameters: as ``overall`` and ``parameters``, of the mode in ``dtype``.
        feedback: as ``overall``, of h, minus the gradient in the signal's value.
        by_difference: how far the gradient by hand is from differences of the labeled loss after real steps, along
            random moves of the teacher's weights, relative to what such moves change and beyond what rounding leaves of
            them; None where steps are truncated or there is no teacher.
        inner_by_difference: the same of ``inner_loss`` and its gradient in the student's weights: what is detached on
            purpose is there too, so it is told and not judged.
        unreached: the teacher's parameters that no gradient reaches although the loss moves with them.
        draws: of labels; 1 where none are drawn. Where they are, what is about one gradient above is None or empty.
        standard_error: of the cosine of the mean over the draws.
        passed: whether what is expected of the mode holds in float64; None where ``draws`` are too few to tell.
        verdict: in words, what that is, and why.
    """

    mode: str
    exact: bool
    dtype: torch.dtype
    overall: Agreement
    parameters: dict[str, Agreement]
    rounded_by_hand: Agreement
    rounded: Agreement | None = None
    rounded_parameters: dict[str, Agreement] = field(default_factory=dict)
    feedback: Agreement | None = None
    by_difference: float | None = None
    inner_by_difference: float | None = None
    unreached: tuple[str, ...] = ()
    draws: int = 1
    standard_error: float | None = None
    passed: bool | None = None
    verdict: str = ""

    def __repr__(self) -> str:
        error, cosine = self.overall.relative_error, self.overall.cosine
        return summary("GradientCheck", mode=repr(self.mode), passed=self.passed, relative_error=error, cosine=cosine)

    def __str__(self) -> str:
        own = str(self.dtype).removeprefix("torch.")
        rows = {f"mean of {self.draws} draws" if self.draws > 1 else f"{self.mode}, float64": self.overall}
        rows |= {"its feedback, float64": self.feedback} if self.feedback else {}
        if self.parameters:
            worst = max(self.parameters, key=lambda name: self.parameters[name].relative_error)
            rows[f"worst: {worst}"] = self.parameters[worst]
        rows |= {f"{self.mode}, {own}": self.rounded} if self.rounded else {}
        rows[f"by hand, {own}"] = self.rounded_by_hand
        said = {True: "passed", False: "FAILED", None: "not known"}[self.passed]
        of_draws = f", ± {self.standard_error:.2g} in the cosine" if self.standard_error is not None else ""
        head = f"{self.mode}: {said}. {self.verdict}\nBeside double backward by hand in float64{of_draws}:"
        return "\n".join([head, *(f"  {name:<27} {row}" for name, row in rows.items())])


def check_gradient(
    teacher: BilevelTrainer | nn.Module | None,
    student: nn.Module | None = None,
    *,
    labeled: Any = None,
    unlabeled: Any = None,
    outer: Any = None,
    inner: Any = None,
    mode: Mode | None = None,
    problem: BilevelProblem | None = None,
    inner_optimizer: Any = None,
    inner_state: Any = None,
    draws: Annotated[int, Range(2, of="a number of draws")] = 100,
) -> GradientCheck:
    r"""Compare a mode's gradient with the same one by plain double backward, for one's own problem or estimator.

    .. math:: \theta_S' = U\big(\theta_S, \nabla_{\theta_S} \tfrac1B \textstyle\sum_i \ell_i\big), \qquad
              a = \text{the mode's},\ b = \text{autograd's}\ \ \frac{dL(\theta_S')}{d\theta_T}, \qquad
              \frac{\|a - b\|}{\|b\|}

    What is compared with is written out in ``metapl/training/by_hand.py`` with plain torch: the student's steps through
    ``torch.func.functional_call``, the update rules of SGD, Adam and AdamW from their formulas, TorchOpt transforms by
    their own updates, and one graph from the labeled loss to the teacher's weights. That graph goes through the
    problem's own code, so it is compared in turn with differences of the labeled loss after real steps, which see a
    signal that is detached from a part of the teacher, and an operation whose backward is not that of its forward.

    Everything runs on copies on the CPU, in float64 and in the type that the networks have, with dropout masks of one
    seed: weights, buffers, gradients, optimizers, random number generators stay as they are. Of a trainer, its
    ``clip_norm`` and ``precision`` count; micro-batches are taken as one batch.

    Args:
        teacher, student: as for :func:`metapl.hypergradient`; or a :class:`metapl.BilevelTrainer` alone, with its
            problem and its inner optimizer in their present state.
        labeled, unlabeled: the batches of one step, as for :meth:`metapl.BilevelTrainer.step`; also ``outer``,
            ``inner``. A :class:`metapl.Lookahead` of several for several student steps.
        mode: default: the trainer's own, and ``"forward"`` without one.
        problem, inner_optimizer, inner_state: as for :func:`metapl.hypergradient`.
        draws: of labels, where the mode samples them: their mean is compared with the gradient of the problem's
            differentiable form (:meth:`metapl.BilevelProblem.exact`).

    Returns: a :class:`GradientCheck`; its ``passed`` is for a test.

    Cost: two passes of the mode, two double backward passes and twelve plain steps on the CPU; for drawn labels
    ``draws`` passes of the mode.

    Raises: :class:`metapl.MetaplError` before anything moves: for what :func:`metapl.hypergradient` refuses; for modes
    that have another gradient on purpose (``none``, ``implicit``, altered feedback); for what cannot be copied, or not
    to float64, by name; in several processes.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
    >>> check_gradient(trainer, labeled=(torch.randn(5, 4), torch.arange(5) % 3), unlabeled=torch.randn(6, 4)).passed
    True
    """
    labeled, unlabeled = either(labeled=labeled, outer=outer), either(unlabeled=unlabeled, inner=inner)
    if isinstance(unlabeled, Lookahead) and callable(unlabeled.batches):
        unlabeled = replace(unlabeled, batches=list(unlabeled))  # which are taken in other precisions too
    clip, bfloat16 = None, False
    if isinstance(teacher, BilevelTrainer):
        trainer, own = teacher, (student, problem, inner_optimizer, inner_state)
        if any(thing is not None for thing in own):
            raise MetaplError(
                "check_gradient was given a trainer, and a student, problem, inner_optimizer or inner_state beside it; "
                "expected the trainer alone, whose own ones are checked, with the batches and a mode."
            )
        teacher, student, problem = *trainer.given, trainer.given_problem
        inner_optimizer, clip, bfloat16 = trainer.inner_optimizer, trainer.clip_norm, trainer.precision == "bfloat16"
        if inner_optimizer not in trainer.schedulable:  # a transform, whose state the trainer holds
            inner_state = trainer.update.read_state()
        mode = trainer.mode if mode is None else mode
    estimate = estimator("forward" if mode is None else mode)
    check_arguments(check_gradient, locals())
    if student is None or labeled is None or unlabeled is None or inner_optimizer is None:
        raise MetaplError(
            "check_gradient takes a trainer, or teacher, student and inner_optimizer; and the batches of one step: "
            "check_gradient(trainer, labeled=(x, y), unlabeled=x_u)."
        )
    if estimate.credits == "nothing" or isinstance(estimate, Implicit) or type(estimate).__name__ == "Altered":
        raise MetaplError(
            f"mode {estimate.name!r} is not meant to give the gradient through the student's step: it gives none, an "
            "altered one, or that of an optimum; expected another mode, such as 'forward'."
        )
    of_teacher, of_student, _ = layouts(teacher, student)
    if of_student.is_sharded or not of_student.ranks.alone:
        raise MetaplError("check_gradient runs in one process; expected networks that are neither sharded nor in DDP.")
    networks = None if of_teacher is None else of_teacher.network, of_student.network
    update = unwrapped(inner_optimizer), inner_state
    before = rng_state()
    try:
        case = Case(*networks, prepare(problem, estimate), *update, labeled, unlabeled, clip)
        return _checked(case, estimate, draws, bfloat16)
    finally:
        set_rng_state(before)


def _checked(case: Case, estimate: Estimator, draws: int, bfloat16: bool) -> GradientCheck:
    as_given = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bfloat16)
    with as_given():
        rounded = case.copied().by_mode(estimate)  # which refuses what is wrong
    truncate = getattr(estimate, "truncate", None)
    truncate = truncate if truncate and truncate < len(inner_batches(case.unlabeled_batch)) else None
    by_hand, exact = case, case.copied(torch.float64).by_hand(truncate)
    sampled = any(signal.sampled for signal in exact.signals)
    if sampled:
        problem = case.problem.exact()
        if problem is None:
            raise MetaplError(
                f"mode {estimate.name!r} on {kind_of(case.problem)} draws its labels, and the problem has no "
                "differentiable form to compare their mean with; give it a method exact() that returns one, or check "
                "it by 'forward' with a differentiable signal (without log_prob)."
            )
        by_hand = replace(case, problem=problem)
        exact = by_hand.copied(torch.float64).by_hand(truncate)
    _refuse_short(exact)
    with as_given():
        short_by_hand = by_hand.copied().by_hand(truncate)
    b = _whole(exact)
    if not float(b.norm()) > 0 or not bool(b.isfinite().all()):
        raise MetaplError(
            f"the exact gradient is {'zero' if bool(b.isfinite().all()) else 'not finite'}, so there is nothing to "
            "compare with: expected batches and weights at which the teacher's signal changes the student's labeled "
            "loss, an inner learning rate above 0, and an optimizer that has not diverged."
        )
    drawn = [case.copied(torch.float64).by_mode(estimate, SEED + n) for n in range(draws if sampled else 1)]
    mean = {name: torch.stack([found.grads[name] for found in drawn]).mean(0) for name in exact.grads}
    check = GradientCheck(
        mode=estimate.name,
        exact=(estimate.exact or truncate is not None) and not sampled,
        dtype=torch.bfloat16 if bfloat16 else next(iter(trained(case.student).values())).dtype,
        overall=Agreement.between(_flat(mean or drawn[0].feedback), b),
        parameters=_each(mean, exact.grads),
        rounded_by_hand=Agreement.between(_whole(short_by_hand), b),
    )
    if sampled:
        is_sgd = isinstance(case.inner_optimizer, torch.optim.SGD) and case.clip_norm is None
        a = torch.stack([_whole(found) for found in drawn])
        return _judged_draws(check, a, b, _is_scaled(estimate), allowed=0.15 if is_sgd else 0.5)
    h = pytree.tree_leaves(drawn[0].feedback)
    same = [t.numel() for t in h] == [t.numel() for t in exact.feedback]
    off, unreached = _by_difference(case, exact) if truncate is None and exact.grads else (None, ())
    inner_off, blind, size = case.off_by_moves("student", exact.inner_grads, exact, MOVES[0])
    check = replace(
        check,
        rounded=Agreement.between(_whole(rounded), b),
        rounded_parameters=_each(rounded.grads, exact.grads),
        feedback=Agreement.between(_flat(h), _flat(exact.feedback)) if same else None,
        by_difference=off,
        inner_by_difference=max(inner_off - blind, 0.0) / max(size, 1e-300),
        unreached=unreached,
    )
    adam = isinstance(case.inner_optimizer, torch.optim.Adam | torch.optim.AdamW)
    young = adam and all(float(state.get("step", 0)) < 10 for state in case.inner_optimizer.state.values())
    return _judged(check, _is_scaled(estimate), young)


def _refuse_short(run: Run) -> None:
    """Refuse what is not in float64 where everything that it was made from is."""
    signals = [signal.differentiable() for signal in run.signals]
    parts = {"student's outputs are": run.outputs, "teacher's signal is": signals, "outer loss is": run.loss}
    for name, part in parts.items():
        other = [t.dtype for t in pytree.tree_leaves(part) if t.dtype != torch.float64]
        if other:
            raise MetaplError(
                f"check_gradient computes in float64, and the {name} in {other[0]} there: a cast, or a type that is "
                "written out (x.float(), dtype=torch.float32), rounds on the way; expected code that keeps the type "
                "of its inputs, such as x.to(self.weight.dtype)."
            )


def _by_difference(case: Case, exact: Run) -> tuple[float, tuple[str, ...]]:
    """How far the gradient by hand is from differences of real losses, and the parameters that only these reach."""
    for move in MOVES:
        off, blind, size = case.off_by_moves("teacher", exact.grads, exact, move)
        if off <= OFF_BY_MOVE * size + blind or 10 * blind > OFF_BY_MOVE * size:
            break
    zero = {name: g for name, g in exact.grads.items() if not bool(g.any())}
    is_off = off > OFF_BY_MOVE * size + blind
    alone = case.off_by_moves("teacher", zero, exact, move)[0] if is_off and zero else 0.0
    return max(off - blind, 0.0) / size, tuple(zero) if alone > OFF_BY_MOVE * size + blind else ()


def _judged(check: GradientCheck, scaled: bool, young: bool) -> GradientCheck:
    """The same with whether what is expected holds, and why; of Adam's first steps, a word on rounding."""
    own, limit = str(check.dtype).removeprefix("torch."), ROUNDING if check.exact else APPROXIMATION
    expected = "the whole gradient, but for rounding" if check.exact else f"the gradient to {APPROXIMATION:.0%}"
    if scaled:
        expected = "the direction of the gradient; its length is normalized on purpose"
    both = [one for one in (check.overall, check.feedback) if one is not None]
    right = all((1 - one.cosine if scaled else one.relative_error) <= limit for one in both)
    felt = (check.by_difference or 0.0) <= OFF_BY_MOVE
    words = [f"It gives {expected}." if right and felt else f"Expected: {expected}."]
    if not right:
        one = max(both, key=lambda one: one.relative_error)
        turned = f"its cosine to the exact gradient is {one.cosine:.3f}"
        if abs(one.cosine) > 1 - 1e-6:
            turned = "it points the right way" if one.cosine > 0 else "its SIGN is wrong"
        words.append(f"In float64 {turned}, and it is {one.scale:.4g} times as long.")
    detached = "is detached, or the backward of an operation is not that of its forward."
    if not felt:
        words.append(
            "The labeled loss after real steps moves otherwise than autograd says of it, by "
            f"{check.by_difference:.2g} of the gradient: a part of the signal {detached}"
        )
    if check.unreached:
        words.append(f"No gradient reaches {few(check.unreached, 3)}, although the loss depends on them.")
    if (check.inner_by_difference or 0.0) > OFF_BY_MOVE:
        words.append(
            "But inner_loss moves otherwise with the student's weights than its own gradient says, by "
            f"{check.inner_by_difference:.2g} of it, and the student steps along that gradient: a part {detached} If "
            "that is meant, all is well."
        )
    of_mode, by_hand = check.rounded.relative_error if check.rounded else 0.0, check.rounded_by_hand.relative_error
    if right and felt and not scaled and of_mode >= 1e-3:
        by_type = check.exact or of_mode < 3 * by_hand or by_hand > 0.1  # an exact mode is off by nothing but rounding
        words.append(
            f"In {own} it is {100 * of_mode:.2g} % off, double backward by hand in {own} {100 * by_hand:.2g} %: "
            + (f"{own} is the reason, not the mode." if by_type else f"this mode loses digits in {own}; take forward.")
        )
        words += ["An Adam of few steps divides each gradient by its own size, which leaves little of it."] * young
    return replace(check, passed=right and felt, verdict=" ".join(words))


def _judged_draws(check: GradientCheck, a: Tensor, b: Tensor, scaled: bool, allowed: float) -> GradientCheck:
    """The same of the mean over draws of the labels, by ⟨a, b⟩ / ‖b‖², ``allowed`` to be so far from 1."""
    n, along = len(a), a @ b / b.square().sum()
    scale, error = float(along.mean()), float(along.std()) / math.sqrt(n)
    without = (n * a.mean(0) - a) / (n - 1)  # the jackknife
    cosines = torch.nn.functional.cosine_similarity(without, b[None], dim=1)
    passed: bool | None = scale > 3 * error or (False if scale < -3 * error else None)
    if not scaled and abs(scale - 1) > 3 * error + allowed:
        passed = False
    expected = (
        f"the direction of the soft labels' gradient{' (normalized on purpose)' if scaled else ', at its length'}, "
        "in the mean over labels, up to the learning rate's order"
    )
    words = [f"Expected: {expected}. The mean of {n} draws is {scale:.3g} ± {error:.2g} of it along its direction."]
    if passed is None:
        words.append(f"Too noisy to tell: give draws={max(2 * n, math.ceil(n * (5 * error) ** 2)):,}.")
    return replace(
        check,
        overall=replace(check.overall, scale=scale),
        draws=n,
        standard_error=math.sqrt((n - 1) * float(cosines.var(correction=0))),
        passed=passed,
        verdict=" ".join(words),
    )


def _is_scaled(estimate: Estimator) -> bool:
    """Whether an estimator normalizes its feedback."""
    normalized = getattr(estimate, "normalization", "gradient") != "gradient"
    return normalized or getattr(estimate, "similarity", "dot") != "dot"


def _each(found: Tree, exact: Tree) -> dict[str, Agreement]:
    least = 1e-6 * float(_flat(exact).norm()) if exact else 0.0
    return {name: Agreement.between(found[name], g, least) for name, g in exact.items()}


def _whole(found: Run | Hypergradient) -> Tensor:
    """A gradient in the teacher's weights as one vector; without a teacher, the feedback."""
    return _flat(found.grads or found.feedback)


def _flat(found: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in pytree.tree_leaves(found)])
