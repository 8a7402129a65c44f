"""Verification by definition: a mode's gradient beside differences of the loss after real steps.

The steps are taken on copies in float64.

In the formula of :func:`check_gradient`, d is the mode's gradient a itself, then a random
direction. Labels that are drawn cannot be moved: each inner loss is taken (1 + ε_i) times, for h_i
= −dL/dε_i, and the teacher is moved under −Σ h·log_prob. Without a teacher, the signal's values are
moved. Nothing here knows how a mode finds its h.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import nn

from metapl.core.lookahead import InnerBatches, require_batches
from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import Batch, map_tensors, micro_batches, plain
from metapl.execution.checks import generator_of
from metapl.execution.layout import layouts
from metapl.execution.state import RandomState
from metapl.feedback import Estimator, Mode, estimator, prepare
from metapl.feedback.door import (
    DrawsOutside,
    PastTheSignal,
    refuse_hooks,
    refuse_learned_settings,
    refuse_tensors,
    refusing_draws_outside,
)
from metapl.problems.base import BilevelProblem
from metapl.protocols import TwoLevelTrainer
from metapl.runs.checkpoint import rng_state, set_rng_state
from metapl.training.verification.case import EPS, EPS32, Case, Errors
from metapl.training.verification.causes import coarsest_rounding
from metapl.training.verification.differences import errors_of
from metapl.training.verification.real_step import Evaluation, RealStep
from metapl.updates import Clipped, InnerOptimizer, Update, parts_of, update_of
from metapl.updates.base import OptimizerState

Status = Literal["right", "allowed", "refused", "cannot tell", "nothing to verify"]
Setting = bool | int | Literal["warn"]

# Of both networks together; larger ones are verified by check_gradient, or verify=N.
MOST_WEIGHTS = 50_000_000
# Of a look-ahead, this many steps are verified.
STEPS = 3
LOG = logging.getLogger("metapl")


class VerificationWarning(UserWarning):
    """A gradient is off the derivative of the loss for a good reason, or could not be verified."""


@dataclass(frozen=True)
class GradientCheck:
    """The result of :func:`check_gradient`; ``print`` says it in words.

    Args:
        status: ``"right"``; ``"allowed"``, off the definition for a good reason; ``"refused"``;
            ``"cannot tell"``, where rounding drowns the differences or no copy could be made;
            ``"nothing to verify"``, in mode ``none``.
        verdict: the status in a sentence, with the likely causes of a refusal.
        errors: how far the gradient is off, by what was moved and along what, relative to the
            derivative.
        precision: the type that the copies ran in: ``"float64"``, or that of the networks' own
            weights where their code runs in no other. Empty where nothing ran.
        tolerance: the relative error beyond rounding that counts as right; 0 where nothing ran.
    """

    status: Status
    verdict: str
    errors: dict[str, float] = field(default_factory=dict)
    precision: str = ""
    tolerance: float = 0.0

    @property
    def passed(self) -> bool | None:
        """Whether the gradient is right or allowed, for a test; None where it cannot be told."""
        return None if self.status == "cannot tell" else self.status != "refused"

    def __str__(self) -> str:
        lines = [f"{self.status}: {self.verdict}"]
        if self.precision:
            lines.append(f"  {f'in {self.precision}; right is at most':<56} {self.tolerance:.1e}")
        lines += [f"  {name:<56} {error:.1e}" for name, error in self.errors.items()]
        return "\n".join(lines)

    def refuse_or_warn(self, setting: Setting) -> None:
        """Raise what is refused, unless the setting is ``"warn"``.

        Warn of what is neither refused nor right.
        """
        if self.status == "refused" and setting != "warn":
            raise MetaplError(f"{self.verdict} verify='warn' goes on, with a warning.")
        if self.status not in ("right", "nothing to verify"):
            warnings.warn(f"{self.status}: {self.verdict}", VerificationWarning, stacklevel=4)


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
        outer, inner: the batches of a step; of a :class:`metapl.Lookahead` the
            first three, and of micro-batches (``accumulate``) the first, by whose halves both
            losses must be means over examples, or the outer loss Σ sum / Σ weight.
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
    inner_batches = InnerBatches.of_hypergradient(inner)
    others = (student, inner_optimizer, problem, inner_state, generator, clip_norm)
    if is_trainer(teacher) and all(argument is None for argument in others):
        return check_trainer(teacher, outer, inner_batches, mode=mode)
    return check_step(
        teacher,  # type: ignore[arg-type]  # what is no module is refused
        student,  # type: ignore[arg-type]
        outer_batch=outer,
        inner_batches=inner_batches,
        mode="forward" if mode is None else mode,
        problem=problem,
        inner_optimizer=inner_optimizer,
        inner_state=inner_state,
        generator=generator,
        accumulate=accumulate,
        clip_norm=clip_norm,
    )


def is_trainer(teacher: nn.Module | Verified | None) -> TypeGuard[Verified]:
    """Return whether a trainer was given in the place of a teacher."""
    return isinstance(getattr(teacher, "verification", None), Verification)


def check_trainer(
    trainer: Verified, outer_batch: Batch, inner_batches: InnerBatches, *, mode: Mode | None = None
) -> GradientCheck:
    """Verify the step that a trainer would take, by its own mode or another."""
    return check_step(
        trainer.teacher,
        trainer.student,
        outer_batch=outer_batch,
        inner_batches=inner_batches,
        mode=trainer.mode if mode is None else mode,
        problem=trainer.problem,
        inner_optimizer=trainer.update,
        generator=trainer.generator,
        accumulate=trainer.accumulate,
        clip_norm=trainer.clip_norm,
    )


def check_step(
    teacher: nn.Module | None,
    student: nn.Module,
    *,
    outer_batch: Batch,
    inner_batches: InnerBatches,
    mode: Mode,
    problem: BilevelProblem | None,
    inner_optimizer: Any,
    inner_state: OptimizerState = None,
    generator: torch.Generator | None,
    accumulate: int,
    clip_norm: float | None,
) -> GradientCheck:
    """Verify a step; for the arguments see :func:`check_gradient`."""
    estimate = estimator(mode)
    gives_feedback = estimate.credits != "nothing"
    teacher_layout, student_layout, device = layouts(
        teacher, student, differentiated=gives_feedback
    )
    generator_of(generator, device, "the networks are on")
    if student_layout.is_sharded or not student_layout.ranks.alone:
        raise MetaplError(
            "check_gradient was given networks of several processes; expected those of one, not "
            "sharded."
        )
    parameters = student_layout.parameters()
    update = update_of(inner_optimizer, parameters, inner_state)
    if isinstance(update, Clipped):
        update = update.inner
    update.follow(parameters)
    refuse_replaced_step(update)
    refuse_tensors(outer_batch, inner_batches, gradients=gives_feedback)
    if gives_feedback:
        refuse_learned_settings(update)
        refuse_hooks(student_layout.network)
    verified_steps = min(len(inner_batches), STEPS)
    step = RealStep(
        teacher=None if teacher_layout is None else teacher_layout.network,
        student=student_layout.network,
        problem=prepare(problem, estimate),
        update=update,
        outer_batch=copy_of_first_part(outer_batch, accumulate),
        inner_batches=[
            copy_of_first_part(inner_batches[number], accumulate)
            for number in range(verified_steps)
        ],
        clip_norm=clip_norm,
        generator=generator,
        random=RandomState.now(device),
        micro_batches=accumulate,
    )
    return verify_step(step, estimate)


def copy_of_first_part(batch: Batch, parts: int) -> Any:
    """Return the first of the micro-batches of a batch, of tensors with memory of their own.

    Deepcopy would copy the whole tensor of a slice.
    """
    first_part = micro_batches(plain(batch), parts, "given")[0]
    return map_tensors(lambda t: t.detach().clone(), first_part)


def refuse_replaced_step(update: Update) -> None:
    """Refuse an optimizer whose ``step()`` was replaced on the object, which no copy has."""
    for optimizer in parts_of(vars(update).get("optimizer", update)):
        replaced = vars(optimizer).get("step")
        # A learning rate scheduler of torch wraps it, and counts its calls.
        if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
            raise MetaplError(
                "step() of the inner optimizer was replaced on the object; expected that of its "
                "class."
            )


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
        weights = sum(
            p.numel() for network in trainer.networks.values() for p in network.parameters()
        )
        in_several_processes = any(
            layout.is_sharded or not layout.ranks.alone for layout in trainer.layouts
        )
        if in_several_processes or (weights > MOST_WEIGHTS and not self.every):
            what = "several processes" if in_several_processes else f"{weights:,} weights"
            self.verdict = f"not verified: networks of {what}"
            if trainer.ranks.first:
                LOG.warning(
                    "Networks of %s are not verified: give metapl.check_gradient small ones of "
                    "one.",
                    what,
                )
            self.verified_marks.add(mark)
            return False
        check = check_trainer(trainer, outer_batch, inner_batches)
        self.verdict = f"{check.status}: {check.verdict}"
        check.refuse_or_warn(self.setting)
        self.verified_marks.add(mark)
        return check.status not in ("cannot tell", "nothing to verify")

    def state_dict(self) -> dict[str, str]:
        return {"known": " ".join(map(str, sorted(self.verified_marks))), "verdict": self.verdict}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.verified_marks = set(map(int, state["known"].split()))
        self.verdict = state["verdict"]


# -------------------------------------------------------------------------------------- the verdict


def verify_step(step: RealStep, estimate: Estimator) -> GradientCheck:
    """Return whether a mode's gradient of a step is that of its definition.

    Nothing of the process is moved.
    """
    estimate = estimate.without_shape()
    if not estimate.gives_gradient:
        return GradientCheck("nothing to verify", f"mode {estimate.name!r} gives no feedback.")
    generators_before = rng_state()
    without_autocast = torch.autocast(step.random.device.type, enabled=False)
    try:
        with torch.enable_grad(), without_autocast, refusing_draws_outside():
            return verify_in_float64(step, estimate)
    except (PastTheSignal, DrawsOutside) as error:
        return GradientCheck("refused", f"mode {estimate.name!r}: {error} See docs/contract.md.")
    except MemoryError as error:
        return out_of_memory(error)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return out_of_memory(error)
    finally:
        set_rng_state(generators_before)


def verify_in_float64(step: RealStep, estimate: Estimator) -> GradientCheck:
    """Return the verdict of copies in float64.

    Where the networks' code runs in no other type than their own, it is that of copies in this.
    """
    try:
        copies = step.copied(torch.float64)
    except (RuntimeError, TypeError, copy.Error) as error:
        # Locks, open files, tensors with a graph.
        if is_out_of_memory(error):
            raise
        return GradientCheck(
            "cannot tell", f"the step was not verified: no copies of it ({reason_of(error)})."
        )
    try:
        return judge(copies, estimate, eps=EPS, precision="float64")
    except PastTheSignal:
        raise
    except MetaplError:
        # What was given is refused. The error describes copies in float64: raise it of the types
        # that were given.
        judge(step.copied(), estimate, eps=EPS32, precision="")
        raise
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = reason_of(error)
    # The code runs in its own type alone, or fails in that one too: then its error is raised from
    # here.
    dtypes = [p.dtype for p in step.student.parameters() if p.is_floating_point()]
    network_dtype = dtypes[0] if dtypes else torch.float32
    precision = str(network_dtype).removeprefix("torch.")
    check = judge(step.copied(), estimate, eps=EPS32, precision=precision)
    because = (
        f"Compared in {precision}, to {check.tolerance:g}: the networks do not run in float64 "
        f"({reason})."
    )
    LOG.warning("Verification: %s", because)
    return replace(check, verdict=f"{check.verdict} {because}")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on a device or on the host."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text


def out_of_memory(error: BaseException) -> GradientCheck:
    return GradientCheck(
        "cannot tell",
        "the step was not verified: its float64 copies do not fit into memory "
        f"({reason_of(error)}). Give metapl.check_gradient smaller batches or a smaller network of "
        "the same kind, or verify=False.",
    )


def judge(copies: RealStep, estimate: Estimator, *, eps: float, precision: str) -> GradientCheck:
    """Return the verdict at a point and, where it is a refusal, the likely causes."""
    from metapl.training.verification.explain import (
        PAST_THE_SIGNAL,
        explain,
        moves_past_the_signal,
    )

    give_rates_to_a_warm_up(copies)
    name = f"mode {estimate.name!r}"
    case = Case.at(copies, estimate, eps)
    breach, errors = breach_and_errors(case)
    if breach or case.off(errors):
        rounding = coarsest_rounding(case.real)
        if rounding > case.eps:
            case = Case.at(copies, estimate, rounding)
            breach, errors = breach_and_errors(case)
    if case.off(errors):
        # Perhaps the point is at a kink.
        case = Case.at(copies.perturbed(), estimate, case.eps)
        errors = errors_of(case)
    if breach or case.off(errors):
        for _ in range(3):
            if not Evaluation(case.step).loss.equal(case.real.loss):
                breach = (
                    "two equal steps differ: random numbers of a generator of its own, or other "
                    "state."
                )
    doubt = case.mode.doubt(case.by_mode.numbers)
    clear_errors = {name: error for name, error in errors.items() if error is not None}
    off = case.off(errors)
    status: Status = "right"
    verdict = f"{name} gives the derivative of the loss after real steps."
    if breach:
        status = "refused"
        verdict = f"{name}: {breach} See docs/contract.md."
    elif off:
        status, why = explain(case)
        error = f"{clear_errors[off[0]]:.2g} off the loss after real steps ({off[0]})"
        verdict = f"{name} is {error}: {why} See docs/contract.md."
    elif moves_past_the_signal(case):
        # Perhaps the loss hardly moves here.
        status = "allowed"
        verdict = f"{name}: {PAST_THE_SIGNAL} See docs/contract.md."
    elif doubt:
        status = "allowed"
        verdict = f"{name} gives the derivative that it approximates, but {doubt}"
    elif len(clear_errors) < len(errors):
        status = "cannot tell"
        verdict = f"{name} was not verified: rounding drowns the loss's change."
    return GradientCheck(
        status,
        verdict,
        errors={} if breach else clear_errors,
        precision=precision,
        tolerance=case.tolerance,
    )


def breach_and_errors(case: Case) -> tuple[str, Errors]:
    from metapl.training.verification.contract import breach_of_contract

    breach = breach_of_contract(case)
    return breach, {} if breach else errors_of(case)


def give_rates_to_a_warm_up(copies: RealStep) -> None:
    """Give the copies' optimizer rates where all are 0, as in the first step of a warm-up.

    Nothing would move.
    """
    optimizer = vars(copies.update).get("optimizer")
    groups = [] if optimizer is None else optimizer.param_groups
    if any(group["lr"] != 0 for group in groups):
        return
    for group in groups:
        group["lr"] = group.get("initial_lr") or 1e-2
