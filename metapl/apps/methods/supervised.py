"""``--method supervised``: the labeled examples alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from metapl.apps.methods.base import Method, Trained, Training
from metapl.apps.settings import Share
from metapl.problems.losses import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Supervised(Method):
    """Train one network on the labeled examples alone.

    Args:
        label_smoothing: label smoothing of the loss, from 0 to 1. By default it fits the network.
    """

    label_smoothing: Share | None = None

    name: ClassVar[str] = "supervised"
    has_teacher: ClassVar[bool] = False
    learns_labels_alone: ClassVar[bool] = True
    title: ClassVar[str] = "supervised, labeled data only"

    def train(self, t: Training) -> Trained:
        """Train one network on the labeled examples."""
        return t.alone(t.teacher, (CrossEntropy(self.label_smoothing or 0.0),))
