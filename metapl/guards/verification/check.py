"""Verification by definition: a mode's gradient beside differences of the loss after real steps.

The steps are taken on copies in float64.

In the formula of :func:`check_gradient`, d is the mode's gradient a itself, then a random
direction. Labels that are drawn cannot be moved: each inner loss is taken (1 + ε_i) times, for h_i
= −dL/dε_i, and the teacher is moved under −Σ h·log_prob. Without a teacher, the signal's values are
moved. Nothing here knows how a mode finds its h.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from metapl.core.lookahead import InnerBatches, require_batches
from metapl.errors import MetaplError
from metapl.execution.batch import Batch, map_tensors, micro_batches, plain
from metapl.execution.compare import TRIES
from metapl.execution.layout import Layout
from metapl.execution.state import RandomState
from metapl.feedback import Mode
from metapl.feedback.hypergradient import Differentiation, Request
from metapl.guards.door import refuse_hooks, refuse_learned, request_of
from metapl.guards.verification.result import GradientCheck, Setting
from metapl.problems.base import BilevelProblem
from metapl.protocols import TwoLevelTrainer
from metapl.updates import Clipped, InnerOptimizer, Update
from metapl.updates.base import OptimizerState

# Of both networks together; larger ones are verified by check_gradient, or verify=N.
MOST_WEIGHTS = 50_000_000
# Of a look-ahead, this many steps are verified.
STEPS = 3
LOG = logging.getLogger("metapl")


class Verified(TwoLevelTrainer, Protocol):
    """A trainer whose steps are verified: a :class:`metapl.BilevelTrainer`."""

    verification: Verification


def check_gradient(
    teacher: nn.Module | Verified | None,
    student: nn.Module | None = None,
    *,
    outer: Batch,
    inner: Batch,
    mode: Mode | None = None,
    problem: BilevelProblem | None = None,
    inner_optimizer: InnerOptimizer | Update | None = None,
    inner_state: OptimizerState = None,
    generator: torch.Generator | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
) -> GradientCheck:
    r"""Compare a mode's gradient with its definition: differences of the loss after real steps.

    .. math:: \frac{F(\theta_T + \delta d) - F(\theta_T - \delta d)}{2\delta} \approx
              \langle a, d \rangle, \qquad
              F(\theta_T) = L(\theta'(\theta_T))

    On copies in float64, with the same masks and labels in every evaluation: weights, buffers,
    gradients, optimizers and generators stay as they are. h is taken before a baseline or a
    normalization shapes it. Networks whose code runs in their own type alone are compared in that
    type, to 1 %; the result says so.

    Args:
        teacher, student: as for :func:`metapl.hypergradient`; or a :class:`metapl.BilevelTrainer`
            alone, as it stands.
        outer, inner: the batches of a step; of a :class:`metapl.Lookahead` the first three, or the
            T that the mode truncates to, and of micro-batches (``accumulate``) the first that has
            labels, by whose halves both losses must be means over examples, or the outer loss
            Σ sum / Σ weight; the signal about it and another must be that about each.
        mode: default the trainer's own, and ``"forward"`` without one. The others are
            :func:`metapl.hypergradient`'s.

    Returns: a :class:`GradientCheck`; 1e-5 is right, of differences and of weights that stay in
    float32 1 %. Cost: the mode once and some six real steps, in float64; about thirty where they
    disagree. Raises: :class:`metapl.MetaplError` in several processes.

    >>> import torch, metapl
    >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
    >>> labeled = torch.randn(5, 4), torch.arange(5) % 3
    >>> check_gradient(trainer, outer=labeled, inner=torch.randn(6, 4)).passed
    True
    """
    require_batches(outer, inner)
    others = (student, inner_optimizer, problem, inner_state, generator, clip_norm)
    if is_trainer(teacher) and all(argument is None for argument in others):
        inner_batches = InnerBatches.of_hypergradient(inner)
        return check_step(request_of(teacher, outer, inner_batches, mode=mode))
    return check_step(
        # What is no module, and no optimizer, is refused there.
        Request(
            teacher=teacher,  # type: ignore[arg-type]
            student=student,  # type: ignore[arg-type]
            outer=outer,
            inner=inner,
            mode="forward" if mode is None else mode,
            problem=problem,
            inner_optimizer=inner_optimizer,  # type: ignore[arg-type]
            inner_state=inner_state,
            generator=generator,
            accumulate=accumulate,
            clip_norm=clip_norm,
        )
    )


def is_trainer(teacher: nn.Module | Verified | None) -> TypeGuard[Verified]:
    """Return whether a trainer was given in the place of a teacher."""
    return isinstance(getattr(teacher, "verification", None), Verification)


def check_step(request: Request) -> GradientCheck:
    """Verify the step that a gradient is asked for."""
    # Loaded where it is used.
    from metapl.guards.verification.real_step import RealStep
    from metapl.guards.verification.verdict import verify_step

    differentiation = Differentiation(request)
    estimate = differentiation.estimate
    teacher_layout = differentiation.of_teacher
    student_layout = differentiation.of_student
    if student_layout.is_sharded or not student_layout.ranks.alone:
        raise MetaplError("check_gradient was given several processes; expected one, not sharded.")
    update = differentiation.update
    # A trainer's own update has its clip already.
    while isinstance(update, Clipped):
        update = update.inner
    update.follow(student_layout.parameters())
    inner_batches = differentiation.inner_batches
    student = student_layout.network
    teacher = None if teacher_layout is None else teacher_layout.network
    refuse_hooks(student, teacher)
    if estimate.credits != "nothing":
        refuse_learned(request, update)
    # A truncated feedback is verified over as many steps as it goes back, untruncated.
    most_steps = STEPS if estimate.truncate is None else min(STEPS, max(1, estimate.truncate))
    verified_batches = [inner_batches[k] for k in range(min(len(inner_batches), most_steps))]
    parts = request.accumulate

    def with_part(number: int) -> GradientCheck:
        other_part = None
        if parts > 1:
            other_part = copy_of_part(verified_batches[0], parts, number - 1)
        return verify_step(
            RealStep(
                teacher=teacher,
                student=student,
                problem=differentiation.problem,
                update=update,
                outer_batch=copy_of_part(request.outer, parts, number, name="outer"),
                inner_batches=[copy_of_part(batch, parts, number) for batch in verified_batches],
                clip_norm=request.clip_norm,
                generator=request.generator,
                random=RandomState.now(differentiation.device),
                micro_batches=parts,
                other_part=other_part,
                in_start="start" in differentiation.wrt,
            ),
            estimate,
        )

    # Labels may be left out in all rows of a micro-batch, which alone is refused.
    for number in range(parts - 1):
        with suppress(MetaplError):
            return with_part(number)
    return with_part(parts - 1)


def copy_of_part(batch: Batch, parts: int, number: int, name: str = "inner") -> Any:
    """Return one of the micro-batches of a batch, of tensors with memory of their own.

    Deepcopy would copy the whole tensor of a slice.
    """
    part = micro_batches(plain(batch), parts, name)[number]
    return map_tensors(lambda t: t.detach().clone(), part)


class Verification:
    """When the steps of a trainer are verified, and what was found.

    Args:
        setting: the trainer's ``verify=``.
    """

    def __init__(self, setting: Setting = True) -> None:
        self.setting = setting
        # What came of the last time that it was due, in words; empty before the first step.
        self.verdict = ""
        self.every = 0 if isinstance(setting, bool | str) else setting
        self.tries_left = TRIES
        self.verified_marks: set[int] = set()

    def before(
        self, trainer: Verified, outer_batch: Batch, inner_batches: InnerBatches, *, mark: int
    ) -> bool:
        """Verify the networks, which have a fingerprint, where that is due.

        Returns: whether a step was taken on these batches, and its graphs were looked at.
        Raises: :class:`metapl.MetaplError` for a wrong gradient.
        """
        if mark in self.verified_marks and trainer.steps_done % self.every:
            return False
        what = tell_left_out(trainer.layouts, limits_weights=not self.every)
        if what:
            self.verdict = f"not verified: networks of {what}"
            self.verified_marks.add(mark)
            return False
        check = check_step(request_of(trainer, outer_batch, inner_batches))
        self.verdict = f"{check.status}: {check.verdict}"
        if check.status == "cannot tell" and check.precision and self.tries_left:
            # Copies ran, and rounding drowned the difference. Adam's first step, say, hardly
            # depends on the size of the gradient; the next one does.
            self.tries_left -= 1
            return False
        check.refuse_or_warn(self.setting)
        self.verified_marks.add(mark)
        return check.status not in ("cannot tell", "nothing to verify")

    def state_dict(self) -> dict[str, str]:
        return {"known": " ".join(map(str, sorted(self.verified_marks))), "verdict": self.verdict}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.verified_marks = set(map(int, state["known"].split()))
        self.verdict = state["verdict"]


def tell_left_out(of_networks: Sequence[Layout], *, limits_weights: bool = True) -> str:
    """Return for what networks are not verified, in words, and say it once; "" where they are.

    Args:
        limits_weights: leave out networks of more than :data:`MOST_WEIGHTS`.
    """
    weights = sum(p.numel() for layout in of_networks for p in layout.network.parameters())
    what = ""
    if any(layout.is_sharded or not layout.ranks.alone for layout in of_networks):
        what = "several processes"
    elif limits_weights and weights > MOST_WEIGHTS:
        what = f"{weights:,} weights"
    if what and of_networks[0].ranks.first:
        LOG.warning(
            "Networks of %s are not verified: give metapl.check_gradient small ones of one.", what
        )
    return what
