r"""How large the feedback is beside the teacher's own losses.

The teacher steps along

.. math:: G = \lambda\, G_h + G_{own}, \qquad
          G_h = -\nabla_{\theta_T} \textstyle\sum \mathrm{sg}(h)\cdot\mathrm{signal}, \qquad
          G_{own} = \nabla_{\theta_T} \textstyle\sum_k L_k

and a :class:`FeedbackSize` says what λ is. Both roads ask it, so that they follow one rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_BOUND = 0.1
"""The bound of a trainer whose teacher learns labels by losses of its own, by default.

Of the rules that were tried it is the most cautious one. docs/modes.md has what
``benchmarks/feedback_size.py`` measured with it.
"""


@dataclass(frozen=True)
class FeedbackSize:
    r"""The rule that gives λ in each step.

    .. math:: \lambda = \mathrm{weight}, \qquad
              \lambda = \mathrm{ratio}\, \frac{\|G_{own}\|}{\|G_h\|}, \qquad
              |\lambda| = \min\Big(|\mathrm{weight}|,
              \ \mathrm{bound}\, \frac{\|G_{own}\|}{\|G_h\|}\Big)

    Args:
        weight: λ itself, or with a bound the greatest λ; λ has its sign.
        ratio: what ‖λ G_h‖ / ‖G_own‖ is in every step; then the weight is not read.
        bound: what ‖λ G_h‖ / ‖G_own‖ is at most.
    """

    weight: float = 1.0
    ratio: float | None = None
    bound: float | None = None

    def weight_for(self, feedback_norm: Tensor, own_norm: Tensor) -> Tensor:
        """Return λ, a scalar, from ‖G_h‖ and ‖G_own‖.

        A feedback of zero has λ = 0 by a ratio, and the weight else.
        """
        smallest = torch.finfo(feedback_norm.dtype).tiny
        norms = own_norm / feedback_norm.clamp_min(smallest)
        if self.ratio is not None:
            return torch.where(feedback_norm > 0, self.ratio * norms, 0.0)
        if self.bound is not None:
            largest = self.bound * norms
            bounded = torch.full_like(largest, self.weight).clamp(-largest, largest)
            return torch.where(feedback_norm > 0, bounded, self.weight)
        return torch.full_like(feedback_norm, self.weight)


def ratio_of(weight: Tensor, feedback_norm: Tensor, own_norm: Tensor) -> Tensor:
    """Return ‖λ G_h‖ / ‖G_own‖, the size that a report states.

    Where the teacher's own gradient is zero it is infinite, and 0 if the feedback's is zero too.
    """
    size = (weight * feedback_norm).abs()
    return torch.where(size > 0, size / own_norm, 0.0)
