r"""The base class of all estimators of the teacher's gradient, and the feedback h that they return.

**Sign, everywhere:** the feedback is :math:`h = -\,dL(\theta')/d\,\mathrm{signal}`; positive means
"say this more".

An estimator combines three choices: how w is computed (:meth:`Path.pullback`,
:meth:`Path.adjoints`), how ż is computed (:meth:`InnerStep.tangent` or a difference of outputs),
and what h has a number for (``credits``): each entry of the signal, each example, the whole batch,
or nothing. It changes no parameter.

h is computed in the head, from z = S(x; θ) and ż = d/dε S(x; θ + εw), without running the network
(unless the signal enters x, see :func:`exact_feedback`). If the inner loss also reads the weights,

.. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(z + \varepsilon\dot z, \mathrm{signal}, \theta + \varepsilon w)

d/dε ℓ is compared with ⟨w, g⟩, which it equals by the chain rule (:mod:`metapl.execution.compare`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from metapl.errors import MetaplError, reason_of
from metapl.execution import checks
from metapl.execution.compare import (
    BY_DIFFERENCE,
    EXACTLY,
    ROUNDINGS,
    SlopesDiffer,
    check_same_slopes,
    slopes_differ,
)
from metapl.execution.layout import ONE_PROCESS, Capability
from metapl.execution.local import NOTHING, LocalStudent, as_leaves, mean_of
from metapl.execution.numerics import MissingDerivative, Tree, wide
from metapl.feedback.inner_step import Credited, Credits, InnerStep, credited, inner_loss
from metapl.feedback.keeping import ALL, Keeping
from metapl.feedback.order import NotFiniteFeedback, Order
from metapl.feedback.path import Path
from metapl.problems.base import Kind, Problem, Signal, field_name, kind_of
from metapl.runs.fields import Range, check_fields

NOT_FINITE = (
    "the inner loss, the outer loss or the feedback is NaN or infinite; lower the student's "
    "learning rate, or look for a batch without rows or with extreme examples."
)
OUTER_NOT_FINITE = (
    "the outer loss is NaN or infinite: the outer batch (labeled) has no rows or extreme values, "
    "or the student has diverged; look at the batch, or lower the student's learning rate."
)
State = dict[str, Tensor]
Normalization = Literal["gradient", "learning_rate", "cosine"]
Reduction = Literal["mean", "sum"]
Steps = Annotated[int, Range(1, of="a number of steps")]
Truncation = Annotated[int, Range(0, of="a number of steps")]
Decay = Annotated[float, Range(0, 1, of="a decay")]


@dataclass(frozen=True)
class Feedback:
    """The feedback h on a part of the signal.

    Args:
        h: without a graph: in the shape of that part, or a scalar for the whole batch.
        part: ``"value"`` for a differentiable signal, or the first of its
            :meth:`~metapl.Signal.fields` where it is a dict; ``"log_prob"`` for sampled labels, by
            their score; ``"probs"`` for sampled labels whose expectation is taken; None: no
            feedback.
        others: the feedback on the other fields of a differentiable signal, by name: of its dict,
            and those besides the value that the inner loss depends on.
        used: whether the inner loss depends on the signal at all.
        mean_over: the number of examples by which the sum over the signal is divided: B in all
            processes for the mean of Algorithm 1, 1 for a sum.
    """

    h: Tensor
    part: str | None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    used: bool = True
    mean_over: int = 1

    def teacher_loss(self, signal: Signal) -> Tensor:
        """Return −Σ stopgrad(h)·signal, or with ``mean_over`` its mean, a scalar with the teacher's graph.

        The gradient of the sum is the hypergradient dL(θ′)/dθ_T, because h already contains the 1/B
        of the inner loss.
        """
        if self.part is None:
            return self.h.new_zeros(())
        parts, fields = {self.part: self.h, **self.others}, signal.fields()
        terms = [(-h * fields[name]).sum() for name, h in parts.items()]
        total = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        if self.mean_over != 1:
            total = total / self.mean_over
        if not total.requires_grad and torch.is_grad_enabled():
            given = (
                f"the teacher's signal ({self.part}) has no graph: it was detached, or computed "
                "under no_grad()"
            )
            raise MetaplError(f"{given}; expected one with its graph, or mode='none'.")
        return total

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Feedback:
        """The same with h, and that on other fields, changed.

        ``change`` is also given the field's name.
        """
        others = {name: change(name, h) for name, h in self.others.items()}
        return replace(self, h=change(self.part or "", self.h), others=others)

    def divided_by(self, divisor: Tensor | float) -> Feedback:
        return (
            self
            if isinstance(divisor, float) and divisor == 1.0
            else self.mapped(lambda _, h: h / divisor)
        )

    def chunks(self, parts: int) -> list[Feedback]:
        if self.h.ndim == 0 or parts == 1:
            return [self] * parts
        return [self.mapped(lambda _, h, i=i: h.chunk(parts)[i]) for i in range(parts)]  # type: ignore[misc]

    def of_batch(self, step: InnerStep) -> Tensor | dict[str, Tensor]:
        """h on the whole batch, as the signal's value is: a tensor, or a dict of its floating-point
        tensors. Of a field without rows it is the sum over micro-batches, each of which has a
        signal of its own."""
        parts, value = len(step.passes), step.signal.value
        if parts == 1 and not isinstance(value, dict):
            return self.h.detach()
        by_field = {
            name: h
            if parts == 1 or not h.ndim or step.has_rows(name)
            else h.reshape(parts, -1, *h.shape[1:]).sum(0)
            for name, h in {self.part or "": self.h.detach(), **self.others}.items()
        }
        if not isinstance(value, dict) or self.part is None:
            return by_field[self.part or ""]
        return {
            key: by_field[name].detach() for key in value if (name := field_name(key)) in by_field
        }


class Estimator(ABC):
    """A way to compute the feedback.

    A frozen value. What changes between steps is passed in and out as state.
    """

    name: ClassVar[str]
    """The mode's name."""
    labels: ClassVar[tuple[Kind, ...]]
    """The kinds of signal that it takes, ``"soft"`` (differentiable) and ``"hard"`` (sampled), by preference."""
    credits: ClassVar[Credits] = "signal"
    """What gets a number of its own: each entry of the ``"signal"``, each ``"example"``, the
    ``"batch"``, or ``"nothing"``."""
    keep_graph: ClassVar[bool] = False
    """Whether the inner gradient must stay differentiable with respect to the signal."""
    keep_on: str | None = None
    """Where states of a look-ahead are kept, as for :class:`Forward`."""
    looks_ahead: ClassVar[bool] = False
    """Whether it takes more than one student step."""

    def __post_init__(self) -> None:
        with suppress(
            NameError
        ):  # annotations under TYPE_CHECKING cannot be read, and are not checked
            check_fields(self)

    @property
    def exact(self) -> bool:
        """Whether the feedback on a differentiable signal is the whole gradient, but for rounding."""
        return False

    def keeping(self, steps: int, size: int, student: LocalStudent) -> Keeping:
        """Which of so many steps of a look-ahead, of so many bytes each, keep their states."""
        return ALL

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({ONE_PROCESS} if self.keep_graph else ())

    def init(self) -> State:
        return {}

    @abstractmethod
    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        """One :class:`Feedback` per step of the path, and the next state."""

    def orders(
        self, steps: int, problem: Problem, student: LocalStudent, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        """Return the orders of differentiation that a path of so many steps may take, the preferred first.

        The first step takes the first of them that runs, later ones the same
        (:mod:`metapl.feedback.order`). ``wrt`` is what :func:`metapl.hypergradient` differentiates
        in besides the signals. Empty: there is nothing to choose.
        """
        return ()

    def checked_feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        """:meth:`feedback`, refused on all ranks where it would make the teacher NaN."""
        try:
            feedback, state = self.feedback(path, state)  # line 4: h
        except MetaplError as error:
            # What is computed from a NaN is NaN, and the checks on the way would name causes of
            # their own.
            if begins_in_outer_loss(path):
                raise MetaplError(OUTER_NOT_FINITE) from error
            raise
        if path.is_tried:
            refuse_not_finite_feedback(feedback, path)
        with NOTHING if path.student.ranks.alone else path.student.ranks.agreed():
            if True not in [of_step.used for of_step in feedback]:
                given = f"the inner loss of {kind_of(path.problem)} does not depend on its signal"
                raise MetaplError(
                    f"{given}; expected one that does, without detach() or argmax, or mode='none'."
                )
            numbers = [path.inner_loss, *path.known_outer_losses]
            for of_step in feedback:
                numbers += [h.sum() if h.ndim else h for h in (of_step.h, *of_step.others.values())]
            try:
                checks.refuse_not_finite(NOT_FINITE, *numbers)
            except MetaplError as error:
                if begins_in_outer_loss(path):
                    raise MetaplError(OUTER_NOT_FINITE) from error
                if bool(path.inner_loss.isfinite()):
                    raise NotFiniteFeedback(NOT_FINITE) from error
                raise
        return feedback, state


def refuse_not_finite_feedback(feedback: Sequence[Feedback], path: Path) -> None:
    """Refuse, on all ranks and at once, feedback that another order of differentiation may give in finite numbers.

    Cost: the host waits once for the device.
    """
    sums = [h.sum().double() for of_step in feedback for h in (of_step.h, *of_step.others.values())]
    # Where a loss is not finite, no order mends that, and what follows refuses it.
    is_mendable = path.inner_loss.isfinite() & ~torch.stack(sums).isfinite().all()
    if path.student.ranks.any(bool(is_mendable) and not begins_in_outer_loss(path)):
        raise NotFiniteFeedback(NOT_FINITE)


def begins_in_outer_loss(path: Path) -> bool:
    """Return whether an outer loss is NaN or infinite, and the inner loss is not.

    The host waits for the device.
    """
    is_infinite = [not bool(loss.isfinite()) for loss in path.known_outer_losses]
    return any(is_infinite) and bool(path.inner_loss.isfinite())


def padded(feedback: Sequence[Feedback], path: Path) -> list[Feedback]:
    """Feedback on the last steps of a path, and zero feedback on the steps before them."""
    # Of no step at all, the first weights alone are asked for, and the signals get nothing.
    if feedback:
        first = feedback[0]
    else:
        step = path.steps[-1]
        first = replace(feedback_from(step, dict.fromkeys(credited(step.signal))), used=True)
    zeros = []
    part = first.part or "value"
    for step in path.steps[: len(path.steps) - len(feedback)]:
        fields = step.signal.fields()
        others = {name: torch.zeros_like(fields[name]) for name in first.others}
        zeros.append(replace(first, h=torch.zeros_like(fields[part]), others=others))
    return [*zeros, *feedback]


def examples_of_mean(reduction: Reduction, step: InnerStep) -> int:
    """Return what the cross-entropies of sampled labels are divided by.

    B in all processes for ``"mean"``, else 1.
    """
    if reduction == "sum":
        return 1
    assert step.signal.log_prob is not None  # the modes with a reduction take sampled labels
    return len(step.signal.log_prob) * step.student.ranks.size


def divisor(normalization: str, step: InnerStep, w: Tree | None = None) -> Tensor | float:
    """The divisor of h, by the name of the normalization.

    ``"gradient"``: 1, the true gradient, which decays with η. ``"learning_rate"``: η, so that the
    size depends on the labeled gradient only; for SGD, because over an η as small as Adam's h
    drowns the teacher's own losses (docs/no-help.md). ``"cosine"``: ‖w‖·‖g‖; the sum of h over the
    batch is then the cosine between the student's step and the labeled gradient.
    """
    if normalization == "learning_rate":
        eta = step.update.learning_rate
        if eta is None:
            raise MetaplError(
                "a TorchOpt transform, or SGD with a rate for each entry, has no single learning "
                "rate; expected "
                'normalization="gradient".'
            )
        return eta if eta > 0 else 1.0
    if normalization == "gradient":
        return 1.0
    assert w is not None, "a cosine is with a direction"
    return (step.space.norm(w) * step.space.norm(step.gradient)).clamp_min(1e-30)


def exact_feedback(step: InnerStep, w: Tree, of: Credited = "signal") -> Feedback:
    """The feedback along w by exact derivatives, in the step's order: from the graph of g where the
    pass has kept it; by ż; or by double backward, as always where the signal enters the student's
    input, and ⟨∂ℓ/∂z, ż⟩ goes through the whole network."""
    by_graph = [part.in_leaves(w) for part in step.passes]
    if by_graph[0] is not None:
        return feedback_from(step, step.in_signal(credited(step.signal, of), by_graph), of)  # type: ignore[arg-type]
    if step.signal_inputs:
        _, gradients = step.second_derivatives(w, step.signal.differentiable(), curved=False)
        return feedback_from(step, gradients, of)
    if step.order == "double_backward":
        _, gradients = step.second_derivatives(w, credited(step.signal, of), curved=False)
        return feedback_from(step, gradients, of)
    return head_feedback(step, w, step.tangent(w), of=of)


def head_feedback(
    step: InnerStep,
    w: Tree,
    z_dot: Tensor,
    rounding: Tensor | None = None,
    *,
    of: Credited = "signal",
) -> Feedback:
    """The feedback along w from ż, (B, ...), in the head alone; ``rounding``: a bound on the norm of its error.

    For sampled labels ℓ is linear in its target, so h_ik = −(1/B) d/dε ℓ(z_i, class k) is the
    derivative at the one-hot rows of the labels. And Σ_i u_i d/dε ℓ_i is linear in u, so its
    gradient is d/dε ℓ itself: forward mode by two reverse passes.
    """
    leaves = as_leaves(credited(step.signal, of))
    slope = _slope(step, leaves, w, z_dot, rounding)
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if slope.requires_grad:
        gradients = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
    return feedback_from(step, dict(zip(leaves, gradients, strict=True)), of)


@dataclass(frozen=True)
class Move:
    """The student's outputs after two moves of its weights along w, in the units of w."""

    ahead: Tensor  # S(x; θ + after·w), (B, ...)
    behind: Tensor  # S(x; θ + before·w)
    after: Tensor
    before: Tensor  # negative, or zero
    width: Tensor  # after − before
    rounding: Tensor  # a bound on the norm of the error of ahead − behind


def feedback_by_losses(
    step: InnerStep, w: Tree, move: Move, *, of: Credited = "signal"
) -> Feedback:
    """The feedback along w by a difference of the loss's derivative in the signal; first derivatives alone.

    The error is O(δ²), of a one-sided move O(δ), and the rounding of that derivative over the
    move's length.
    """
    leaves = as_leaves(credited(step.signal, of))
    after, gradients = _loss_in_leaves(step, leaves, w, move.ahead, move.after)
    before, others = _loss_in_leaves(step, leaves, w, move.behind, move.before)
    differences: dict[str, Tensor | None] = {}
    for name, gradient, other in zip(leaves, gradients, others, strict=True):
        has_both = gradient is not None and other is not None
        differences[name] = (gradient - other) / move.width if has_both else None  # type: ignore[operator]
    by_gradient, spread = step.space.slope(step.gradient, w)
    slope = step.student.ranks.sum(after - before) / move.width
    eps = torch.finfo(step.shifted_dtype).eps
    rounding = ROUNDINGS * eps * step.space.norm(step.gradient) * step.space.norm(w)
    rounding = rounding + ROUNDINGS * eps * step.student.ranks.sum(after.abs()) / move.width
    tolerance = BY_DIFFERENCE[step.passes[0].rounded_to].slope
    check_same_slopes(slope, by_gradient, spread + slope.abs(), tolerance, rounding)
    return feedback_from(step, differences, of)


def _loss_in_leaves(
    step: InnerStep, leaves: Tree, w: Tree, z: Tensor, factor: Tensor
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return this rank's share of the mean loss at outputs z and weights θ + factor·w, and its gradient in leaves."""
    theta: Tree = {}
    if step.student.has_whole_weights:
        theta = {
            name: wide(p) + factor * wide(w[name]) if name in w else p
            for name, p in step.params.items()
        }
    # A loss may read ``student.parameters()``, which are then these.
    with (
        step.student.with_weights(theta) if step.student.has_whole_weights else NOTHING,
        torch.enable_grad(),
    ):
        mean = _mean_loss(step, leaves, z, theta)
        if not mean.requires_grad:
            return mean.detach(), [None] * len(leaves)
        return mean.detach(), torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)


def _mean_loss(step: InnerStep, leaves: Tree, z: Tensor, theta: Tree) -> Tensor:
    """Return this rank's share of (1/B) Σ_i factor_i ℓ_i(z, signal, θ), micro-batch by micro-batch."""
    ranks, parts = step.student.ranks, len(step.passes)
    # A loss may look at the batch as a whole.
    signals, chunks = step.signal.having(leaves).chunks(parts), z.chunk(parts)
    factors = leaves.get("factors")
    of_part = factors.chunk(parts) if factors is not None else [None] * parts
    values = []
    for part, signal, x, factor, z_part in zip(
        step.passes, signals, step.micro_batches, of_part, chunks, strict=True
    ):
        with part.drawing_as_loss():
            values.append(
                inner_loss(
                    step.problem, signal, x, step.student.has_whole_weights, factor, z_part, theta
                )
            )
    # The ranks' shares add up to the mean.
    return mean_of(values) if ranks.alone else mean_of(values) / ranks.size


def feedback_from(
    step: InnerStep, gradients: Mapping[str, Tensor | None], of: Credited = "signal"
) -> Feedback:
    """h = −dL(θ′)/d(field), from the gradients in what is :func:`credited`; None: no dependence."""
    signal = step.signal
    if of == "example":
        h_B = gradients["factors"]
        assert h_B is not None
        return Feedback(-h_B, "log_prob")
    part = "probs" if signal.sampled else "value"
    by_field = {part if name == "value" else name: g for name, g in gradients.items()}
    h = {name: -g for name, g in by_field.items() if g is not None}
    used = bool(h)
    of_value = [part]
    if isinstance(
        signal.value, dict
    ):  # its entries are fields of their own; log_prob and others are the signal's
        of_value = [name for name in by_field if name not in vars(signal)]
    # A zero for what is not used, so that the feedback has the shape of the signal.
    h |= {name: torch.zeros_like(signal.fields()[name]) for name in of_value if name not in h}
    first = h.pop(of_value[0])
    return Feedback(first, of_value[0], h, used)


def _slope(
    step: InnerStep, leaves: Tree, w: Tree, z_dot: Tensor, of_z_dot: Tensor | None
) -> Tensor:
    """d/dε (1/B) Σ_i factor_i ℓ_i(z + εż, signal, θ + εw), this rank's share.

    Flagged where it is not ⟨w, g⟩.
    """
    ranks = step.student.ranks
    z = step.outputs.detach().requires_grad_()
    # A loss may read the weights as ``params``, or as ``student.parameters()``: both are these
    # leaves.
    weights: AbstractContextManager[Tree] = nullcontext({})
    if step.student.has_whole_weights:
        weights = step.student.with_leaves(step.params)
    is_choosing = of_z_dot is None and step.student.chooses_order
    with weights as theta, torch.enable_grad():
        try:
            mean = _mean_loss(step, leaves, z, theta)
        except Exception as error:
            if not is_choosing or isinstance(error, MetaplError):
                raise
            # It ran in the inner pass, so it needs the graph that was there, as a penalty on its
            # own gradient does.
            step.student.compares_gradients = True
            what = "the inner loss does not run on the outputs without the graph of the forward"
            raise MissingDerivative(f"{what} ({reason_of(error)})") from error
        grads = torch.autograd.grad(
            mean, [z, *theta.values()], create_graph=True, allow_unused=True
        )
        directions = [
            z_dot,
            *(w[name] if name in w else torch.zeros_like(p) for name, p in theta.items()),
        ]
        terms = [g * t for g, t in zip(grads, directions, strict=True) if g is not None]
        slope = (
            terms[0].sum() if len(terms) == 1 else torch.stack([term.sum() for term in terms]).sum()
        )

    by_gradient, spread = step.space.slope(step.gradient, w)
    forward, table = ranks.sum(slope.detach()), EXACTLY if of_z_dot is None else BY_DIFFERENCE
    tolerance = table[step.passes[0].rounded_to].slope
    for term in terms:
        spread = spread + ranks.norm(term.detach())
    if (
        ranks.alone
        and not checks.waits(slope)
        and bool((forward - by_gradient).abs() <= tolerance * spread)
    ):
        return slope
    # Both sums may cancel to rounding: of a bias before batch normalization, whose gradient is zero
    # but for rounding, a first step of Adam makes the whole direction.
    rounding = (
        ROUNDINGS
        * torch.finfo(step.shifted_dtype).eps
        * step.space.norm(step.gradient)
        * step.space.norm(w)
    )
    if of_z_dot is not None and grads[0] is not None:
        rounding = rounding + ranks.norm(grads[0].detach()) * of_z_dot
    if is_choosing:
        # The host waits for a device here, once: another order may follow what the outputs do not
        # carry.
        differ = ranks.any(bool(slopes_differ(forward, by_gradient, spread, tolerance, rounding)))
        if differ:
            step.student.compares_gradients = True
            raise SlopesDiffer
    check_same_slopes(forward, by_gradient, spread, tolerance, rounding)
    return slope
