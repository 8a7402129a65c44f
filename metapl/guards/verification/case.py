"""A mode's gradient and the real step, at one point: what a verdict is made of.

F is the loss that the gradient is of, after the real step: L(θ′), or ⟨g, w⟩ where the mode is
implicit (:meth:`Case.outer_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from metapl.execution.numerics import as_real, no_fast_path
from metapl.execution.state import trainable
from metapl.feedback import Estimator
from metapl.feedback.hypergradient import Hypergradient
from metapl.guards.verification.real_step import Evaluation, RealStep, Tree
from metapl.problems.base import Signal, outer_variables

# The relative error that is allowed to an exact gradient, where the verification runs in float64.
EXACT = 1e-5

# The relative error that is allowed to all others: to modes that leave a term out or take
# differences, and to every mode where something runs in float32.
APPROXIMATE = 1e-2

# The rounding of F in float64.
EPS = 2e-16

# The rounding of an F that runs in float32 somewhere.
EPS32 = 1e-7

Errors = dict[str, float | None]
"""How far a gradient is off, by what was moved and along what.

None: rounding drowns the difference.
"""


@dataclass(frozen=True)
class Case:
    """What is verified: a step, the mode's gradient of it, and the same step taken for real.

    Args:
        step: copies in the type that the verification runs in.
        mode: the estimator, with an h that is the gradient alone: without a normalization, a
            baseline, truncation or a mean.
        by_mode: the gradient that it finds.
        real: the step, taken.
        eps: the relative rounding of the loss F; it has nothing to do with the ε below, by which
            weights are moved.
        signals: those of the real step without their graphs; where the expectation over labels is
            taken, one-hot rows.
        h: the feedback, by the step's number and the signal's field; where the expectation over
            labels is taken, on the one-hot rows.
        moved: what the loss is moved by: the ``"signal"``, or the ``"weights"`` 1 + ε of the inner
            losses of labels that were drawn.
        takes_expectation: whether the mode takes the expectation over labels that were drawn.
        teacher_gradient: the gradient of −Σ h·signal by parameter; empty without a teacher.
        implicit_w: w of an implicit gradient; empty for other modes.
    """

    step: RealStep
    mode: Estimator
    by_mode: Hypergradient
    real: Evaluation
    eps: float
    signals: list[Signal]
    h: dict[tuple[int, str], Tensor]
    moved: Literal["signal", "weights"]
    takes_expectation: bool
    teacher_gradient: Tree
    implicit_w: Tree

    @staticmethod
    def at(step: RealStep, mode: Estimator, eps: float) -> Case:
        """Take a step by the mode and for real, each on copies of its own."""
        by_mode, h = step.by_mode(mode)
        real = Evaluation(step)
        if real.loss.dtype != torch.float64:
            eps = max(eps, EPS32)
        signals = [signal.detached() for signal in real.signals]
        is_sampled = signals[0].sampled
        # A mode that gives feedback on each entry of the signal, and takes labels that were drawn,
        # takes the expectation over them. One that gives a number to each example, or one number
        # to the whole batch, judges the labels as drawn.
        takes_expectation = is_sampled and mode.credits == "signal"
        if takes_expectation:
            signals = [with_one_hot_rows(signal) for signal in signals]
            # The one-hot rows, which are moved, stand in the place of the distribution.
            h = {(number, "value"): t for (number, _), t in h.items()}
        moved: Literal["signal", "weights"] = "signal"
        if is_sampled and not takes_expectation:
            moved = "weights"
        case = Case(
            step=step,
            mode=mode,
            by_mode=by_mode,
            real=real,
            eps=eps,
            signals=signals,
            h=h,
            moved=moved,
            takes_expectation=takes_expectation,
            teacher_gradient={},
            implicit_w={} if mode.is_through_step else implicit_w(step, mode),
        )
        return replace(case, teacher_gradient=case.gradient_of_score())

    @property
    def tolerance(self) -> float:
        """The relative error that the mode may have: 1e-5, or 1e-2.

        It is 1e-5 for a mode whose h is the exact derivative of F in what is moved, where F runs in
        float64. It is 1e-2 for the other modes, for modes by differences, and for every mode where
        F is rounded as in float32.
        """
        # A mode that says of itself that it is not exact may still give the exact derivative of F,
        # as F and what is moved are chosen for it.
        is_derivative_of_f = (
            self.mode.exact
            # The direct term alone: F is the outer loss with the signals held.
            or self.mode.credits == "nothing"
            # Drawn labels: h is compared with what the weights of their losses do to F,
            or self.moved == "weights"
            # or with what their one-hot rows do to F.
            or self.takes_expectation
            # An implicit gradient: F is ⟨g, w⟩ at the mode's own w, not L at the optimum.
            or bool(self.implicit_w)
        )
        if is_derivative_of_f and not self.mode.takes_differences and self.eps < EPS32:
            return EXACT
        return APPROXIMATE

    def score(self, evaluation: Evaluation) -> Tensor:
        """Return −Σ h·signal, whose gradient is the teacher's."""
        terms = []
        for (number, name), h in self.h.items():
            fields = evaluation.signals[number].fields()
            terms.append(-(h * fields["probs" if self.takes_expectation else name]).sum())
        return torch.stack(terms).sum()

    def gradient_of_score(self) -> Tree:
        """Return the gradient of −Σ h·signal in what is learned; empty where nothing is."""
        if self.mode.credits == "nothing":
            return {name: torch.zeros_like(t) for name, t in self.real.copies.learned().items()}
        score = self.score(self.real)
        learned = self.real.copies.learned()
        if not score.requires_grad or not learned:
            return {}
        gradients = torch.autograd.grad(
            score, list(learned.values()), materialize_grads=True, allow_unused=True
        )
        # Those of embeddings may be sparse.
        return {name: g.to_dense() for name, g in zip(learned, gradients, strict=True)}

    @property
    def whole_gradient(self) -> Tree:
        """The teacher's gradient.

        It is the gradient of −Σ h·signal, plus the direct term of an outer loss that reads the
        teacher.
        """
        direct = self.by_mode.direct
        return {
            name: g + direct[name] if name in direct else g
            for name, g in self.teacher_gradient.items()
        }

    @property
    def outer_loss_reads_teacher(self) -> bool:
        """Whether the outer loss depends on the teacher otherwise than by θ′."""
        return bool(outer_variables(self.step.problem, self.step.teacher))

    def outer_loss(self, evaluation: Evaluation) -> Tensor:
        """Return F; of an implicit gradient ⟨g, w⟩, of which h is minus the derivative."""
        if not self.implicit_w:
            return evaluation.loss
        g = evaluation.gradients["inner"]
        return torch.stack([(g[name] * w).sum() for name, w in self.implicit_w.items()]).sum()

    def off(self, errors: Errors) -> list[str]:
        """Return which of the errors are more than the mode may have."""
        return [
            name for name, error in errors.items() if error is not None and error > self.tolerance
        ]


def with_one_hot_rows(signal: Signal) -> Signal:
    """Return a signal of sampled classes with one-hot rows (B, C) for its value."""
    assert signal.probs is not None, "an expectation is taken over probs"
    value: Any = signal.value
    return replace(signal, value=F.one_hot(value, signal.probs.shape[-1]).to(signal.probs))


def implicit_w(step: RealStep, mode: Estimator) -> Tree:
    """Return w of the implicit gradient, by the mode's solver from products of double backward."""
    with no_fast_path(math=True):
        at_theta = Evaluation(step, takes_steps=False)
        theta = trainable(at_theta.copies.student)
        weights = list(theta.values())
        options: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        g = torch.autograd.grad(at_theta.inner_loss, weights, create_graph=True, **options)

        def hessian_product(w: Tree) -> Tree:
            along_w = torch.stack(
                [(g_i * w[name]).sum() for name, g_i in zip(theta, g, strict=True)]
            ).sum()
            return dict(zip(theta, torch.autograd.grad(along_w, weights, **options), strict=True))

        v = at_theta.gradients["outer"]
        return mode.w_at_optimum(hessian_product, v, step.update.learning_rate)


def flat(tree: Any) -> Tensor:
    """Return all numbers of a tree as one vector of float64."""
    return torch.cat(
        [as_real(t.detach().to_dense()).double().flatten() for t in pytree.tree_leaves(tree)]
    )
