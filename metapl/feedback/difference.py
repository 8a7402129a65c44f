"""As forward mode, with ż by a finite difference of outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch

from metapl.core.feedback import Feedback
from metapl.core.lesson import Credited
from metapl.core.order import Order
from metapl.core.step import Move
from metapl.execution.numerics import Tree
from metapl.feedback.base import Estimator, Normalization, State, divisor, feedback_from
from metapl.problems.base import BilevelProblem, Kind
from metapl.runs.fields import Range

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.core.terms import StudentPath, StudentStep

ROUNDINGS = 30.0
"""A bound on the rounding error of outputs and of sums over them, in units of the epsilon."""

RELATIVE_STEP = {torch.float32: 2e-3, torch.float64: 1e-6}
"""r by dtype.

A move along the gradient changes the outputs in inverse proportion to a typical
weight, whatever the number of weights, so r determines the change of the outputs: large beside
their rounding, and small enough that few ReLUs switch (these, not curvature, cause the error of
longer moves). Measured by benchmarks/difference_step.py at d3aeafaa.
"""


@dataclass(frozen=True)
class Difference(Estimator):
    r"""Take the outputs' derivative along w by a difference of passes, and the rest as ``forward``.

    .. math:: \dot z \approx \frac{\|w\|}{2\delta}
              \big[ S(x_u; \theta + \delta\,\hat w) - S(x_u; \theta - \delta\,\hat w) \big],
              \quad \delta = r\,\frac{\|\theta\|}{\sqrt n}, \quad \hat w = w / \|w\|

    The passes run in float32 or wider, outside autocast and TF32 (in bf16 and TF32 the difference
    is noise). Where the inner loss has no second derivative, such as CTC, its derivative in the
    signal is taken at both outputs:

    .. math:: h \approx -\frac{\|w\|}{2\delta} \big[
              \nabla_{\mathrm{signal}} \ell(z_+, \mathrm{signal}) -
              \nabla_{\mathrm{signal}} \ell(z_-, \mathrm{signal}) \big], \quad
              z_\pm = S(x_u; \theta \pm \delta\,\hat w)

    which of a weight of an example is the difference of its losses. The step's ``order`` says which
    was taken, ``"outputs"`` or ``"losses"``; it is chosen at the first step.

    Args:
        one_sided: S(θ + δŵ) − S(θ), one pass less: the inner pass's outputs are used again where it
            ran in full float32 (so neither under autocast nor by TF32, which PyTorch allows for
            convolutions on CUDA).
        relative_step: r, the length of the move over the root mean square of the n weights;
            ``None`` is 2e-3 in float32 and 1e-6 in float64.
        normalization: as in :class:`~metapl.feedback.Forward`.

    Takes: soft signals; hard labels by the expectation. Cost: 11 student passes a step with the
    teacher's 3 (one-sided: 10, or 11 under autocast or TF32), and one copy of the weights. Bias:
    O(δ²), one-sided O(δ), plus the rounding of the outputs, O(machine epsilon/δ). In float32 it was
    9 to 60 % off in the first ten steps of AdamW on a small BERT, 0.7 % after forty
    (benchmarks/results/fresh_adam.md). With ``parametrizations.spectral_norm`` there is a bias that
    falls as its power iteration converges. Runs: wherever the student runs, on any operation.
    Source: the finite-difference product of DARTS (its eq. 8), moved from gradients to outputs.
    """

    one_sided: bool = False
    relative_step: Annotated[float, Range(above=0, below=1)] | None = None
    normalization: Normalization = "gradient"

    name: ClassVar[str] = "difference"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    takes_differences: ClassVar[bool] = True
    is_pure: ClassVar[bool] = True

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        h = self.along(step, w)
        return [h.divided_by(divisor(self.normalization, step, w))], state

    def orders(
        self, steps: int, problem: BilevelProblem, student: Engine, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        return "outputs", "losses"

    def along(self, step: StudentStep, w: Tree, of: Credited = "signal") -> Feedback:
        """Return the feedback along w, by a difference in the step's order."""
        return feedback_from(step, step.derivatives_by_move(w, self.moved(step, w), of=of), of)

    def moved(self, step: StudentStep, w: Tree) -> Move:
        """Return the outputs after moves of length δ along w, both of them those at θ for w = 0."""
        relative_step = self.relative_step or RELATIVE_STEP[step.shifted_dtype]
        length = step.space.norm(w)
        typical_weight = step.space.norm(step.params) / math.sqrt(step.space.count(step.params))
        # All weights may be zero, and so may w.
        delta = relative_step * typical_weight.clamp_min(1e-3)
        factor = delta / length.clamp_min(torch.finfo(length.dtype).tiny)
        ahead = step.shifted(factor, w)
        if not self.one_sided:
            before = -factor
            width = 2 * factor
            behind = step.shifted(before, w)
            # The mean of the two is z, to the second order of the move.
            step.check_shifted(ahead, behind)
        else:
            before = 0 * factor
            width = factor
            behind = step.outputs if step.in_full_precision else step.shifted(before, w)
            step.check_shifted(behind, behind)
        # A small difference of large outputs loses digits: Adam's first w, for example, is
        # orthogonal to the gradient.
        eps = torch.finfo(step.shifted_dtype).eps
        rounding = ROUNDINGS * eps * torch.linalg.vector_norm(ahead)
        return Move(ahead, behind, after=factor, before=before, width=width, rounding=rounding)
