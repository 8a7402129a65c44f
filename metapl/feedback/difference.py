"""Mixed mode without forward-mode AD: ż by a difference of outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.feedback.base import Feedback, Kind, Normalization, State, check_choice, divisor, only
from metapl.feedback.forward import from_tangent
from metapl.inner import InnerStep
from metapl.numerics import Tree, norm, wide


@dataclass(frozen=True)
class Difference:
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
    keep_graph: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "normalization", ("gradient", "learning_rate", "cosine"))
        if self.relative_step is not None and not 0 < self.relative_step < 1:
            raise MetaplError(
                f"Difference(relative_step={self.relative_step}): expected a number between 0 and 1, or None."
            )

    def init(self) -> State:
        return {}

    def feedback(self, steps: Sequence[InnerStep], state: State) -> tuple[list[Feedback], State]:
        step = only(steps, self.name)
        v = step.outer_gradient()
        w = step.pullback(v)
        z_dot, rounding = self.directional_derivative(step, w)
        return [from_tangent(step, z_dot, w, divisor(self.normalization, step, w), rounding=rounding)], state

    def directional_derivative(self, step: InnerStep, w: Tree) -> tuple[Tensor, Tensor]:
        """ż along w, (B, C), exactly zero where w is; and how large its rounding may be, relative to it, a scalar."""
        length = norm(w)
        unit = {name: t / length.clamp_min(torch.finfo(length.dtype).tiny) for name, t in w.items()}
        delta = self.step_size(step)
        ahead = step.outputs_at(delta, unit)
        if not self.one_sided:
            behind = step.outputs_at(-delta, unit)
            step.check_replay((ahead + behind) / 2)
            return length * (ahead - behind) / (2 * delta), self._rounding(step, ahead, ahead - behind)
        here = step.outputs if step.ran_in_full_precision() else step.outputs_at(0 * delta, unit)
        step.check_replay(here)
        return length * (ahead - here) / delta, self._rounding(step, ahead, ahead - here)

    def _rounding(self, step: InnerStep, outputs: Tensor, difference: Tensor) -> Tensor:
        """Of a small difference of large outputs, little is left: Adam's first w is across the gradient, for one."""
        epsilon = torch.finfo(self._format(step)).eps
        norms = (torch.linalg.vector_norm(t) for t in (outputs, difference))
        size, moved = (norm.detach() for norm in norms)
        share: Tensor = ROUNDINGS * epsilon * size / moved
        return share

    def step_size(self, step: InnerStep) -> Tensor:
        """δ, a scalar on the student's device."""
        size = norm(step.params)
        r = self.relative_step or RELATIVE_STEP[self._format(step)]
        typical = size / math.sqrt(sum(t.numel() for t in step.params.values()))
        return r * typical.clamp_min(1e-3)  # the bound is for weights that are all zero

    def _format(self, step: InnerStep) -> torch.dtype:
        """The narrowest on the way, which rounds: say of a float32 body under a float64 head."""
        formats = {wide(t).dtype for t in (*step.params.values(), step.outputs)}
        return torch.float32 if torch.float32 in formats else torch.float64


ROUNDINGS = 30.0
"""Rounding errors of outputs, and of the sum over them, in units of the machine epsilon."""

RELATIVE_STEP = {torch.float32: 2e-3, torch.float64: 1e-6}
"""r by dtype. A unit move along the gradient changes the outputs in inverse proportion to a typical weight, however
many there are, so r fixes the change of the outputs: far above their rounding, yet few ReLUs switch on the way (which,
not curvature, is what the error of a longer move is made of). Measured in benchmarks/difference_step.py."""
