r"""What an estimator is handed: the student's steps.

:meth:`metapl.feedback.Estimator.feedback` is a formula. The symbols in it are found by
:class:`metapl.core.path.Path` and its :class:`~metapl.core.step.InnerStep`, on any engine.

An estimator that asks for nothing but the protocols of this file, and reads no value of a tensor on
the host, can be recorded (``compile=True``, ``functional()``), and says so by ``is_pure = True``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from metapl.core.lesson import Credited
from metapl.core.order import Order
from metapl.core.step import Move
from metapl.execution.numerics import Tree
from metapl.problems.base import Signal

if TYPE_CHECKING:
    from metapl.core.draws import Draws

Gradients = Mapping[str, Tensor | None]
"""Derivatives by what is credited (:func:`metapl.core.step.credited`), with None where
there is no dependence."""


class Products(Protocol):
    """Products of trees of weights, over all processes that hold parts of them."""

    def dot(self, a: Tree, b: Tree) -> Tensor:
        """Return ⟨a, b⟩ over the parameters that both have, a scalar."""

    def norm(self, a: Tree) -> Tensor:
        """Return ‖a‖ over all parameters, a scalar."""

    def count(self, a: Tree) -> int:
        """Return the number of weights in a tree."""


class StudentStep(Protocol):
    """One step of the student, θ′ = U(θ, g, s), on one inner batch."""

    @property
    def signal(self) -> Signal:
        """The teacher's signal about the batch, without its graph."""

    @property
    def params(self) -> Tree:
        """θ, the weights before the step."""

    @property
    def outputs(self) -> Tensor:
        """z = S(x; θ), (B, ...)."""

    @property
    def inner_loss(self) -> Tensor:
        """ℓ = (1/B) Σ ℓ_i, a scalar."""

    @property
    def gradient(self) -> Tree:
        """g = ∇_θ ℓ."""

    @property
    def space(self) -> Products:
        """Products and norms of trees such as w and g."""

    @property
    def learning_rate(self) -> float | Tensor | None:
        """η of the first param group; None where the optimizer has no single rate."""

    @property
    def processes(self) -> int:
        """The number of processes that share the batch, each with as many rows of its own."""

    def derivatives_along(self, w: Tree, of: Credited = "signal") -> Gradients:
        r"""Return ∂⟨g, w⟩/∂(signal), exactly, in the way that the road has chosen.

        .. math:: \frac{\partial}{\partial\,\mathrm{signal}} \langle g, w \rangle =
                  \frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
                  \ell(S(x; \theta + \varepsilon w), \mathrm{signal}, \theta + \varepsilon w)

        Args:
            w: by parameter; one that is missing counts as zero.
            of: ``"signal"``, or ``"example"``: in the weight of each example's loss.
        """

    def derivatives_by_tangent(
        self, w: Tree, z_dot: Tensor, rounding: Tensor | None = None, of: Credited = "signal"
    ) -> Gradients:
        """Return the same from ż = d/dε S(x; θ + εw), (B, ...), in the head alone.

        Args:
            rounding: a bound on the norm of the error of ż, where it is no exact derivative.
        """

    def derivatives_by_move(self, w: Tree, move: Move, of: Credited = "signal") -> Gradients:
        """Return the same by a difference between the outputs at two weights along w."""

    def shifted(self, factor: Tensor, w: Tree) -> Tensor:
        """Return S(x; θ + factor·w), (B, ...), in float32 or wider, outside autocast."""

    def check_shifted(self, first: Tensor, second: Tensor) -> None:
        """Flag shifted outputs whose mean is not that of the pass at θ."""

    @property
    def shifted_dtype(self) -> torch.dtype:
        """The dtype that a shifted pass computes in."""

    @property
    def in_full_precision(self) -> bool:
        """Whether :attr:`outputs` were computed as a shifted pass computes them."""

    @property
    def order(self) -> Order | None:
        """In which order the second derivative is taken (:mod:`metapl.core.order`)."""


class StudentPath(Protocol):
    """The student's K steps from θ to θ′, and the outer loss there."""

    @property
    def steps(self) -> Sequence[StudentStep]:
        """The K steps, without derivatives of a look-ahead."""

    @property
    def outer_loss(self) -> Tensor:
        """L(θ′), a scalar. Cost: a forward pass, unless its gradient has been computed."""

    @property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′). Cost: a forward pass, and that of L(θ′)."""

    draws: Draws
    """Random numbers of the step, of an estimator that says that it ``draws``."""

    def outer_losses(self, signals: Sequence[Signal]) -> Tensor:
        """Return L after the step of a path of one step on each of several signals, (n,).

        Each is the same step, with the masks and the statistics of the inner pass, and all outer
        passes have the same masks: what the losses differ by is the signals. For the loss of the
        step's own signal among them, give that too.

        Cost of each: a forward and a backward pass of the student on the inner batch (on the pure
        road a backward pass), and a forward pass on the outer one.
        """

    def outer_gradient(self) -> Tree:
        """Return v = ∇L(θ′). Cost: a forward and a backward pass."""

    def pullback(self) -> tuple[StudentStep, Tree]:
        """Return the step of a path of one step, and its w = (∂U/∂g)ᵀ v."""

    def adjoints(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None = None
    ) -> Iterable[tuple[StudentStep, Tree, Gradients | None]]:
        """Return the last ``truncate`` steps, the last first, with w and ∂⟨g, w⟩/∂(fields).

        None in the place of these derivatives: ask the step for them, by
        :meth:`StudentStep.derivatives_along`. Where they are there, w may be empty.

        Args:
            fields: what the derivatives are in, by name, as a function of a step's signal.
            truncate: None: all steps.
        """

    def gradients_in_signals(
        self, truncate: int | None = None
    ) -> Iterable[tuple[StudentStep, Gradients]]:
        """Return the last ``truncate`` steps from the first to the last, each with dL(θ′)/d(field).

        By double backward through the step: no rule of :mod:`metapl.updates` is read.
        """
