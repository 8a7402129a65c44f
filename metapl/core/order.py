r"""In which order the feedback's second derivative is taken, chosen once, by trying.

The feedback is a derivative of :math:`\langle g, w \rangle = \langle \partial\ell/\partial z, \dot
z \rangle` in the signal: g is the gradient of the inner loss ℓ, w the direction that the feedback
is taken along, ż the derivative of the student's outputs z along w
(:mod:`metapl.feedback.forward`). There are several ways to it, of one
value, which need other derivatives of the student's operations:

- ``graph``: the graph of g, which the inner pass has kept. The student's operations twice, in
  reverse.
- ``tangent``: ż by a pass in forward mode, then the head twice. The operations once, in forward
  mode.
- ``double_backward``: the inner pass once more, with the graph of its gradient. As ``graph``, in
  one more pass.
- ``outputs``: ż by a difference of outputs, then the head twice. Any operation, and a loss with a
  second derivative.
- ``losses``: a difference of the loss's derivative in the signal. Any operation, and any loss.

An estimator says which of them a path may take, the preferred first (:meth:`Estimator.orders`). The
first step takes the first one that runs and is finite; an attempt that fails so has moved nothing.
Later steps take the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar

from metapl.errors import MetaplError
from metapl.execution.compare import SlopesDiffer
from metapl.execution.numerics import MissingDerivative

Order = Literal["graph", "tangent", "double_backward", "outputs", "losses"]
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class NotFiniteFeedback(MetaplError):
    """The inner loss is finite, and the feedback is NaN or infinite in the order that was taken."""


Failure = MissingDerivative | NotFiniteFeedback | SlopesDiffer


class Attempt(Protocol[Result_co]):
    """A step in one order of differentiation, which moves nothing where it fails."""

    def __call__(self, order: Order | None, is_tried: bool) -> Result_co:
        """Return what the step returns.

        Args:
            order: None where there is nothing to choose.
            is_tried: whether the order is being chosen.
        """


class Orders:
    """The orders of differentiation that have been chosen, by the candidates of each choice."""

    def __init__(self) -> None:
        self._chosen: dict[str, Order] = {}

    def take(
        self,
        candidates: Sequence[Order],
        attempt: Attempt[Result],
        *,
        begin_again: Callable[[], object],
    ) -> Result:
        """Return what a step in the chosen order returns, or in the first candidate that runs.

        Args:
            candidates: the orders that the step may take, the preferred first; none, where there is
                nothing to choose.
            attempt: takes the step in an order.
            begin_again: is called between two attempts.
        """
        if not candidates:
            return attempt(None, is_tried=False)
        key = _key(candidates)
        if key in self._chosen:
            return attempt(self._chosen[key], is_tried=False)
        failures: list[Failure] = []
        for order in candidates:
            if failures:
                begin_again()
            try:
                result = attempt(order, is_tried=True)
            except (MissingDerivative, NotFiniteFeedback, SlopesDiffer) as error:
                failures.append(error)
                continue
            self._chosen[key] = order
            return result
        raise _why_none_runs(failures)

    def chosen(self, candidates: Sequence[Order]) -> Order | None:
        """Return the order that was chosen among these; None where there is nothing to choose."""
        return self._chosen.get(_key(candidates))

    def state_dict(self) -> dict[str, str]:
        """Return the choices, for a checkpoint."""
        return dict(self._chosen)

    def load_state_dict(self, state: dict[str, Order]) -> None:
        """Take the choices of a checkpoint."""
        self._chosen = dict(state)


def _key(candidates: Sequence[Order]) -> str:
    """Return what a choice is known by."""
    return ", ".join(candidates)


def _why_none_runs(failures: Sequence[Failure]) -> MetaplError:
    """Return one error for attempts that all failed, which names each missing derivative."""
    missing: list[str] = []
    for error in failures:
        if isinstance(error, SlopesDiffer):
            return error
        if isinstance(error, MissingDerivative) and error.what not in missing:
            missing.append(error.what)
    if not missing:
        return failures[0]
    combined = MissingDerivative("; ".join(missing))
    combined.__cause__ = failures[-1].__cause__
    return combined
