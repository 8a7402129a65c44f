"""Networks that a run keeps, and what they reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.data import Data
from metapl.apps.report import Mistakes, mistakes
from metapl.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.metrics.predictions import batches_of
from metapl.pictures.batches import in_unit_range

# The most labeled examples on which a network is measured that has learned them.
LEARNED = 256


@dataclass(frozen=True)
class Measured:
    """A network that is kept, and what it reaches.

    Args:
        weights: on the host.
        validation_accuracy: a fraction; None where there are no validation examples.
        tested: what it reaches on the test examples; None where there are none.
        labeled_accuracy: a fraction of the labeled examples that it has learned.
    """

    weights: Mapping[str, Tensor]
    validation_accuracy: float | None
    tested: Mistakes | None
    labeled_accuracy: float | None = None

    def accuracies(self, prefix: str = "") -> dict[str, float]:
        """Return the accuracies that there are, by names that begin with the prefix."""
        accuracies: dict[str, float] = {}
        if self.validation_accuracy is not None:
            accuracies[f"{prefix}validation_accuracy"] = self.validation_accuracy
        if self.tested is not None:
            accuracies[f"{prefix}test_accuracy"] = self.tested.evaluation.accuracy
        if self.labeled_accuracy is not None:
            accuracies[f"{prefix}labeled_accuracy"] = self.labeled_accuracy
        return accuracies


def measured(
    data: Data, network: nn.Module, accuracy: float | None, weights: Mapping[str, Tensor]
) -> Measured:
    """Return a network with these weights and this validation accuracy, tested once."""
    tested = None
    if data.test is not None:
        tested = mistakes(network, data.test, data.classes, data.test_names)
    return Measured(dict(weights), accuracy, tested, labeled_accuracy(data.labeled, network))


def labeled_accuracy(labeled: Any, network: nn.Module) -> float:
    """Return the accuracy on labeled examples as they are, on ``LEARNED`` of them at most."""
    total = len(labeled.labels)
    count = min(total, LEARNED)
    # Evenly spread, for a folder may be in the order of the classes.
    indices = torch.arange(count) * total // count
    images = labeled.images
    if isinstance(images, Tensor):
        examples = images[indices]
    else:
        examples = in_unit_range(images.fetch(indices)[0])
    return evaluated(network, (examples, labeled.labels[indices])).accuracy


def evaluated(network: nn.Module, data: Any) -> Evaluation:
    """Evaluate a network on labeled examples, on its device."""
    place = next(network.parameters()).device
    logits, labels = predict_logits(network, batches_of(data, place))
    return evaluate_logits(logits, labels)
