"""What a network is measured by on labeled batches: its accuracy, its problem's loss, or a metric of the user's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import LABEL_KEYS, length
from metapl.execution.checks import described
from metapl.execution.device import to_device
from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.predictions import passes, predict_logits
from metapl.problems.base import OuterLoss, sum_and_weight

Better = Literal["min", "max"]
Batches = Iterable[tuple[Any, Any]]  # a network's inputs, and the batch as its loss reads it
Term = Callable[[Any, Any, Any], OuterLoss]
"""A loss of a network (or a function that stands in for it), its inputs and the batch."""


class Updated(Protocol):
    """A metric that is updated batch by batch, such as those of torchmetrics."""

    @property
    def update(self) -> Callable[..., Any]: ...
    @property
    def compute(self) -> Callable[[], Any]: ...
    @property
    def reset(self) -> Callable[[], Any]: ...


Asked = Literal["accuracy", "loss"] | Callable[[Tensor, Any], Any] | Updated
"""A metric as it is asked for."""


class Judge(Protocol):
    """What knows how labeled batches are read and judged: a trainer."""

    device: torch.device

    @property
    def classifies(self) -> bool:
        """Whether its outputs are class logits."""

    def outer_terms(self) -> Sequence[Term]:
        """Its loss on a labeled batch is the sum of these."""


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
        name: in rows and messages.
        better: whether the smallest value is the best one, or the greatest; None: it is not known.
        over: measures a network over batches.
    """

    name: str
    better: Better | None
    over: Callable[[Judge, nn.Module, Batches], Measured | Evaluation]

    def measured(self, judge: Judge, network: nn.Module, batches: Batches, of: str) -> Measured | Evaluation:
        """Its value over all batches, refused where it is not finite; ``of`` says of which network and data."""
        found = self.over(judge, network, batches)
        if not math.isfinite(found.value):
            raise MetaplError(f"the metric {self.name!r} of {of} is {found.value}; expected a finite number.")
        return found

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value is as good as the best so far, or better."""
        return best is None or (value <= best if self.better == "min" else value >= best)

    def shown(self, value: float) -> str:
        return f"{self.name} {value:.1%}" if self is ACCURACY else f"{self.name} {value:.4g}"


def metric_of(given: Any, mode: Better | None = None) -> Metric | None:
    """The metric that a user asks for, whose best value is the one that ``mode`` says; None: the default one.

    >>> metric_of(lambda outputs, batch: 0.0, "max").improves(2.0, best=1.0)
    True
    """
    if mode not in (None, "min", "max") or (given is None and mode is not None):
        raise MetaplError(f"mode={mode!r} was given with metric={given!r}; expected 'min' or 'max', and a metric.")
    if given is None:
        return None
    named = given
    while isinstance(named, partial):
        named = named.func
    name = getattr(named, "name", None) or getattr(named, "__name__", type(named).__name__)
    if isinstance(given, str) and given in ("accuracy", "loss"):
        metric = ACCURACY if given == "accuracy" else LOSS
    elif not isinstance(given, type) and all(hasattr(given, part) for part in ("update", "compute", "reset")):
        known: Any = {True: "max", False: "min"}.get(getattr(given, "higher_is_better", None))  # type: ignore[arg-type]
        metric = Metric(str(name), known, partial(_updated, given, str(name)))
    elif callable(given) and not isinstance(given, type):
        name = "metric" if name == "<lambda>" else str(name)
        metric = Metric(name, None, partial(_by_rows, given, name))
    else:
        raise MetaplError(
            f"metric is {described(given)}; expected 'accuracy', 'loss', a function (outputs, batch) -> number, or an "
            "object with update, compute and reset, such as those of torchmetrics."
        )
    if None not in (mode, metric.better) and mode != metric.better:
        raise MetaplError(f"mode={mode!r} was given, and of {metric.name!r} the {metric.better} is best.")
    return Metric(metric.name, mode, metric.over) if metric.better is None else metric


def default_metric(judge: Judge, batch: Any, outputs: Tensor) -> Metric:
    """Accuracy where the problem is one of classes (:func:`of_classes`), and else its loss; ``outputs`` are those of a
    few rows of the batch."""
    return ACCURACY if of_classes(judge, batch, outputs) else LOSS


def of_classes(judge: Judge, batch: Any, outputs: Tensor) -> bool:
    """Whether outputs (B, C) are class logits: where the labels of the batch are the indices of classes, integers (B,)
    from 0 to C − 1; without labels, where the trainer's problem or losses say so."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    labels = labels_of(batch)
    if labels is None:
        return judge.classifies
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return False
    return judge.classifies or bool(((labels >= 0) & (labels < outputs.shape[1])).all())


def labels_of(batch: Any) -> Any:
    """The second element of a tuple, or what a dict has under ``labels``; None where there is neither."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


# --------------------------------------------------------------------------------------------------------- over batches


def _accuracy(judge: Judge, network: nn.Module, batches: Batches) -> Evaluation:
    return evaluate_logits(*predict_logits(network, ((x, _labels(batch, "accuracy")) for x, batch in batches)))


def _loss(judge: Judge, network: nn.Module, batches: Batches) -> Measured:
    terms, n = judge.outer_terms(), 0
    sums = [[0.0, 0.0] for _ in terms]  # of each: sum and weight
    with passes(network), _named("loss"):
        for inputs, batch in batches:
            n += (count := _count(inputs, batch))
            for held, term in zip(sums, terms, strict=True):
                total, weight = sum_and_weight(term(network, inputs, batch))
                if isinstance(weight, float):  # a mean over examples
                    total, weight = total.double() * count, count
                held[0] += float(total)
                held[1] += float(weight)
    if not n or not all(weight > 0 for _, weight in sums):
        raise MetaplError(f"there are {n} examples to measure on, and their weights sum to 0; expected one or more.")
    return Measured("loss", sum(total / weight for total, weight in sums), n)


def _by_rows(
    function: Callable[[Tensor, Any], Any], name: str, judge: Judge, network: nn.Module, batches: Batches
) -> Measured:
    total, n = 0.0, 0
    with passes(network) as outputs_of, _named(name):
        for inputs, batch in batches:
            count = _count(inputs, batch)
            total, n = total + count * _number(function(outputs_of(inputs), batch), name), n + count
    return Measured(name, total / n if n else math.nan, n)


def _updated(metric: Any, name: str, judge: Judge, network: nn.Module, batches: Batches) -> Measured:
    """``update(outputs, labels)``, or ``update(outputs, batch)`` where the second parameter is called batch."""
    named = [p.name for p in inspect.signature(metric.update).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    n = 0
    metric.reset()
    with passes(network) as outputs_of, _named(name):
        for inputs, batch in batches:
            given = outputs_of(inputs), batch if named[1:2] == ["batch"] else _labels(batch, name)
            metric.update(*to_device(given, getattr(metric, "device", judge.device)))
            n += _count(inputs, batch)
    value = _number(metric.compute(), name) if n else math.nan
    metric.reset()
    return Measured(name, value, n)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which metric failed, and how one is called."""
    try:
        yield
    except (TypeError, RuntimeError) as error:
        raise MetaplError(
            f"the metric {name!r} failed ({reason_of(error)}); expected f(outputs, batch) -> number, or an object with "
            "update(outputs, labels)."
        ) from error


ACCURACY = Metric("accuracy", "max", _accuracy)
LOSS = Metric("loss", "min", _loss)


def _count(inputs: Any, batch: Any) -> int:
    """The number of examples in a batch, in which other tensors, such as weights of classes, may be longer."""
    known = next((t for t in (inputs, labels_of(batch)) if isinstance(t, Tensor) and t.ndim), None)
    return length(batch) if known is None else len(known)


def _labels(batch: Any, name: str) -> Tensor:
    labels = labels_of(batch)
    if not isinstance(labels, Tensor):
        raise MetaplError(f"the metric {name!r} is of outputs and labels, and a batch is {described(batch)}.")
    return labels


def _number(value: Any, name: str) -> float:
    plain = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise MetaplError(f"the metric {name!r} returned {described(value)}; expected one number.")
    return float(plain)
