"""Validation, and which student is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metapl.evaluate import evaluate_logits, predict_logits
from metapl.replay import RandomState, replayed


@dataclass
class Best:
    """The best student so far, by validation accuracy; the earliest of equals."""

    accuracy: float = -1.0
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


class Selection:
    """Looks at the networks on validation data, and remembers the best student.

    Args:
        validation: (inputs, labels) or an iterable of such batches; None: nothing is looked at.
        truth: (inputs, labels) of unlabelled examples, for the teacher.
        device: where the networks are.
    """

    def __init__(self, validation: Any, truth: Any, device: torch.device) -> None:
        self.validation, self.truth, self.device = validation, truth, device
        self.best = Best()
        self.examples = 0
        """On how many the last accuracy was measured."""

    def look(self, student: nn.Module | None, teacher: nn.Module | None, step: int) -> dict[str, float]:
        """The accuracies after ``step`` steps; None for a network that there is not, or that has not begun."""
        if self.validation is None:
            return {}
        found = {}
        if student is not None:
            accuracy, self.examples = self._accuracy(student, self.validation)
            found["student_validation_accuracy"] = accuracy
            if accuracy > self.best.accuracy:
                self.best = Best(accuracy, step, weights_of(student))
        if teacher is not None:
            found["teacher_validation_accuracy"] = self._accuracy(teacher, self.validation)[0]
            if self.truth is not None:
                found["pseudo_label_accuracy"] = self._accuracy(teacher, self.truth)[0]
        return found

    def _accuracy(self, model: nn.Module, data: Any) -> tuple[float, int]:
        # A DataLoader draws from the default generator; looking at the validation data must not change the training.
        with replayed(RandomState.now(self.device)):
            logits, labels = predict_logits(model, batches_of(data, self.device))
        found = evaluate_logits(logits, labels)
        return found.accuracy, found.n


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights and buffers on the host."""
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}


def batches_of(data: Any, device: torch.device, size: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) in batches on the device, from a pair of tensors or an iterable of pairs."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(t, Tensor) for t in data)
    pieces = zip(data[0].split(size), data[1].split(size), strict=True) if pair else data
    for inputs, labels in pieces:
        yield inputs.to(device), labels.to(device)
