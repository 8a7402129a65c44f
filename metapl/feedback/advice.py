"""What runs in the place of a mode that does not.

Each proposal of an error is tried before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from metapl.errors import MetaplError
from metapl.execution.numerics import MissingDerivative
from metapl.feedback import Estimator, Forward, ReinforcePerExample, estimator
from metapl.feedback.order import NotFiniteFeedback

# Computes the gradient of the step at hand by another mode, and moves nothing; ``one_step``: of its
# first student step.
Run = Callable[[Estimator, bool], Any]

MOST_PROPOSALS = 2
_advising: ContextVar[bool] = ContextVar("advising", default=False)


@contextmanager
def advice_on(mode: Estimator, steps: int, run: Run | None) -> Iterator[None]:
    """Raise a missing derivative in this block as an error that names what runs in its place.

    Args:
        mode: the step's.
        steps: of the student.
        run: computes the same step by another mode; None: nothing can be tried, as in several
            processes, and nothing is proposed but what runs on every operation.

    Cost: nothing, unless a derivative is missing; then the gradient of one step for each proposal.
    """
    try:
        yield
    except (MissingDerivative, NotFiniteFeedback) as error:
        if _advising.get():
            raise
        token = _advising.set(True)
        try:
            expected = _expected(error, getattr(mode, "base", mode), steps, run)
        finally:
            _advising.reset(token)
        if isinstance(error, NotFiniteFeedback):
            text = f"{error} Here {expected} is finite." if expected else str(error)
        else:
            text = f"{error.what}; expected {expected or 'an operation that has it'}."
        raise MetaplError(text) from error


def _expected(error: MetaplError, mode: Estimator, steps: int, run: Run | None) -> str:
    """Return what runs, in words; nothing, where nothing was found."""
    if run is None:
        return "mode 'difference', with one student step" if mode.name != "difference" else ""
    proposals: list[str] = []
    for words, other, one_step in _candidates(mode, steps, isinstance(error, NotFiniteFeedback)):
        if len(proposals) == MOST_PROPOSALS:
            break
        # A proposal that fails, in whatever way, is not made: the error on its way is the one that
        # the user needs.
        try:
            result = run(other, one_step)
        except Exception:
            continue
        proposals.append(words.format(order=result.order))
    return ", or ".join(proposals)


def _candidates(
    mode: Estimator, steps: int, is_finite_asked: bool
) -> Iterator[tuple[str, Estimator, bool]]:
    """Yield what may run in a mode's place.

    In words, the mode, and whether it takes one step of the student only.
    """
    by = getattr(mode, "by", None)
    if isinstance(mode, Forward):
        words = 'Forward(by="{order}")'
        if by is not None:
            yield words, replace(mode, by=None), False
        # An order that was chosen at a first step may fail in a later one.
        for order in ("tangent", "double_backward"):
            if order != by:
                yield words, replace(mode, by=order), False
    if isinstance(mode, ReinforcePerExample) and mode.tangent == "forward":
        yield (
            "ReinforcePerExample(tangent='difference')",
            replace(mode, tangent="difference"),
            False,
        )
    if mode.name in ("unrolled", "implicit"):
        yield "mode 'forward'", Forward(), False
    one_step = steps > 1
    where = " with one student step" if one_step else ""
    if one_step:
        yield f"mode '{mode.name}'{where}", mode, True
    for name in ("difference",) if is_finite_asked else ("difference", "reinforce"):
        if name != mode.name:
            yield f"mode '{name}'{where}", estimator(name), one_step
