"""Validation, and which student is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from metapl.errors import MetaplError
from metapl.execution.batch import is_whole, labeled_pair, length, rows
from metapl.execution.checks import dense, described
from metapl.execution.rng import RandomState, replayed
from metapl.execution.shards import whole
from metapl.metrics import evaluate_logits, predict_logits
from metapl.metrics.predictions import batch_name, batches_of, iterated, logits_of
from metapl.training.contract import Say

Kept = Callable[[], AbstractContextManager[nn.Module]]
"""A network in a block."""


@dataclass
class Best:
    """The best student so far, by validation accuracy; the latest of equals."""

    accuracy: float | None = None
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


class Selection:
    """Looks at the networks on validation data, and remembers the best student.

    Args:
        validation: (inputs, labels) or an iterable of such batches; None: nothing is looked at.
        truth: (inputs, labels) of unlabeled examples, for the teacher.
        device: where the networks are.
        select: whether the best student is remembered.
        say: takes what a user should know of the validation data.
    """

    def __init__(
        self, validation: Any, truth: Any, device: torch.device, select: bool = True, say: Say | None = None
    ) -> None:
        self.validation, self.truth, self.device, self.select = validation, truth, device, select
        self.say: Say = say or (lambda text: None)
        self.best = Best()
        self.lost = 0
        """Validation examples that could not be read."""
        self.examples = 0
        """On how many the last accuracy was measured."""

    def check(self, student: nn.Module, labeler: nn.Module | None = None) -> None:
        """Refuse validation data, and truth, that could not be used later; it costs a pass on two examples of each.

        Of data in batches the first batch is looked at, and nothing of what can be read only once.
        """
        for name, data, network in (("validation", self.validation, student), ("truth", self.truth, labeler)):
            if data is None or network is None or isinstance(data, Iterator):
                continue
            with replayed(RandomState.now(self.device)):
                first = data if is_whole(data) else next(iterated(data, name), None)
                if first is None:
                    raise MetaplError(f"{name} has no batches; expected at least one example, or None.")
                inputs, labels = labeled_pair(first, batch_name(data, name))[:2]
                dense((inputs, labels), f"{name} holds")
                count = length(inputs)
                if isinstance(data, Dataset) and isinstance(labels, int | Tensor) and not getattr(labels, "ndim", 0):
                    raise MetaplError(
                        f"{name} is a data set of single examples; expected batches: DataLoader({name}, 256)."
                    )
                if not isinstance(labels, Tensor) or labels.ndim != 1 or len(labels) != count or count == 0:
                    raise MetaplError(
                        f"{name} has the labels {described(labels)} for {count:,} examples; expected one class index "
                        "for each, and at least one example."
                    )
                if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                    raise MetaplError(
                        f"{name} has the labels {described(labels)}; expected integers, one class index for each "
                        "example: labels.long()."
                    )
                classes = logits_of(network, [rows(inputs, 0, 2)]).shape[-1]
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= classes:
                raise MetaplError(
                    f"the labels of {name} run from {low} to {high}; the network has {classes} classes: expected "
                    f"0..{classes - 1}."
                )

    def look(
        self, student: Kept | None, teacher: Kept | None, labeler: nn.Module | None, step: int
    ) -> dict[str, float]:
        """The accuracies after ``step`` steps; None for a network that there is not, or that has not begun.

        Args:
            student, teacher: the networks that are kept, such as the averages, each in a block of its own: averages of
                sharded networks take the place of these.
            labeler: the network that makes the pseudo-labels.
            step: number of steps done.
        """
        if self.validation is None:
            return {}
        accuracies = {}
        if student is not None:
            with student() as network:
                accuracy, self.examples = self._accuracy(network, self.validation, "validation")
                if self.select and accuracy >= (self.best.accuracy or 0.0):
                    self.best = Best(accuracy, step, weights_of(network))
            accuracies["student_validation_accuracy"] = accuracy
        if teacher is not None:
            with teacher() as network:
                accuracies["teacher_validation_accuracy"] = self._accuracy(network, self.validation, "validation")[0]
        if labeler is not None and self.truth is not None:
            accuracies["pseudo_label_accuracy"] = self._accuracy(labeler, self.truth, "truth")[0]
        return accuracies

    def _accuracy(self, model: nn.Module, data: Any, name: str) -> tuple[float, int]:
        from metapl.data.steps import StepBatches  # needed for fitting only

        # A DataLoader draws from the default generator; looking at the validation data must not change the training.
        with replayed(RandomState.now(self.device)):
            logits, labels = predict_logits(model, self._batches(data, name))
        expected = (data.examples if isinstance(data, StepBatches) else None) or len(labels)
        lost, before = expected - len(labels), self.lost
        self.lost = max(lost, before)
        if 0 < lost == expected:
            raise MetaplError(
                f"none of the {expected:,} validation pictures can be read any more; were they moved or removed while "
                "the run was under way? Put them back, then go on with the run."
            )
        if lost > before:
            self.say(
                f"note: {lost:,} of the {expected:,} validation pictures cannot be read any more; accuracies are of "
                "the others, and are not to be compared with those before"
            )
        evaluation = evaluate_logits(logits, labels)
        return evaluation.accuracy, evaluation.n

    def _batches(self, data: Any, name: str) -> Iterator[tuple[Any, Tensor]]:
        """Batches of data; an iterator that an earlier look has used up is refused by name."""
        empty = True
        for batch in batches_of(data, self.device, name=name):
            empty = False
            yield batch
        if empty and isinstance(data, Iterator):
            raise MetaplError(
                f"{name} is {described(data)}, which can be read only once, and was read before; expected a pair "
                "(inputs, labels), a list of batches or a DataLoader."
            )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights and buffers on the host; of a sharded one every process has all of them."""
    return {name: whole(t).detach().cpu().clone() for name, t in model.state_dict().items()}
