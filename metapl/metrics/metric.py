"""Measures of a network on labeled batches: accuracy, its problem's loss, or a user's metric."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.batch import LABEL_KEYS, Batch, Inputs, length, rows, to_device
from metapl.execution.checks import unexpected, way_to_labels
from metapl.execution.state import RandomState, replayed
from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.predictions import labeled_logits, logits_of, outer_batches, passes
from metapl.problems.base import OuterLoss, sum_and_weight

Better = Literal["min", "max"]

# Pairs of a network's inputs, and the batch as its loss reads it.
Batches = Iterable[tuple[Inputs, Batch]]

Term = Callable[[Any, Inputs, Batch], OuterLoss]
"""A loss of a network (or a function that stands in for it), its inputs and the batch."""


class Judge(Protocol):
    """What a metric reads of a trainer.

    Attributes:
        student: the network that is measured where no other is named.
        device: where its batches are read.
        classifies: whether the losses are known to be of classes.
    """

    student: nn.Module
    device: torch.device
    classifies: bool

    def read_outer(self, batch: Batch, name: str) -> tuple[Inputs, Batch]:
        """Return the student's inputs in a labeled batch, and the batch as its loss reads it."""

    def outer_terms(self) -> Sequence[Term]:
        """Return the losses whose sum is the trainer's loss."""


class Updated(Protocol):
    """A metric that is updated batch by batch, such as those of torchmetrics."""

    def update(self, *args: Any, **kwargs: Any) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> Any: ...


MetricLike = Literal["accuracy", "loss"] | Callable[[Tensor, Batch], Any] | Updated
"""What a user may name a metric by: its name, a function, or a metric of torchmetrics."""


@dataclass(frozen=True)
class Measured:
    """The value of a metric on n examples."""

    metric: str
    value: float
    n: int


@dataclass(frozen=True)
class Metric:
    """A number that says how good a network is on labeled batches.

    Args:
        name: its name in rows and messages.
        better: whether the smallest value is the best one, or the greatest; None: it is not known.
        definition: its name, its function, or the metric of torchmetrics, as a user gave it.
    """

    name: str
    better: Better | None
    definition: Any

    def over(self, judge: Judge, network: nn.Module, batches: Batches) -> Measured | Evaluation:
        """Return the value over all batches, by the losses of the trainer that judges.

        It is NaN where there is no example.
        """
        if self is ACCURACY:
            labeled = ((inputs, self._labels(batch)) for inputs, batch in batches)
            return evaluate_logits(*labeled_logits(network, labeled, finite_of="evaluated"))
        read: list[Batch] = []

        def noted() -> Iterator[tuple[Inputs, Batch]]:
            for inputs, batch in batches:
                read[:] = [batch]
                yield inputs, batch

        try:
            with passes(network) as outputs_of:
                if _is_updated(self.definition):
                    return self._measured_by_updates(judge.device, noted(), outputs_of)
                if self is LOSS:
                    return self._measured_by_terms(network, noted(), judge.outer_terms())
                return self._measured_by_terms(network, noted(), [self._term(outputs_of)])
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, MetaplError) or not read:
                raise
            raise self._failed(error, judge, read[0]) from error

    def _failed(self, error: Exception, judge: Judge, batch: Batch) -> Exception:
        """Return what is said of a metric that fails on a batch."""
        reason = reason_of(error)
        if notes := getattr(error, "__notes__", None):
            # The network has failed, and not the metric.
            return MetaplError(f"{reason} {few(notes)}.")
        if self is not LOSS:
            expected = "f(outputs, batch) -> number, or update(outputs, labels)"
            return MetaplError(f"the metric {self.name!r} failed ({reason}); expected {expected}.")
        labels = labels_of(batch)
        mend = way_to_labels(labels) if judge.classifies else ""
        expected = f"labels as a step reads them{mend}"
        return unexpected(f"the loss failed ({reason}), where the labels are", labels, expected)

    def _measured_by_updates(
        self, device: torch.device, batches: Batches, outputs_of: Callable[[Inputs], Tensor]
    ) -> Measured:
        """Update a metric such as those of torchmetrics by each batch, and ask it for its value."""
        # A second parameter of this name is given the batch, and any other one its labels.
        second_parameters = [*inspect.signature(self.definition.update).parameters][1:2]
        reads_batch = second_parameters == ["batch"]
        self.definition.reset()
        n = 0
        for inputs, batch in batches:
            n += _examples_in(inputs, batch)
            arguments = (outputs_of(inputs), batch if reads_batch else self._labels(batch))
            metric_device = getattr(self.definition, "device", device)
            self.definition.update(*to_device(arguments, metric_device))
        value = float(self.definition.compute()) if n else math.nan
        return Measured(self.name, value, n)

    def _measured_by_terms(
        self, network: nn.Module, batches: Batches, terms: Sequence[Term]
    ) -> Measured:
        """Return the sum of the terms, each a mean over all batches."""
        sums = [0.0 for _ in terms]
        weights = [0.0 for _ in terms]
        n = 0
        for inputs, batch in batches:
            count = _examples_in(inputs, batch)
            n += count
            for place, term in enumerate(terms):
                total, weight = sum_and_weight(term(network, inputs, batch))
                if count and not math.isfinite(float(total)):
                    from metapl.execution.failed_steps import what_is_unsound

                    reason = f"the metric {self.name!r} is {float(total)}."
                    if unsound := what_is_unsound(inputs, "evaluated", reason):
                        raise MetaplError(unsound)
                if isinstance(weight, Tensor):
                    sums[place] += float(total)
                    weights[place] += float(weight)
                else:
                    # A scalar is a mean over the examples of the batch.
                    sums[place] += float(total) * count
                    weights[place] += count
        means = [
            total / weight if weight else math.nan
            for total, weight in zip(sums, weights, strict=True)
        ]
        return Measured(self.name, sum(means), n)

    def _term(self, outputs_of: Callable[[Inputs], Tensor]) -> Term:
        """Return the user's function as a term of a loss."""

        def term(network: Any, inputs: Inputs, batch: Batch) -> Tensor:
            value = float(self.definition(outputs_of(inputs), batch))
            return torch.tensor(value, dtype=torch.float64)

        return term

    def measured(
        self, judge: Judge, network: nn.Module, batches: Batches, description: str
    ) -> Measured | Evaluation:
        """Return the value :meth:`over` all batches, refused where it is not finite.

        The description says of which network and data it is.
        """
        measurement = self.over(judge, network, batches)
        if not math.isfinite(measurement.value):
            name = f"the metric {self.name!r} of {description}"
            raise MetaplError(f"{name} is {measurement.value}; expected a finite number.")
        return measurement

    def improves(self, value: float, best: float | None) -> bool:
        """Return whether a value is as good as the best so far, or better."""
        return value == best or self.is_better(value, best)

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a value is better than the best so far, where there is one."""
        if best is None:
            return True
        return value < best if self.better == "min" else value > best

    def _labels(self, batch: Batch) -> Tensor:
        labels = labels_of(batch)
        if not isinstance(labels, Tensor):
            raise unexpected(f"the metric {self.name!r} has a batch that is", batch, "labels in it")
        return labels


ACCURACY = Metric("accuracy", "max", definition="accuracy")
LOSS = Metric("loss", "min", definition="loss")


def _examples_in(inputs: Inputs, batch: Batch) -> int:
    """Return the number of examples in a batch: the rows of the inputs, or else of the labels.

    Other tensors of a batch, such as weights of classes, may be longer than it has examples.
    """
    for t in (inputs, labels_of(batch)):
        if isinstance(t, Tensor) and t.ndim:
            return len(t)
    return length(batch)


def _is_updated(definition: Any) -> bool:
    """Return whether a metric is updated batch by batch (:class:`Updated`)."""
    return all(hasattr(definition, method) for method in ("update", "compute", "reset"))


def metric_of(definition: Any, metric_mode: Better | None = None) -> Metric | None:
    """Return the metric that a user asks for, or None for the default one.

    ``metric_mode`` says which of its values is the best.
    """
    is_alone = definition is None and metric_mode is not None
    if metric_mode not in (None, "min", "max") or is_alone:
        given = f"metric_mode={metric_mode!r} was given with metric={definition!r}"
        raise MetaplError(f"{given}; expected 'min' or 'max', and a metric.")
    if definition is None:
        return None
    if isinstance(definition, str) and definition in ("accuracy", "loss"):
        metric = ACCURACY if definition == "accuracy" else LOSS
    elif (_is_updated(definition) or callable(definition)) and not isinstance(definition, type):
        better = _better_of(definition)
        if better is None:
            better = metric_mode
        metric = Metric(_name_of(definition), better, definition=definition)
    else:
        expected = "'accuracy', 'loss', a function (outputs, batch) -> number, or of torchmetrics"
        raise MetaplError(f"metric={definition!r:.80}: expected {expected}.")
    if metric_mode not in (None, metric.better):
        raise MetaplError(f"metric_mode={metric_mode!r}: expected {metric.better!r}, or none.")
    return metric


def _name_of(definition: Any) -> str:
    """Return the name of a function or of a metric that is updated."""
    # A functools.partial has the function in it.
    function = getattr(definition, "func", definition)
    name = getattr(function, "name", None) or getattr(function, "__name__", None)
    if name == "<lambda>":
        return "metric"
    return str(name or type(function).__name__)


def _better_of(definition: Any) -> Better | None:
    """Return which of its values is the best, as metrics of torchmetrics say, or None."""
    is_higher_better = getattr(definition, "higher_is_better", None)
    if is_higher_better is None:
        return None
    return "max" if is_higher_better else "min"


def metric_for(
    judge: Judge, validation: Any, metric: Metric | None, compares: bool
) -> Metric | None:
    """Return the metric of the networks on validation data, None without these.

    It is tried by measuring the student on the first batch.

    Args:
        compares: whether its values are compared, to keep the best network or to end early.
    """
    if validation is None:
        if metric is not None:
            raise MetaplError("a metric was given without validation data; expected both.")
        return None
    if isinstance(validation, Iterator):
        raise MetaplError("validation is an iterator; expected a list or a DataLoader.")
    with replayed(RandomState.now(judge.device)):
        batches = outer_batches(
            validation, judge.read_outer, device=judge.device, name="validation"
        )
        first = next(batches, None)
        if first is None:
            raise MetaplError("validation has no batches; expected at least one example, or None.")
        if metric is None:
            inputs, batch = first
            outputs = logits_of(judge.student, [rows(inputs, 0, 2)])
            labels = labels_of(batch)
            if judge.classifies and isinstance(labels, Tensor) and is_one_hot(labels):
                expected = "classes, as by labels.argmax(1), or metric='loss'"
                raise unexpected("validation has one-hot labels,", labels, expected)
            metric = default_metric(judge, batch, outputs)
        if compares and metric.better is None:
            mend = "expected metric_mode='max' beside it, or metric_mode='min' of an error"
            raise MetaplError(f"metric {metric.name!r}: {mend}.")
        metric.over(judge, judge.student, [first])
    return metric


def default_metric(judge: Judge, batch: Batch, outputs: Tensor) -> Metric:
    """Return accuracy where the problem is one of classes (:func:`of_classes`), else its loss."""
    return ACCURACY if of_classes(judge, batch, outputs) else LOSS


def is_one_hot(labels: Tensor) -> bool:
    """Return whether labels (B, C) have one entry that is 1 in each row, and others that are 0."""
    if labels.ndim != 2 or labels.shape[1] < 2:
        return False
    are_of_two = bool(((labels == 0) | (labels == 1)).all())
    return are_of_two and bool((labels.sum(1) == 1).all())


def of_classes(judge: Judge, batch: Batch, outputs: Tensor) -> bool:
    """Return whether outputs (B, C) are class logits.

    They are where the labels of the batch are the indices of classes, integers (B,) from 0 to C −
    1; without labels, where the trainer's problem or losses say so.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    labels = labels_of(batch)
    if labels is None:
        return bool(judge.classifies)
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        return False
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return False
    return judge.classifies or bool(((labels >= 0) & (labels < outputs.shape[1])).all())


def labels_of(batch: Batch) -> Any:
    """Return the second element of a tuple, or what a dict has under ``labels``.

    None where there is neither.
    """
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[1]
    return None
