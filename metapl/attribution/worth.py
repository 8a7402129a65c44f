"""Reasons for which scores may not say what removals do, each as a clause of one warning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metapl.problems.base import BilevelProblem
from metapl.problems.doubtful import Classification
from metapl.problems.sequences import NextToken
from metapl.updates.smoothing import DEFAULT_SMOOTHING, adams_groups

# So many of the examples are removed, in thought, to see whether scores predict a possible loss.
HARMFUL_SHARE = 0.1
# Outer losses that are not below 0.
CROSS_ENTROPIES = (Classification.outer_loss, NextToken.outer_loss)
# So many times the loss before or after the training, whichever is greater, the sizes of all scores
# may add up to. It is more than 1, since effects of removals do not add up exactly.
MOST_CHANGES = 2.0
# The same of a loss that is no cross-entropy, of which nothing is known but these two values.
MOST_CHANGES_OF_OTHERS = 10.0
# The rank correlation of two seeds' scores below which they say little of a third seed.
LEAST_AGREEMENT = 0.3
# Adam's eps in torch, at which it divides by second moments however small they are.
USUAL_EPS = 1e-8


def reason_of_possible_loss(
    scores: Tensor, loss: float, loss_before: float | None, problem: BilevelProblem
) -> str:
    """Return a clause where scores predict what no outer loss can do; "" elsewhere.

    A cross-entropy cannot be below 0 without a tenth of the examples. And it can fall by itself at
    most, and hardly rise to more than it was before the training, so that the sizes of all scores
    do not add up to far more than the greater of the two. Those of another loss, which may be of
    either sign, do not add up to many times its size, or what the training has changed it by. Where
    they do, small changes grew on their way through the training, and a removal is none.

    Args:
        scores: of the examples, (N,).
        loss: the outer loss after the training.
        loss_before: the same before it, where it is known.
    """
    is_cross_entropy = type(problem).outer_loss in CROSS_ENTROPIES
    count = max(1, round(HARMFUL_SHARE * len(scores)))
    harm = float(scores.sort().values[:count].sum())
    if is_cross_entropy and -harm > loss:
        return (
            f"by them the outer loss, {loss:.3g}, would be {loss + harm:.3g} without the "
            f"{count:,} most harmful examples, and it cannot be below 0 (a lower learning rate or "
            "momentum makes small changes grow less)"
        )
    if loss_before is None:
        return ""
    sizes = float(scores.abs().sum())
    largest = max(abs(loss), abs(loss_before), abs(loss - loss_before))
    if sizes <= (MOST_CHANGES if is_cross_entropy else MOST_CHANGES_OF_OTHERS) * largest:
        return ""
    return (
        f"their sizes add up to {sizes:.3g}, and the outer loss, {loss_before:.3g} before the "
        f"training and {loss:.3g} after it, can hardly change by so much (a lower learning rate or "
        "momentum makes small changes grow less)"
    )


def reason_of_agreement(agreement: float | None, seeds: int) -> str:
    """Return a clause where the scores of several seeds have little in common; "" elsewhere."""
    if agreement is None or agreement >= LEAST_AGREEMENT:
        return ""
    return (
        f"those of two of the {seeds} seeds have a rank correlation of {agreement:.2f} (a mean of "
        "more seeds says more of others)"
    )


def reason_of_eps(optimizer: Any, smoothing: float) -> str:
    """Return a clause where an exact adjoint goes through Adam's steps at its usual eps."""
    least = min((float(group["eps"]) for group in adams_groups(optimizer)), default=1.0)
    if smoothing > 0 or least > USUAL_EPS:
        return ""
    return (
        f"Adam's eps is {least:g}, where second moments that are nearly 0 make exact scores of "
        f"convolutions and transformers noise (try smoothing={DEFAULT_SMOOTHING:g})"
    )
