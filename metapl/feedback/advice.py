"""Advice on what runs in the place of a mode that does not.

Each proposal of an error is tried before it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Protocol

from metapl.errors import MetaplError
from metapl.execution.numerics import MissingDerivative
from metapl.feedback import Estimator, Forward, ReinforcePerExample, estimator
from metapl.feedback.order import NotFiniteFeedback

MOST_PROPOSALS = 2
_advising: ContextVar[bool] = ContextVar("advising", default=False)


class HasOrder(Protocol):
    """The result of a gradient, which says in what order it was taken."""

    @property
    def order(self) -> str: ...


class RunByMode(Protocol):
    """The gradient of the step at hand by another mode, which moves nothing."""

    def __call__(self, mode: Estimator, /, one_step: bool) -> HasOrder:
        """Return the gradient.

        Args:
            one_step: whether it is that of the first student step alone.
        """


@dataclass(frozen=True)
class Proposal:
    """What may run in a mode's place.

    Attributes:
        words: how an error says it; ``{order}`` stands for the order that ran.
        mode: the estimator.
        one_step: whether the student takes one step only.
    """

    words: str
    mode: Estimator
    one_step: bool = False


@contextmanager
def advice_on(mode: Estimator, steps: int, run: RunByMode | None) -> Iterator[None]:
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
            # In the place of an altered estimator runs what runs in that of its base.
            expected = _expected(error, getattr(mode, "base", mode), steps, run)
        finally:
            _advising.reset(token)
        if not isinstance(error, NotFiniteFeedback):
            text = f"{error.what}; expected {expected or 'an operation that has it'}."
        elif expected:
            text = f"{error} Here {expected} is finite."
        else:
            text = str(error)
        raise MetaplError(text) from error


def _expected(error: MetaplError, mode: Estimator, steps: int, run: RunByMode | None) -> str:
    """Return what runs, in words; nothing, where nothing was found."""
    if run is None:
        return "" if mode.name == "difference" else "mode 'difference', with one student step"
    words: list[str] = []
    for proposal in _proposals(mode, steps, asks_finite=isinstance(error, NotFiniteFeedback)):
        if len(words) == MOST_PROPOSALS:
            break
        # A proposal that fails, in whatever way, is not made: the error on its way is the one that
        # the user needs.
        try:
            result = run(proposal.mode, one_step=proposal.one_step)
        except Exception:
            continue
        words.append(proposal.words.format(order=result.order))
    return ", or ".join(words)


def _proposals(mode: Estimator, steps: int, *, asks_finite: bool) -> Iterator[Proposal]:
    """Yield what may run in a mode's place, the nearest first.

    Args:
        steps: of the student.
        asks_finite: whether the mode runs, and its numbers are not finite.
    """
    if isinstance(mode, Forward):
        words = 'Forward(by="{order}")'
        if mode.by is not None:
            yield Proposal(words, replace(mode, by=None))
        # An order that was chosen at a first step may fail in a later one.
        if mode.by != "tangent":
            yield Proposal(words, replace(mode, by="tangent"))
        if mode.by != "double_backward":
            yield Proposal(words, replace(mode, by="double_backward"))
    if isinstance(mode, ReinforcePerExample) and mode.tangent == "forward":
        words = "ReinforcePerExample(tangent='difference')"
        yield Proposal(words, replace(mode, tangent="difference"))
    if mode.name in ("unrolled", "implicit"):
        yield Proposal("mode 'forward'", Forward())
    one_step = steps > 1
    where = " with one student step" if one_step else ""
    if one_step:
        yield Proposal(f"mode '{mode.name}'{where}", mode, one_step=True)
    if mode.name != "difference":
        yield Proposal(f"mode 'difference'{where}", estimator("difference"), one_step=one_step)
    if mode.name != "reinforce" and not asks_finite:
        yield Proposal(f"mode 'reinforce'{where}", estimator("reinforce"), one_step=one_step)
