"""What scores are worth, said in one warning where it is little."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from metapl.problems.base import BilevelProblem
from metapl.problems.doubtful import Classification
from metapl.problems.sequences import NextToken
from metapl.updates.smoothing import adams_groups

# So many of the examples are removed, in thought, to see whether scores predict a possible loss.
HARMFUL_SHARE = 0.1
# Outer losses that are not below 0.
CROSS_ENTROPIES = (Classification.outer_loss, NextToken.outer_loss)
# So many times the loss before or after the training, whichever is greater, the sizes of all scores
# may add up to. Of the 34 trainings of benchmarks/ordinary.py it was 0.97 at most.
MOST_CHANGES = 2.0
# The rank correlation of two seeds' scores below which they say little of a third seed.
LEAST_AGREEMENT = 0.3
# Adam's eps in torch, at which it divides by second moments however small they are.
USUAL_EPS = 1e-8
# What was measured to repair most scores (docs/whole-trainings.md).
ADVISED_SMOOTHING = 0.3


class Scores(Protocol):
    """What is asked of an attribution: :class:`metapl.training.attribution.Attribution`."""

    outer_loss: Tensor
    outer_loss_before: Tensor | None
    of_seeds: Sequence[Any]
    agreement: float | None

    @property
    def by_example(self) -> Tensor:
        """The scores of whole examples, (M, N)."""


def warn_of_worth(
    attribution: Scores, problem: BilevelProblem, optimizer: Any, smoothing: float
) -> None:
    """Warn, in one line, of all reasons for which scores may not say what removals do.

    Args:
        attribution: of a training by the caller of the caller, whose line the warning names.
        problem: whose outer loss was judged.
        optimizer: of the training.
        smoothing: of the adjoint.
    """
    reasons = [
        reason_of_possible_loss(attribution, problem),
        reason_of_agreement(attribution),
        reason_of_eps(optimizer, smoothing),
    ]
    said = [reason for reason in reasons if reason]
    if said:
        warnings.warn(f"scores may not say what removals do: {'; '.join(said)}.", stacklevel=3)


def reason_of_possible_loss(attribution: Scores, problem: BilevelProblem) -> str:
    """Return a clause where scores predict what no cross-entropy can do.

    It cannot be below 0 without a tenth of the examples. And it can fall by itself at most, and
    hardly rise to more than it was before the training, so that the sizes of all scores do not add
    up to far more than the greater of the two. Where they do, small changes grew on their way
    through the training, and a removal is none. Of M outer losses the means count.
    """
    if type(problem).outer_loss not in CROSS_ENTROPIES:
        return ""
    loss = float(attribution.outer_loss.mean())
    of_examples = attribution.by_example.mean(0)
    count = max(1, round(HARMFUL_SHARE * len(of_examples)))
    harm = float(of_examples.sort().values[:count].sum())
    if -harm > loss:
        return (
            f"by them the outer loss, {loss:.3g}, would be {loss + harm:.3g} without the "
            f"{count:,} most harmful examples, and it cannot be below 0 (a lower learning rate or "
            "momentum makes small changes grow less)"
        )
    if attribution.outer_loss_before is None:
        return ""
    before = float(attribution.outer_loss_before)
    sizes = float(of_examples.abs().sum())
    if sizes <= MOST_CHANGES * max(before, loss):
        return ""
    return (
        f"their sizes add up to {sizes:.3g}, and the outer loss, {before:.3g} before the training "
        f"and {loss:.3g} after it, can hardly change by so much (a lower learning rate or momentum "
        "makes small changes grow less)"
    )


def reason_of_agreement(attribution: Scores) -> str:
    """Return a clause where the scores of several seeds have little in common."""
    agreement = attribution.agreement
    if agreement is None or agreement >= LEAST_AGREEMENT:
        return ""
    return (
        f"those of two of the {len(attribution.of_seeds)} seeds have a rank correlation of "
        f"{agreement:.2f} (more seeds, or a larger smoothing, give what holds for others)"
    )


def reason_of_eps(optimizer: Any, smoothing: float) -> str:
    """Return a clause where an exact adjoint goes through Adam's steps at its usual eps."""
    least = min((float(group["eps"]) for group in adams_groups(optimizer)), default=1.0)
    if smoothing > 0 or least > USUAL_EPS:
        return ""
    return (
        f"Adam's eps is {least:g}, where second moments that are nearly 0 make exact scores of "
        f"convolutions and transformers noise (try smoothing={ADVISED_SMOOTHING:g})"
    )
