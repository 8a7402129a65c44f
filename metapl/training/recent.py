"""What one batch is too small to show: means over the last hundred steps or so, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.execution.ranks import Ranks
from metapl.feedback.inner_step import InnerStep

Means = Mapping[str, Any]
NEWEST = 0.02  # share of the newest step in the means, once they are over more than 50 steps


@torch.no_grad()
def updated(kept: Means, pushes: Sequence[Tensor], step: InnerStep, labeled: Any, ranks: Ranks) -> Means:
    """The means with one step more: plain ones of the first 50 steps, then exponential ones. ``spread`` is the sum of
    the squares of the steps' weights, 1/n in a plain mean of n. Of other shapes than before, they begin anew."""
    q = step.signal.probs if step.signal.sampled else step.signal.value
    new: dict[str, Any] = {}
    if pushes:
        g = ranks.mean(sum(pushes[1:], pushes[0]))
        new = {"feedback": g, "feedback_square": g.square().sum()}
    labels: Any = labeled[1] if isinstance(labeled, tuple) and len(labeled) > 1 else None
    if step.problem.teacher_classifies and q is not None and q.ndim == 2 and getattr(labels, "ndim", 0) == 1:
        is_class = labels[:, None] == torch.arange(q.shape[1], device=q.device)
        new["shares_off"] = ranks.mean(q.mean(0) - is_class.to(q.dtype).mean(0))
    if {name: t.shape for name, t in kept.items() if name != "spread"} != {name: t.shape for name, t in new.items()}:
        return {**new, "spread": 1.0}
    weight = max(NEWEST, kept["spread"] / (1 + kept["spread"]))
    means = {name: kept[name].to(t).lerp(t, weight) for name, t in new.items()}
    return {**means, "spread": (1 - weight) ** 2 * kept["spread"] + weight**2}


def figures(kept: Means) -> dict[str, Tensor]:
    r"""``feedback_snr``, the signal to noise of the gradient g of a step's feedback in a bias of the teacher's outputs:

    .. math:: \frac{\lVert E g \rVert^2}{\mathrm{tr}\,\mathrm{Var}\,g} \approx
              \frac{\lVert m \rVert^2 - \kappa s}{s - \lVert m \rVert^2}, \quad
              m = \sum_t w_t g_t, \quad s = \sum_t w_t \lVert g_t \rVert^2, \quad \kappa = \sum_t w_t^2

    Both parts are (1 − κ) times what they estimate, without bias while the g are independent and of one distribution;
    without a signal, it is around 0 by κ √(2/C), κ = 0.01. And ``class_shares_vs_labeled``, half the L1 distance of the
    mean class probabilities of the pseudo-labels from the shares of the classes among the labels.
    """
    found = {}
    if "feedback" in kept and kept["spread"] < 1:  # after one step, nothing is known of the noise
        signal, square = kept["feedback"].square().sum(), kept["feedback_square"]
        noise = (square - signal).clamp_min(torch.finfo(square.dtype).tiny)  # which is 0 without feedback
        found["feedback_snr"] = (signal - kept["spread"] * square) / noise
    if "shares_off" in kept:
        found["class_shares_vs_labeled"] = kept["shares_off"].abs().sum() / 2
    return found
