"""The verdict on a step: its gradient and the real step, and the likely causes of a refusal."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from metapl.data.held_values import names_written, numbers_of
from metapl.errors import MetaplError, reason_of
from metapl.execution.outside import DrawsOutside, refusing_draws_outside
from metapl.feedback import Estimator
from metapl.guards.door import PastTheSignal
from metapl.guards.verification.case import EPS, EPS32, Case, Errors
from metapl.guards.verification.causes import (
    changing_loss,
    coarsest_rounding,
    first_difference,
    why_again,
)
from metapl.guards.verification.contract import breach_of_contract
from metapl.guards.verification.differences import errors_of, is_made_of_losses
from metapl.guards.verification.explain import (
    PAST_THE_SIGNAL,
    explain,
    holds_outputs,
    moves_past_the_signal,
)
from metapl.guards.verification.real_step import Evaluation, RealStep
from metapl.guards.verification.result import GradientCheck, Status
from metapl.runs.checkpoint import rng_state, set_rng_state

LOG = logging.getLogger("metapl")


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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return GradientCheck(
            "cannot tell",
            "the step was not verified: its float64 copies do not fit into memory "
            f"({reason_of(error)}). Give metapl.check_gradient a smaller one, or verify=False.",
        )
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
        # What was given is refused. A loss that changes is named; a real step may fail as well.
        changing = ""
        with suppress(Exception):
            changing = changing_loss(Evaluation(copies))
        if changing:
            return GradientCheck("refused", f"mode {estimate.name!r}: {changing}")
        # The error describes copies in float64: raise it of the types that were given.
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


def judge(copies: RealStep, estimate: Estimator, *, eps: float, precision: str) -> GradientCheck:
    """Return the verdict at a point and, where it is a refusal, the likely causes."""
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
            numbers_before = numbers_of(case.step.problem, case.step.teacher)
            part = first_difference(case.real, Evaluation(case.step))
            if part:
                written = names_written(
                    numbers_before, numbers_of(case.step.problem, case.step.teacher)
                )
                breach = f"two equal steps differ, first in {part}: {why_again(written)}"
                break
    doubt = case.mode.doubt(case.by_mode.numbers) or holds_outputs(case)
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
    elif is_made_of_losses(estimate) and estimate.h_of_losses(*[case.real.loss] * 2) is None:
        # It is compared with nothing, and in no other step with more.
        status = "cannot tell"
        precision = ""
        verdict = (
            f"{name} was not verified: its h is one number that is made of outer losses, no "
            "derivative; expected h_of_losses(before, after) in its class, which is compared."
        )
    elif len(clear_errors) < len(errors):
        status = "cannot tell"
        verdict = f"{name} was not verified: rounding drowns the loss's change."
    elif role := returns_probabilities(case):
        status = "allowed"
        verdict = (
            f"{name} gives the derivative of the loss after real steps, but the {role} returns "
            "probabilities, of which the losses take a softmax again, so that it learns slowly; "
            f"expected logits: leave the softmax at the end of the {role} out."
        )
    return GradientCheck(
        status,
        verdict,
        errors={} if breach else clear_errors,
        precision=precision,
        tolerance=case.tolerance,
    )


def returns_probabilities(case: Case) -> str:
    """Return which network returns class probabilities in the place of logits; "" for none."""
    problem = case.step.problem
    outputs_by_role: dict[str, Tensor | None] = {}
    if problem.classifies:
        outputs_by_role["student"] = case.real.outputs[-1]
    if problem.teacher_classifies:
        outputs_by_role["teacher"] = case.signals[0].outputs
    for role, outputs in outputs_by_role.items():
        if outputs is not None and outputs.ndim == 2:
            sums = outputs.sum(1)
            if bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums)):
                return role
    return ""


def breach_and_errors(case: Case) -> tuple[str, Errors]:
    breach = breach_of_contract(case)
    return breach, {} if breach else errors_of(case)


def give_rates_to_a_warm_up(copies: RealStep) -> None:
    """Give the copies' optimizer its full rates in a warm-up, and some where all are 0.

    Little would move, or nothing.
    """
    optimizer = vars(copies.update).get("optimizer")
    groups = [] if optimizer is None else optimizer.param_groups
    for group in groups:
        # A scheduler notes the full rate in its groups.
        if group["lr"] < group.get("initial_lr", group["lr"]):
            group["lr"] = group["initial_lr"]
    if all(group["lr"] == 0 for group in groups):
        for group in groups:
            group["lr"] = 1e-2
