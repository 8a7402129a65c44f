"""What a network is measured by on labeled batches.

Its accuracy, its problem's loss, or a metric of the user's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import LABEL_KEYS, length, rows, to_device
from metapl.execution.checks import described
from metapl.execution.state import RandomState, replayed
from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.predictions import logits_of, outer_batches, passes, predict_logits
from metapl.problems.base import OuterLoss, sum_and_weight

Better = Literal["min", "max"]
Batches = Iterable[tuple[Any, Any]]  # a network's inputs, and the batch as its loss reads it
Term = Callable[[Any, Any, Any], OuterLoss]
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

    def read_outer(self, batch: Any, name: str) -> tuple[Any, Any]:
        """Return the student's inputs in a labeled batch, and the batch as its loss reads it."""

    def outer_terms(self) -> Sequence[Term]:
        """Return the losses whose sum is the trainer's loss."""


class Updated(Protocol):
    """A metric that is updated batch by batch, such as those of torchmetrics."""

    def update(self, *args: Any, **kwargs: Any) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> Any: ...


Asked = Literal["accuracy", "loss"] | Callable[[Tensor, Any], Any] | Updated
"""A metric as it is asked for."""


@dataclass(frozen=True)
class Measured:
    """The value of a metric on n examples."""

    metric: str
    value: float
    n: int


@dataclass(frozen=True)
class Metric:
    """A number that says how good a network is on labeled batches."""

    name: str  # in rows and messages
    better: (
        Better | None
    )  # whether the smallest value is the best one, or the greatest; None: it is not known
    given: Any  # the metric as it was asked for

    def over(self, trainer: Judge, network: nn.Module, batches: Batches) -> Measured | Evaluation:
        """Its value over all batches, which the ``trainer`` reads and judges.

        NaN where there is no example.
        """
        if self is ACCURACY:
            return evaluate_logits(
                *predict_logits(network, ((x, self._labels(batch)) for x, batch in batches))
            )
        updated, n = _is_updated(self.given), 0
        # A second parameter of this name is given the batch, and any other one its labels.
        whole = updated and [*inspect.signature(self.given.update).parameters][1:2] == ["batch"]
        try:
            with passes(network) as outputs_of:

                def mean(network: Any, inputs: Any, batch: Any) -> Tensor:
                    return torch.tensor(
                        float(self.given(outputs_of(inputs), batch)), dtype=torch.float64
                    )

                terms = trainer.outer_terms() if self is LOSS else [] if updated else [mean]
                sums = [[0.0, 0.0] for _ in terms]  # of each: of its values, and of their weights
                if updated:
                    self.given.reset()
                for inputs, batch in batches:
                    # Other tensors of a batch, such as weights of classes, may be longer than it
                    # has examples.
                    own = next(
                        (t for t in (inputs, labels_of(batch)) if isinstance(t, Tensor) and t.ndim),
                        None,
                    )
                    n += (count := length(batch) if own is None else len(own))
                    for held, term in zip(sums, terms, strict=True):
                        total, weight = sum_and_weight(term(network, inputs, batch))
                        of_rows = isinstance(weight, float)  # a mean over examples
                        held[0] += float(total) * (count if of_rows else 1)
                        held[1] += count if of_rows else float(weight)
                    if updated:
                        given = outputs_of(inputs), batch if whole else self._labels(batch)
                        self.given.update(
                            *to_device(given, getattr(self.given, "device", trainer.device))
                        )
            if updated:
                return Measured(self.name, float(self.given.compute()) if n else math.nan, n)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, MetaplError):
                raise
            why = f"the metric {self.name!r} failed ({reason_of(error)})"
            raise MetaplError(
                f"{why}; expected f(outputs, batch) -> number, or update(outputs, labels)."
            ) from error
        return Measured(
            self.name, sum(total / weight if weight else math.nan for total, weight in sums), n
        )

    def measured(
        self, trainer: Judge, network: nn.Module, batches: Batches, of: str
    ) -> Measured | Evaluation:
        """The same, refused where it is not finite; ``of`` says of which network and data."""
        found = self.over(trainer, network, batches)
        if not math.isfinite(found.value):
            raise MetaplError(
                f"the metric {self.name!r} of {of} is {found.value}; expected a finite number."
            )
        return found

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value is as good as the best so far, or better."""
        return best is None or (value <= best if self.better == "min" else value >= best)

    def _labels(self, batch: Any) -> Tensor:
        labels = labels_of(batch)
        if not isinstance(labels, Tensor):
            raise MetaplError(
                f"the metric {self.name!r} is of outputs and labels, and a batch is "
                f"{described(batch)}."
            )
        return labels


ACCURACY, LOSS = Metric("accuracy", "max", "accuracy"), Metric("loss", "min", "loss")


def _is_updated(given: Any) -> bool:
    return all(hasattr(given, part) for part in ("update", "compute", "reset"))


def metric_of(given: Any, mode: Better | None = None) -> Metric | None:
    """The metric that a user asks for, whose best value is the one that ``mode`` says.

    None: the default one.
    """
    if mode not in (None, "min", "max") or (given is None and mode is not None):
        raise MetaplError(
            f"mode={mode!r} was given with metric={given!r}; expected 'min' or 'max', and a metric."
        )
    if given is None:
        return None
    if isinstance(given, str) and given in ("accuracy", "loss"):
        metric = ACCURACY if given == "accuracy" else LOSS
    elif (_is_updated(given) or callable(given)) and not isinstance(given, type):
        named = getattr(given, "func", given)  # of a partial
        name = getattr(named, "name", None) or getattr(named, "__name__", type(named).__name__)
        higher = getattr(given, "higher_is_better", None)
        known: Better | None = None if higher is None else "max" if higher else "min"
        metric = Metric("metric" if name == "<lambda>" else str(name), known or mode, given)
    else:
        expected = (
            "'accuracy', 'loss', a function (outputs, batch) -> number, or one of torchmetrics"
        )
        raise MetaplError(f"metric is {described(given)}; expected {expected}.")
    if mode not in (None, metric.better):
        raise MetaplError(
            f"mode={mode!r} was given, and of the metric {metric.name!r} the {metric.better} is "
            "best."
        )
    return metric


def metric_for(
    trainer: Judge, validation: Any, metric: Metric | None, select: bool
) -> Metric | None:
    """The metric of the networks on validation data, None without these.

    The student is measured on the first batch.
    """
    if validation is None:
        if metric is not None:
            raise MetaplError(
                f"the metric {metric.name!r} was given without validation data; expected both."
            )
        return None
    if isinstance(validation, Iterator):
        raise MetaplError(
            "validation is an iterator, which is read once; expected a list or a DataLoader."
        )
    with replayed(RandomState.now(trainer.device)):
        first = next(
            outer_batches(validation, trainer.read_outer, trainer.device, "validation"), None
        )
        if first is None:
            raise MetaplError("validation has no batches; expected at least one example, or None.")
        metric = metric or default_metric(
            trainer, first[1], logits_of(trainer.student, [rows(first[0], 0, 2)])
        )
        if select and metric.better is None:
            raise MetaplError(
                f"metric {metric.name!r}: expected mode='max', or mode='min' of an error, beside "
                "it."
            )
        metric.over(trainer, trainer.student, [first])
    return metric


def default_metric(judge: Judge, batch: Any, outputs: Tensor) -> Metric:
    """Accuracy where the problem is one of classes (:func:`of_classes`), and else its loss."""
    return ACCURACY if of_classes(judge, batch, outputs) else LOSS


def of_classes(judge: Judge, batch: Any, outputs: Tensor) -> bool:
    """Whether outputs (B, C) are class logits: where the labels of the batch are the indices of
    classes, integers (B,) from 0 to C − 1; without labels, where the trainer's problem or losses
    say so."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    labels = labels_of(batch)
    if labels is None:
        return bool(judge.classifies)
    if (
        not isinstance(labels, Tensor)
        or labels.ndim != 1
        or labels.is_floating_point()
        or labels.dtype == torch.bool
    ):
        return False
    return judge.classifies or bool(((labels >= 0) & (labels < outputs.shape[1])).all())


def labels_of(batch: Any) -> Any:
    """The second element of a tuple, or what a dict has under ``labels``.

    None where there is neither.
    """
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
