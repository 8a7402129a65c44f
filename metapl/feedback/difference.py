"""As forward mode, with ż by a finite difference of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from metapl.execution import checks
from metapl.execution.agreement import SlopesDisagree, check_bend, check_difference
from metapl.execution.numerics import Tree
from metapl.feedback.base import Estimator, Feedback, Normalization, State, divisor
from metapl.feedback.credit import Tangent, check_projections, signal_feedback
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.problems.base import Kind
from metapl.runs.fields import Range

Credit = Callable[[InnerStep, Tree, Tangent], Feedback]
Derivatives = Sequence[Sequence[Tensor | None]]  # in the leaves of each micro-batch

REDUCTIONS = (1.0, 8.0, 64.0)
"""The divisors of δ, tried in turn while the derivatives along w disagree (only where the host can read them)."""

ROUNDINGS = 30.0
"""A bound on the rounding error of the outputs and of sums over them, in units of the machine epsilon."""

RELATIVE_STEP = {torch.float32: 2e-3, torch.float64: 1e-6}
"""r by dtype. A move along the gradient changes the outputs in inverse proportion to a typical weight, whatever the
number of weights, so r determines the change of the outputs: large beside their rounding, and small enough that few
ReLUs switch (these, not curvature, cause the error of longer moves). Measured in benchmarks/difference_step.py."""


@dataclass(frozen=True)
class Difference(Estimator):
    r"""As ``forward``, with the outputs' derivative along w taken as a difference of forward passes.

    .. math:: \dot z \approx \frac{\|w\|}{2\delta}
              \big[ S(x_u; \theta + \delta\,\hat w) - S(x_u; \theta - \delta\,\hat w) \big], \quad
              \delta = r\,\frac{\|\theta\|}{\sqrt n}, \quad \hat w = w / \|w\|

    The passes run in float32 or wider, outside autocast and TF32 (in bf16 and TF32 the difference is noise).

    Args:
        one_sided: S(θ + δŵ) − S(θ), one pass less: the inner pass's outputs are used again where it ran in full
            float32 (so neither under autocast nor by TF32, which PyTorch allows for convolutions on CUDA).
        relative_step: r, the length of the move over the root mean square of the n weights; ``None`` is 2e-3 in float32
            and 1e-6 in float64.
        normalization: as in :class:`~metapl.feedback.Forward`.

    Takes: soft signals; hard labels by the expectation.
    Cost: 11 student passes a step with the teacher's 3 (one-sided: 10, or 11 under autocast or TF32), and one copy of
    the weights.
    Bias: O(δ²), one-sided O(δ), plus the rounding of the outputs, O(machine epsilon/δ). In float32 the first one or two
    steps of Adam are mostly rounding: its w is then nearly orthogonal to the gradient, and ż nearly zero beside it
    (relative error up to 1.6 measured, below 0.01 after five steps).
    With ``parametrizations.spectral_norm`` the power iteration moves along with the weights. Backpropagation takes it
    as constant, so there is a bias that falls as it converges (``unrolled`` has none).
    A signal in the student's input: the inner loss's derivative in the signal is the difference that is taken, by three
    passes forward and back; always central. Unlike outputs it jumps where a ReLU switches, and it loses more digits. So
    its error is measured (by the derivative at θ, in the middle), and where it is above 5 % of the feedback at every δ,
    the step is refused.
    Checks: the outputs on both sides are compared with those at θ (not on CUDA, where reading them would wait). A
    one-sided difference has no outputs behind θ, so that its curvature is not checked. On the first step of a student
    that rounds or detaches, ż is compared with the gradients of some projections of the outputs.
    Runs: wherever the student runs, on any operation.
    Source: the finite-difference product of DARTS (its eq. 8), moved from gradients to outputs.
    """

    one_sided: bool = False
    relative_step: Annotated[float, Range(above=0, below=1)] | None = None
    normalization: Normalization = "gradient"

    name: ClassVar[str] = "difference"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")

    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        h = self.feedback_along(w, step, signal_feedback)
        return [h.divided_by(divisor(self.normalization, step, w))], state

    def feedback_along(self, w: Tree, step: InnerStep, credit: Credit) -> Feedback:
        """The feedback along w by ``credit``, with ż at δ, or at a smaller δ if ReLUs that switch within δ spoil it.

        Fewer units switch within a smaller δ. A student whose passes are not of one function is refused at every δ: the
        tolerance for rounding does not grow as δ falls.
        """
        for reduction in REDUCTIONS:
            try:
                tangent = self.tangent(step, w, reduction)
                feedback = credit(step, w, tangent)
                if step.student.first and not checks.waits(tangent.z_dot):
                    check_projections(step, w, tangent)
                return feedback
            except SlopesDisagree as error:
                disagree = error
        raise disagree

    def tangent(self, step: InnerStep, w: Tree, reduction: float = 1.0) -> Tangent:
        """ż along w, by moves of length δ/``reduction``; exactly zero for w = 0."""
        length = step.space.norm(w)
        factor = self.step_size(step) / reduction / length.clamp_min(torch.finfo(length.dtype).tiny)
        if step.entries:
            return self._entering(step, w, factor, reduction)
        ahead = step.shifted(factor, w)
        if self.one_sided:
            here = step.outputs if step.in_full_precision else step.shifted(0 * factor, w)
            step.check_shifted(here, here)
            moved, factors = ahead - here, factor
        else:
            behind = step.shifted(-factor, w)
            step.check_shifted(ahead, behind)
            moved, factors = ahead - behind, 2 * factor
        # A small difference of large outputs loses digits: Adam's first w, for example, is orthogonal to the gradient.
        rounding = ROUNDINGS * torch.finfo(step.shifted_dtype).eps * torch.linalg.vector_norm(ahead)
        if not self.one_sided and step.in_full_precision and not checks.waits(moved):
            check_bend(ahead, step.outputs, behind, rounding, step.student.ranks)
        return Tangent(moved / factors, rounding / (reduction * factors))

    def _entering(self, step: InnerStep, w: Tree, factor: Tensor, reduction: float) -> Tangent:
        """:meth:`tangent` where the signal enters the student's input: central differences of the outputs, and of the
        inner loss's derivatives in the signal."""
        (ahead, of_ahead), (here, of_here), (behind, of_behind) = (
            step.shifted_derivatives(side * factor, w) for side in (1, 0, -1)
        )
        step.check_shifted(here, here)
        rounding = ROUNDINGS * torch.finfo(step.shifted_dtype).eps * torch.linalg.vector_norm(ahead)
        if not checks.waits(here):
            check_bend(ahead, here, behind, rounding, step.student.ranks)
        fields = step.signal.differentiable()
        moved = step.in_signal(fields, _differences(of_ahead, of_behind))
        there, back = _differences(of_ahead, of_here), _differences(of_here, of_behind)
        eps = torch.finfo(step.shifted_dtype).eps * (factor * step.space.norm(w) > 0)  # w = 0 moves nothing, exactly
        bend = step.in_signal(fields, _differences(there, back))
        check_difference(moved, bend, step.in_signal(fields, of_here), eps)
        in_signal = {name: None if t is None else t / (2 * factor) for name, t in moved.items()}
        return Tangent((ahead - behind) / (2 * factor), rounding / (reduction * 2 * factor), in_signal)

    def step_size(self, step: InnerStep) -> Tensor:
        """δ, a scalar on the student's device."""
        r = self.relative_step or RELATIVE_STEP[step.shifted_dtype]
        typical_weight = step.space.norm(step.params) / math.sqrt(step.space.count(step.params))
        return r * typical_weight.clamp_min(1e-3)  # all weights may be zero


def _differences(a: Derivatives, b: Derivatives) -> Derivatives:
    return [
        [None if x is None or y is None else x - y for x, y in zip(xs, ys, strict=True)]
        for xs, ys in zip(a, b, strict=True)
    ]
