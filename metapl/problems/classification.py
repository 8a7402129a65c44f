"""What the problems of training on doubtful labels share: a student of classes, judged on labels that are trusted."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from metapl import checks
from metapl.errors import MetaplError
from metapl.problems.base import Problem

EXPECTED = {2: "(inputs, labels)", 3: "(inputs, labels, indices)"}


class Classification(Problem):
    """A student that returns class logits, and an outer batch (x, y) with labels that are trusted."""

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy on the trusted labels."""
        return F.cross_entropy(outputs, checks.within(batch[1], outputs.shape[1]))

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels that are no classes of the student's outputs."""
        checks.class_outputs(outputs, "student")
        checks.class_labels(labeled[1], outputs.shape[1])


def parts_of(batch: Any, count: int, problem: Problem) -> tuple[Any, ...]:
    """The parts of an inner batch, refused where there are more or fewer."""
    if not isinstance(batch, tuple | list) or len(batch) != count:
        raise MetaplError(
            f"the inner batch of {type(problem).__name__} is {checks.described(batch)}; expected {EXPECTED[count]}: "
            "give them as unlabeled=."
        )
    return tuple(batch)


def one_each(values: Tensor, outputs: Tensor, what: str, *shape: int) -> Tensor:
    """What the teacher returned, refused where it is not one for each example."""
    expected = (len(outputs), *shape)
    if not isinstance(values, Tensor) or values.shape != expected:
        raise MetaplError(f"the teacher returned {checks.described(values)}; expected {what} of shape {expected}.")
    return values


def losses_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, (B,)."""
    return F.cross_entropy(outputs, checks.within(labels, outputs.shape[1]), reduction="none")
