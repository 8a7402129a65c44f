r"""The base class of all estimators of the teacher's gradient, and the feedback h that they return.

**Sign, everywhere:** the feedback is :math:`h = -\,dL(\theta')/d\,\mathrm{signal}`; positive means
"say this more".

Three symbols are used throughout: v = ∇L(θ′), the gradient of the outer loss after the student's
step θ′ = U(θ, g); w = (∂U/∂g)ᵀ v, the same pulled back through that step to the student's gradient
g; and ż = d/dε S(x; θ + εw), the derivative of the student's outputs z = S(x; θ) along w.

An estimator is a formula, and combines three choices:

- how w is computed (:meth:`~metapl.core.terms.StudentPath.pullback`,
  :meth:`~metapl.core.terms.StudentPath.adjoints`);
- how ż is computed, exactly or by a difference of outputs;
- how finely the feedback is resolved (``credits``): h has one number for each entry of the signal,
  for each example, or for the whole batch; or there is no feedback.

It changes no parameter. How w and ż are found is a matter of the road
(:mod:`metapl.core.terms`).

h is computed in the head, the part of the computation from the outputs to the loss, from z and ż,
without running the network (unless the signal enters x, see :func:`exact_feedback`). If the inner
loss also reads the weights,

.. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(z + \varepsilon\dot z, \mathrm{signal}, \theta + \varepsilon w)

d/dε ℓ is compared with ⟨w, g⟩, which it equals by the chain rule (:mod:`metapl.execution.compare`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.keeping import ALL, Keeping
from metapl.core.lesson import Credited, Credits, credited
from metapl.core.order import NotFiniteFeedback, Order
from metapl.core.path import Path
from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.layout import ONE_PROCESS, Capability
from metapl.execution.numerics import Tree
from metapl.execution.ranks import NOTHING
from metapl.problems.base import BilevelProblem, Kind, field_name, kind_of
from metapl.runs.fields import Range, check_fields

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.core.terms import Gradients, StudentPath, StudentStep

NOT_FINITE = (
    "the inner loss, the outer loss or the feedback is NaN or infinite; lower the student's "
    "learning rate, or look for a batch without rows or with extreme examples."
)
OUTER_NOT_FINITE = (
    "the outer loss is NaN or infinite: the outer batch has no rows or extreme values, the "
    "student's learning rate is not finite, or it has diverged; look at the batch and at the rate, "
    "or lower it."
)
FEEDBACK_NOT_FINITE = (
    "the losses are finite, and the feedback is NaN or infinite; lower the student's learning "
    "rate, or look for an operation whose second derivative is, such as the standard deviation of "
    "equal numbers."
)
State = dict[str, Tensor]
# The name of the key of an estimator's draws in its state.
KEY = "draws"
Normalization = Literal["gradient", "learning_rate", "cosine"]
Reduction = Literal["mean", "sum"]
Steps = Annotated[int, Range(1, of="a number of steps")]
Truncation = Annotated[int, Range(0, of="a number of steps")]
Decay = Annotated[float, Range(0, 1, of="a decay")]


class Estimator(ABC):
    """A way to compute the feedback: a frozen value.

    What changes between steps is passed in and out as state.
    """

    name: ClassVar[str]
    """The mode's name."""
    labels: ClassVar[tuple[Kind, ...]]
    """The kinds of signal that it takes, by preference.

    ``"soft"`` is a differentiable signal, ``"hard"`` a sampled one.
    """
    credits: ClassVar[Credits] = "signal"
    """For what the feedback h has one number each.

    ``"signal"``: for each entry of the signal. ``"example"``: for each example. ``"batch"``: one
    number for the whole batch. ``"nothing"``: there is no feedback.
    """
    gives_gradient: ClassVar[bool] = True
    """Whether the teacher gets any gradient of the outer loss: feedback, or the direct term."""
    is_derivative: ClassVar[bool] = False
    """Whether h is −dL(θ′)/d(signal) itself, but for :attr:`normalization` and :attr:`truncate`.

    A road may then find it in a way of its own, without :meth:`feedback`, as two compiled graphs
    do. A subclass with another :meth:`feedback` has to say so again.
    """
    is_through_step: ClassVar[bool] = True
    """Whether h is of the student's step; False of an h at an optimum (:meth:`w_at_optimum`)."""
    takes_outer_losses: ClassVar[bool] = False
    """Whether it asks for outer losses at several weights.

    They are those of :meth:`~metapl.core.terms.StudentPath.outer_losses`, and
    ``outer_loss_before``. One number for the batch that is made of them is no derivative.
    """
    draws: ClassVar[bool] = False
    """Whether :meth:`feedback` draws random numbers, by ``path.draws``."""
    # Options that an estimator may have as fields, with what holds without them.
    normalization: Normalization = "gradient"
    reduction: Reduction = "sum"
    truncate: Truncation | None = None
    keep_every: Steps | None = None
    keep: Literal["tree"] | None = None
    keep_on: Literal["cpu"] | None = None

    shape: ClassVar[Mapping[str, Any]] = {
        "normalization": "gradient",
        "truncate": None,
        "keep_on": None,
        "reduction": "sum",
    }
    """The options that shape h, or say where it is found, and their values without a shape
    (:meth:`without_shape`)."""
    keep_graph: ClassVar[bool] = False
    """Whether the inner gradient must stay differentiable with respect to the signal."""
    by_differences: ClassVar[str] = "mode 'difference'"
    """What runs in its place, on one student step, where an operation lacks a derivative."""
    looks_ahead: ClassVar[bool] = False
    """Whether it takes more than one student step."""
    is_pure: ClassVar[bool] = False
    """Whether :meth:`feedback` is written in the terms of both roads.

    It then asks for nothing but the protocols of :mod:`metapl.core.terms`, and reads no number
    on the host: it is recorded too.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Another formula gives another h, unless it says otherwise.
        if "feedback" in vars(cls) and "is_derivative" not in vars(cls):
            cls.is_derivative = False

    def __post_init__(self) -> None:
        check_fields(self)

    def missing(self) -> str:
        """Return what a class of a user's own has left out, in words; "" for nothing."""
        if not isinstance(getattr(self, "name", None), str):
            return "a name; expected one in its class, such as name = 'mine'"
        if self.credits not in get_args(Credits):
            return f"known credits; expected some of {few([*get_args(Credits)])} in its class"
        labels = getattr(self, "labels", None)
        if isinstance(labels, tuple) and labels and {*labels} <= {*get_args(Kind)}:
            return ""
        return "its kinds of labels; expected them in its class, such as labels = ('soft',)"

    @property
    def credits_of_steps(self) -> Credited:
        """In what the student's steps are differentiated: each example's loss, or the signal.

        One number for the whole batch, or none, needs no derivative finer than the signal's, so
        that their steps are those for the signal.
        """
        if self.credits == "example":
            return "example"
        return "signal"

    @property
    def has_direct_term(self) -> bool:
        """Whether the teacher also gets the direct term of an outer loss that reads it.

        That is ∂L(θ′; φ)/∂φ at fixed θ′. It belongs to a feedback on each entry of a soft signal,
        and to no scalar of labels that were drawn.
        """
        return self.credits == "signal" and "soft" in self.labels

    @property
    def takes_differences(self) -> bool:
        """Whether h comes from a difference of outputs, which errs by their curvature."""
        return False

    @property
    def exact(self) -> bool:
        """Whether the feedback on a differentiable signal is the whole gradient, to rounding."""
        return self.is_derivative and self.truncate is None and self.normalization == "gradient"

    def keeping(self, steps: int, size: int, student: Engine) -> Keeping:
        """Return which steps of a look-ahead keep their states.

        The adjoint computes the others again.

        Args:
            size: of the state of a step, in bytes.
        """
        return ALL

    @property
    def requires(self) -> frozenset[Capability]:
        """What the student has to offer, by names of :mod:`metapl.execution.layout`."""
        return frozenset({ONE_PROCESS} if self.keep_graph else ())

    def init(self) -> State:
        """Return the state before the first step."""
        return {}

    def without_shape(self) -> Estimator:
        """Return the estimator with its h as it is found, as verification compares it.

        It is neither normalized, nor less a baseline, nor truncated, nor a mean. What only shapes h
        is no part of the derivative: the mean of Algorithm 1 is 1/B of it.
        """
        shaped: Any = self
        names = {option.name for option in fields(shaped)} if is_dataclass(shaped) else set()
        plain_options = {name: value for name, value in self.shape.items() if name in names}
        plain: Estimator = replace(shaped, **plain_options) if plain_options else self
        return plain

    @abstractmethod
    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        """Return one :class:`Feedback` per step of the path, and the next state."""

    def h_of_losses(self, before: Tensor, after: Tensor) -> Tensor | None:
        """Return the h that L(θ) and L(θ′) give by themselves; None: it is made of more."""
        return None

    def w_at_optimum(self, product: Callable[[Tree], Tree], v: Tree, rate: float | None) -> Tree:
        """Return the w of an h that is not of the student's step (:attr:`is_through_step`).

        Args:
            product: of a tree with ∂²ℓ/∂θ².
            v: ∇L(θ).
            rate: the learning rate of the inner optimizer.
        """
        raise NotImplementedError(f"mode {self.name!r} is of the student's step")

    def doubt(self, numbers: Mapping[str, Tensor]) -> str:
        """Return why a gradient that is what the mode says may still be far from what it is for.

        Verification warns of it. "" for nothing.

        Args:
            numbers: of the mode's :class:`Feedback`.
        """
        return ""

    def orders(
        self, steps: int, problem: BilevelProblem, student: Engine, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        """Return the orders of differentiation that a path may take, the preferred first.

        The first step takes the first of them that runs, later ones the same
        (:mod:`metapl.core.order`). Empty: there is nothing to choose.

        Args:
            steps: of the student.
            wrt: what :func:`metapl.hypergradient` differentiates in besides the signals.
        """
        return ()

    def first_state(self, generator: torch.Generator | None, device: torch.device) -> State:
        """Return :meth:`init`, and the key of its draws where it has any, by this generator."""
        if not self.draws:
            return self.init()
        from metapl.core.draws import first_key

        return {**self.init(), KEY: first_key(generator, device)}

    def drawn_feedback(self, path: Path, state: State) -> Any:
        """Return :meth:`feedback`, with draws by the key in the state, and the next state."""
        from metapl.core.draws import Draws, next_key

        rest = dict(state)
        key = rest.pop(KEY)
        path.draws = Draws(key, path.student.ranks.rank, path.student.shard)
        given: Any = self.feedback(path, rest)
        match given:
            case [feedback, dict(next_state)]:
                return feedback, {**next_state, KEY: next_key(key)}
        return given

    def checked_feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        """Return :meth:`feedback`, or refuse one that the teacher cannot learn from, on all ranks.

        Raises: :class:`metapl.MetaplError` for losses or feedback that are NaN or infinite, and
            where the inner loss depends on the signal in no step. An error on the way to the
            feedback is replaced by one about the outer loss where that is what is not finite.
        """
        # One that writes to it must not move the state of a step that is then refused.
        state = {name: t.clone() for name, t in state.items()}
        try:
            # Line 4 of Algorithm 1 (Meta Pseudo Labels): h.
            given = self.drawn_feedback(path, state) if self.draws else self.feedback(path, state)
        except MetaplError as error:
            # What is computed from a NaN is NaN, and the checks on the way would name causes of
            # their own.
            if begins_in_outer_loss(path):
                raise MetaplError(OUTER_NOT_FINITE) from error
            # The outer loss is not the cause, and the error says what is.
            raise
        if path.look is not None:
            path.look.at_feedback(given, path.steps, type(self).__name__)
        feedback, state = given
        if path.is_tried:
            refuse_not_finite_feedback(feedback, path)
        with NOTHING if path.student.ranks.alone else path.student.ranks.agreed():
            numbers = [path.inner_loss, *path.known_outer_losses.values()]
            for of_step in feedback:
                for h in (of_step.h, *of_step.others.values()):
                    numbers.append(h.sum() if h.ndim else h)
            if not any(of_step.used for of_step in feedback):
                name = f"the inner loss of {kind_of(path.problem)}"
                raise MetaplError(f"{name} does not depend on its signal; expected one that does.")
            try:
                checks.refuse_not_finite(NOT_FINITE, *numbers)
            except MetaplError as error:
                if begins_in_outer_loss(path):
                    # The inner loss is finite and an outer loss is not: it is the cause.
                    raise MetaplError(OUTER_NOT_FINITE) from error
                if bool(path.inner_loss.isfinite()):
                    # All losses are finite, so it is the feedback that is not.
                    raise NotFiniteFeedback(FEEDBACK_NOT_FINITE) from error
                # The inner loss is not finite, and the others follow from it.
                raise
        return feedback, state


def refuse_not_finite_feedback(feedback: Sequence[Feedback], path: Path) -> None:
    """Refuse feedback that another order of differentiation may give in finite numbers.

    All ranks refuse it, at once. Cost: the host waits once for the device.
    """
    sums = []
    for of_step in feedback:
        sums += [h.sum().double() for h in (of_step.h, *of_step.others.values())]
    # Where a loss is not finite, no order mends that, and what follows refuses it.
    is_mendable = path.inner_loss.isfinite() & ~torch.stack(sums).isfinite().all()
    if path.student.ranks.any(bool(is_mendable) and not begins_in_outer_loss(path)):
        raise NotFiniteFeedback(FEEDBACK_NOT_FINITE)


def begins_in_outer_loss(path: Path) -> bool:
    """Return whether an outer loss is NaN or infinite, and the inner loss is not.

    The host waits for the device. It is not known where operations are recorded.
    """
    if checks.transformed():
        return False
    outer_losses_are_finite = [bool(loss.isfinite()) for loss in path.known_outer_losses.values()]
    return not all(outer_losses_are_finite) and bool(path.inner_loss.isfinite())


def padded(feedback: Sequence[Feedback], path: StudentPath) -> list[Feedback]:
    """Return feedback on the last steps of a path, after zero feedback on the steps before them."""
    if feedback:
        first = feedback[0]
    else:
        # No step is differentiated: the first weights alone are asked for.
        first = zero_feedback(path.steps[-1])
    zeros = []
    for step in path.steps[: len(path.steps) - len(feedback)]:
        fields = step.signal.fields()
        zero = torch.zeros_like(fields[first.part or "value"])
        others = {name: torch.zeros_like(fields[name]) for name in first.others}
        zeros.append(Feedback(zero, first.part, others, used=first.used, mean_over=first.mean_over))
    return [*zeros, *feedback]


def zero_feedback(step: StudentStep) -> Feedback:
    """Return zeros in the shape of a step's signal, for a step that is not differentiated.

    They are ``used``: whether the inner loss depends on the signal was not looked at, and False
    would say that it does not, for which :meth:`Estimator.checked_feedback` refuses the path.
    """
    # None says that there is no dependence, of which the feedback is zero.
    no_gradients: Gradients = dict.fromkeys(credited(step.signal))
    return replace(feedback_from(step, no_gradients), used=True)


def examples_of_mean(reduction: Reduction, step: StudentStep) -> int:
    """Return what the cross-entropies of sampled labels are divided by.

    B in all processes for ``"mean"``, else 1.
    """
    if reduction == "sum":
        return 1
    assert step.signal.log_prob is not None, "the modes with a reduction take sampled labels"
    return len(step.signal.log_prob) * step.processes


def divisor(normalization: str, step: StudentStep, w: Tree | None = None) -> Tensor | float:
    """Return the divisor of h, by the name of the normalization.

    For w and g see the head of this module; η is the student's learning rate. ``"gradient"``: 1,
    the true gradient, which decays with η. ``"learning_rate"``: η, so that the size depends on the
    outer gradient only; for SGD, because over an η as small as Adam's h drowns the teacher's own
    losses (docs/no-help.md). ``"cosine"``: ‖w‖·‖g‖; the sum of h over the batch is then the cosine
    between the student's step and the outer gradient. A rate of 0 divides by 1.
    """
    if normalization == "learning_rate":
        eta = step.learning_rate
        if eta is None:
            raise MetaplError("the transform has no rate; expected normalization='gradient'.")
        if isinstance(eta, Tensor):
            return torch.where(eta > 0, eta, 1.0)
        return eta if eta > 0 else 1.0
    if normalization == "gradient":
        return 1.0
    assert w is not None, "a cosine is with a direction"
    return (step.space.norm(w) * step.space.norm(step.gradient)).clamp_min(1e-30)


def exact_feedback(step: StudentStep, w: Tree, of: Credited = "signal") -> Feedback:
    """Return the feedback along w by exact derivatives, h = −∂⟨g, w⟩/∂(signal).

    For w, g and ż see the head of this module. The derivatives are taken in the
    step's order: from the graph of g where the pass has kept it; by ż; or by double backward, as
    always where the signal enters the student's input, and ⟨∂ℓ/∂z, ż⟩ goes through the whole
    network.
    """
    return feedback_from(step, step.derivatives_along(w, of), of)


def head_feedback(
    step: StudentStep,
    w: Tree,
    z_dot: Tensor,
    rounding: Tensor | None = None,
    *,
    of: Credited = "signal",
) -> Feedback:
    """Return the feedback along w from ż, (B, ...), in the head alone.

    Args:
        rounding: a bound on the norm of the error of ż, where it is no exact derivative.
    """
    return feedback_from(step, step.derivatives_by_tangent(w, z_dot, rounding, of=of), of)


def feedback_from(step: StudentStep, gradients: Gradients, of: Credited = "signal") -> Feedback:
    """Return h = −dL(θ′)/d(field), from the gradients in what is credited.

    A gradient of None says that there is no dependence; its field gets no h, or zeros where it is
    of the signal's value. Without any dependence the feedback is not ``used``.
    """
    if of == "example":
        in_factors = gradients["factors"]
        assert in_factors is not None, "the mean of the losses depends on their factors"
        # The score-function estimator: the gain of a sampled label i alone, −dL/d(factor_i), where
        # factor_i multiplies its loss, is what its log-probability is multiplied by.
        return Feedback(-in_factors, "log_prob")
    signal = step.signal
    # The derivative at the one-hot rows of sampled labels is one in their distribution.
    part = "value" if signal.log_prob is None else "probs"
    h: dict[str, Tensor] = {}
    for name, g in gradients.items():
        if g is not None:
            h[part if name == "value" else name] = -g
    is_used = len(h) > 0
    # The fields that make up the signal's value: one, or of a dict those of its entries that are
    # credited. The signal's other fields, such as log_prob, are not among them.
    value_fields = [part]
    if isinstance(signal.value, dict):
        names = [field_name(key) for key in signal.value]
        value_fields = [name for name in names if name in gradients]
    for name in value_fields:
        # A zero for what is not used, so that the feedback has the shape of the signal.
        if name not in h:
            h[name] = torch.zeros_like(signal.fields()[name])
    first = value_fields[0]
    h_of_first = h.pop(first)
    return Feedback(h_of_first, first, h, used=is_used)
