"""Mixed mode without forward-mode AD: ż by a difference of outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metapl import checks
from metapl.errors import MetaplError
from metapl.execution.agreement import SlopesDisagree, check_bend
from metapl.feedback.base import Estimator, Feedback, Normalization, State, check_choice, divisor
from metapl.feedback.credit import Tangent, signal_feedback
from metapl.feedback.lookahead import InnerStep, Path
from metapl.numerics import Tree
from metapl.problems.base import Kind


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
    Bias: O(δ²), one-sided O(δ), beside the rounding of the outputs, O(machine epsilon/δ).
    Runs: wherever the student runs, on any operation.
    Source: the finite-difference product of DARTS (its eq. 8), moved from gradients to outputs.
    """

    one_sided: bool = False
    relative_step: float | None = None
    normalization: Normalization = "gradient"

    name: ClassVar[str] = "difference"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")

    def __post_init__(self) -> None:
        check_choice(self, "normalization", ("gradient", "learning_rate", "cosine"))
        if self.relative_step is not None and not 0 < self.relative_step < 1:
            raise MetaplError(
                f"Difference(relative_step={self.relative_step}): expected a number between 0 and 1, or None."
            )

    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        return [self.credited(signal_feedback, step, w).over(divisor(self.normalization, step, w))], state

    def credited(self, credit: Credit, step: InnerStep, w: Tree) -> Feedback:
        """The feedback by ż at δ; at a smaller one where units that switch on or off within δ spoil the first.

        Such units are what a smaller δ has fewer of. A student whose passes are not of one function is refused at the
        last δ, as it would be at the first: what is allowed for rounding does not grow as δ falls.
        """
        for shorter in SHORTER[:-1]:
            with suppress(SlopesDisagree):
                return credit(step, w, self.tangent(step, w, shorter))
        return credit(step, w, self.tangent(step, w, SHORTER[-1]))

    def tangent(self, step: InnerStep, w: Tree, shorter: float = 1.0) -> Tangent:
        """ż along w, exactly zero where w is, by moves of δ/``shorter``."""
        length = step.length(w)
        factor = self.step_size(step) / shorter / length.clamp_min(torch.finfo(length.dtype).tiny)
        ahead = step.shifted(factor, w)
        if self.one_sided:
            here = step.outputs if step.in_full_precision else step.shifted(0 * factor, w)
            step.check_shifted(here)
            moved, factors = ahead - here, factor
        else:
            behind = step.shifted(-factor, w)
            step.check_shifted((ahead + behind) / 2)
            moved, factors = ahead - behind, 2 * factor
        # Of a small difference of large outputs little is left: Adam's first w is across the gradient, for one.
        rounding = ROUNDINGS * torch.finfo(step.shifted_dtype).eps * torch.linalg.vector_norm(ahead)
        if not self.one_sided and step.in_full_precision and not checks.waits(moved):
            check_bend(ahead, step.outputs, behind, rounding)
        return Tangent(moved / factors, rounding / (shorter * factors))

    def step_size(self, step: InnerStep) -> Tensor:
        """δ, a scalar on the student's device."""
        r = self.relative_step or RELATIVE_STEP[step.shifted_dtype]
        return r * step.typical_weight().clamp_min(1e-3)  # the bound is for weights that are all zero


Credit = Callable[[InnerStep, Tree, Tangent], Feedback]

SHORTER = (1.0, 8.0, 64.0)
"""What δ is divided by in turn, where the derivatives along w disagree and the host may look at them."""

ROUNDINGS = 30.0
"""Rounding errors of outputs, and of the sum over them, in units of the machine epsilon."""

RELATIVE_STEP = {torch.float32: 2e-3, torch.float64: 1e-6}
"""r by dtype. A unit move along the gradient changes the outputs in inverse proportion to a typical weight, however
many there are, so r fixes the change of the outputs: far above their rounding, yet few ReLUs switch on the way (which,
not curvature, is what the error of a longer move is made of). Measured in benchmarks/difference_step.py."""
