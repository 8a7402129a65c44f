"""What one batch is too small to show: means over the last hundred steps or so, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metapl.execution.ranks import Ranks
from metapl.problems.base import Signal

NEWEST = 0.02  # share of the newest step in the means, once they are over more than 50 steps


def updated(kept: Mapping[str, Any], vectors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """The means with one step more: plain ones of the first 50 steps, then exponential ones.

    Args:
        kept: before the step: ``means`` by name, and ``spread``, the sum of the squares of the steps' weights, which is
            1/n in a plain mean over n. Empty: none.
        vectors: of the step, by name, of this process; ``feedback`` is the gradient of the feedback in a bias that is
            added to the teacher's outputs. With other names or lengths than before, the means begin anew.
    """
    if not vectors:
        return {}
    parts = ranks.mean(torch.cat([*vectors.values()])).split([len(t) for t in vectors.values()])
    values = dict(zip(vectors, parts, strict=True))
    if "feedback" in values:
        values["feedback_square"] = values["feedback"].square().sum()
    means = kept.get("means", {})
    if {name: t.shape for name, t in means.items()} != {name: t.shape for name, t in values.items()}:
        return {"means": values, "spread": 1.0}
    weight = max(NEWEST, kept["spread"] / (1 + kept["spread"]))
    return {
        "means": {name: means[name].to(t).lerp(t, weight) for name, t in values.items()},
        "spread": (1 - weight) ** 2 * kept["spread"] + weight**2,
    }


def figures(kept: Mapping[str, Any]) -> dict[str, Tensor]:
    r"""What the means show.

    ``feedback_snr``, the signal to noise of the gradient g of one step's feedback, in a bias of the teacher's outputs
    (or of its last layer, where this has one), from step to step:

    .. math:: \frac{\lVert E g \rVert^2}{\mathrm{tr}\,\mathrm{Var}\,g} \approx
              \frac{\lVert m \rVert^2 - \kappa s}{s - \lVert m \rVert^2}, \quad
              m = \sum_t w_t g_t, \quad s = \sum_t w_t \lVert g_t \rVert^2, \quad \kappa = \sum_t w_t^2

    with the weights w_t of the means. Numerator and denominator are (1 − κ) times what they estimate, without bias
    while the distribution of g stays; a mean that moves counts as noise. With 99 batches' worth of steps, κ = 0.01, it
    is about ±κ √(2/C) where there is no signal, so it may be below 0. NaN without feedback, and at the first step.

    ``pseudo_label_shares_vs_labeled``: half the L1 distance of the mean class probabilities of the pseudo-labels from
    the shares of the classes among the labels: the part of the pseudo-labels that would have to be of other classes.
    """
    found, means = {}, kept.get("means", {})
    if "feedback" in means:
        signal, square = means["feedback"].square().sum(), means["feedback_square"]
        found["feedback_snr"] = (signal - kept["spread"] * square) / (square - signal)
    if "labels" in means:
        found["pseudo_label_shares_vs_labeled"] = (means["pseudo_labels"] - means["labels"]).abs().sum() / 2
    return found


def class_shares(signal: Signal, outputs: Tensor, labeled: Any) -> dict[str, Tensor]:
    """The shares of the classes, (C,), among the pseudo-labels of a step and among its labels, where it has both."""
    q, labels = signal.probabilities(outputs), labeled[1] if isinstance(labeled, tuple | list) else None
    if q is None or q.ndim != 2 or not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return {}
    is_class = labels[:, None] == torch.arange(q.shape[1], device=q.device)
    return {"pseudo_labels": q.mean(0), "labels": is_class.to(q.dtype).mean(0)}
