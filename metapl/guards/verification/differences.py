"""How far a gradient is from central differences of the loss after real steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from metapl.execution.numerics import as_real
from metapl.execution.state import trainable
from metapl.feedback import Estimator
from metapl.guards.verification.case import APPROXIMATE, EPS, EPS32, Case, Errors, flat
from metapl.guards.verification.real_step import Evaluation, Move, Tree, size_of
from metapl.problems.base import Signal


def errors_of(case: Case, states: list[Tree] | None = None) -> Errors:
    """Return how far the mode's gradient is off; ``states`` as for :class:`Evaluation`."""
    of_teacher = partial(compare, case, "teacher", states=states)
    if case.mode.credits == "nothing":
        return errors_of_direct_term(case, states)
    if case.implicit_w and case.by_mode.direct:
        # F is not the outer loss, so that the direct term is compared by itself.
        return of_teacher(case.teacher_gradient) | errors_of_direct_term(case, states)
    if case.teacher_gradient and case.moved == "signal" and not case.takes_expectation:
        return of_teacher(case.whole_gradient)
    errors = errors_of_h(case, states)
    if case.teacher_gradient:
        errors = errors | errors_of_signal(case, states)
    return errors


def errors_of_direct_term(case: Case, states: list[Tree] | None = None) -> Errors:
    """Return how far the direct term alone is off, with the signals held."""
    zeros = {name: torch.zeros_like(t) for name, t in case.teacher_gradient.items()}
    return compare(
        case,
        "teacher",
        zeros | case.by_mode.direct,
        value=lambda evaluation: evaluation.loss,
        name="the direct term",
        signals=case.signals,
        states=states,
    )


def errors_of_signal(case: Case, states: list[Tree] | None = None) -> Errors:
    """Return how far the gradient of the signal in the teacher is off, with the step held."""
    return compare(
        case,
        "teacher",
        case.teacher_gradient,
        value=case.score,
        name="the signal in the teacher",
        signals=case.signals,
        states=states,
    )


def errors_of_h(case: Case, states: list[Tree] | None = None) -> Errors:
    """Return how far h alone is off.

    In the weights of the inner losses, or in the signal's values.
    """
    if is_made_of_losses(case.mode):
        return {}
    gradient = {key: -h for key, h in case.h.items()}
    errors = compare(case, case.moved, gradient, signals=case.signals, states=states)
    if case.moved == "weights" and case.eps < EPS32:
        # What drowns of a factor of the whole loss is zero, such as under a clip, which takes all
        # lengths for one. In float64 alone: the rounding of a shorter type hides much more.
        errors = {name: 0.0 if error is None else error for name, error in errors.items()}
    return errors


def is_made_of_losses(mode: Estimator) -> bool:
    """Return whether h is one number for the batch, made of outer losses, and no derivative."""
    return mode.takes_outer_losses and mode.credits == "batch"


def compare(
    case: Case,
    moved: str,
    gradient: Tree,
    *,
    value: Callable[[Evaluation], Tensor] | None = None,
    name: str = "",
    signals: list[Signal] | None = None,
    states: list[Tree] | None = None,
) -> Errors:
    """Return how far a gradient is from differences, along itself and in a random direction.

    An error is None where it drowns in rounding, which grows as the move shrinks, while the errors
    of kinks and of a fresh Adam's ε shrink with it.

    Args:
        case: the point.
        moved: what to move, as for :class:`Move`.
        gradient: the gradient in it.
        value: the function of an evaluation whose gradient that is; default: the outer loss.
        name: what the errors are called by; default: what is moved.
        signals, states: as for :class:`Evaluation`.
    """
    value = value or case.outer_loss
    level = float(value(case.real).detach())

    def value_at(length: float, direction: Tree) -> float:
        evaluation = Evaluation(
            case.step,
            Move(moved, direction, length),  # type: ignore[arg-type]
            signals=signals,
            student_outputs=case.real.outputs,
            states=states,
        )
        for signal, signal_of_case in zip(evaluation.signals, case.real.signals, strict=True):
            drew_other_labels = signal.sampled and not signal.value.equal(signal_of_case.value)
            if drew_other_labels:
                return math.nan
        return float(value(evaluation).detach())

    errors: Errors = {}
    for along, direction in directions(case, moved, gradient).items():
        terms = flat(gradient) * flat(direction)
        errors[f"{name or f'the {moved}'}, {along}"] = error_of_slope(
            partial(value_at, direction=direction),
            terms,
            level=level,
            eps=case.eps,
            tolerance=case.tolerance,
        )
    return errors


def directions(case: Case, moved: str, gradient: Tree) -> dict[str, Tree]:
    """Return the directions to move in.

    Along the gradient, and random signs times the size of each weight, of complex weights for both
    parts.
    """
    weights = case.step.learned()
    if moved in ("inner", "outer"):
        weights |= trainable(case.step.student)
    draw = torch.Generator().manual_seed(0)
    random_direction = {}
    for name, g in gradient.items():
        signs = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
        as_real(signs).copy_(torch.randint(0, 2, as_real(signs).shape, generator=draw) * 2 - 1)
        random_direction[name] = signs * (size_of(weights[name]) if name in weights else 1.0)
    entries = flat(gradient)
    length = float(entries.norm())
    if length == 0 or len(entries) == 1:
        return {"in a random direction": random_direction}
    scale = float(flat(random_direction).norm())
    return {
        "along the gradient": {name: g * scale / length for name, g in gradient.items()},
        "in a random direction": random_direction,
    }


def error_of_slope(
    value_at: Callable[[float], float], terms: Tensor, *, level: float, eps: float, tolerance: float
) -> float | None:
    """Return how far the sum of ``terms``, a slope, is from central differences of a function.

    Args:
        value_at: the function, of the length of a move; NaN where it has no value.
        terms: the terms of the slope, which may cancel.
        level: the function's value without a move, to which the rounding of a difference is
            proportional.
        eps: the rounding of the function's type.
        tolerance: the relative error that is looked for.

    Returns: the error relative to the larger of both, 0 or more; None where rounding drowns the
    differences.
    """
    slope = float(terms.sum())
    size = max(abs(slope), float(terms.norm()))
    noise = 50 * eps * max(abs(level), 1e-3)
    is_short = eps >= EPS32
    clear = clear_moves(noise, size, tolerance, is_short)
    errors: list[float] = []
    of_smallest: list[tuple[float, float]] = []
    difference = 0.0
    for move in moves_in_order(clear, is_short):
        # What rounding may add to the difference.
        blur = noise / move
        reach = max(size, abs(difference)) if is_short else size
        if errors and blur > 0.1 * reach:
            continue
        difference = (value_at(move) - value_at(-move)) / (2 * move)
        gap = abs(difference - slope)
        reach = max(size, abs(difference))
        if max(gap, reach) <= blur:
            # Both are zero to the rounding of float64, or what is not drowns.
            is_zero = abs(slope) <= min(noise, 50 * EPS * max(abs(level), 1e-3))
            return 0.0 if is_zero else None
        if blur > 0.1 * reach or not math.isfinite(difference):
            continue
        if gap <= tolerance * reach + blur:
            return max(gap - blur, 0.0) / reach
        errors.append(gap / reach)
        if is_short or move in clear[:2]:
            of_smallest.append((difference, gap))
        if len(of_smallest) == 2 and agree_on_another_slope(of_smallest[0], of_smallest[1], blur):
            return max(min(errors), 2 * tolerance)
    if is_short or not errors:
        # In a short type no two moves agree on another slope.
        return None
    smallest_error = min(errors)
    return smallest_error if smallest_error > APPROXIMATE else min(smallest_error, tolerance)


def possible_moves(is_short: bool) -> list[float]:
    """Return the lengths of moves, the smallest first."""
    return [1e-3, 1e-2, 3e-2] if is_short else [10.0**-n for n in range(12, 2, -1)]


def clear_moves(noise: float, size: float, tolerance: float, is_short: bool) -> list[float]:
    """Return the moves whose differences rounding leaves clear, the smallest first."""
    return [move for move in possible_moves(is_short) if noise / move <= tolerance * size]


def moves_in_order(clear: list[float], is_short: bool) -> list[float]:
    """Return the order of trial.

    1e-5, the clear moves from the smallest up, and the others from the largest down.
    """
    others = [move for move in reversed(possible_moves(is_short)) if move not in clear]
    # Sorting keeps the order of all but the usual move, which comes first.
    return sorted(clear, key=is_unusual) + sorted(others, key=is_unusual)


def is_unusual(move: float) -> bool:
    return move != 1e-5


def agree_on_another_slope(
    first: tuple[float, float], second: tuple[float, float], blur: float
) -> bool:
    """Return whether two differences agree with each other, and not with the slope.

    Args:
        first, second: each difference, with its gap to the slope.
    """
    difference_1, gap_1 = first
    difference_2, gap_2 = second
    return abs(difference_1 - difference_2) + 10 * blur <= 0.2 * min(gap_1, gap_2)
