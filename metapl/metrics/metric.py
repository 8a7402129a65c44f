"""What a network is measured by on labeled batches: its accuracy, its problem's loss, or a metric of the user's."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, reason_of
from metapl.execution.batch import LABEL_KEYS, length, rows
from metapl.execution.checks import described
from metapl.execution.device import to_device
from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.predictions import passes, predict_logits
from metapl.problems.base import OuterLoss, sum_and_weight
from metapl.words import did_you_mean

Better = Literal["min", "max"]
Batches = Iterable[tuple[Any, Any]]  # a network's inputs, and the batch as its loss reads it
Term = Callable[[Any, Any, Any], OuterLoss]
"""A loss of a network (or a function that stands in for it), its inputs and the batch."""

HIGH = 1e6  # an output above what is predicted, at which a loss of one output pulls it down
ASKED = 64  # examples on which a loss is asked whether it is one of classes

_EXPECTED = (
    "expected 'accuracy', 'loss', a function (outputs, batch) -> number, or an object with update, compute and reset, "
    "such as those of torchmetrics"
)


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
        """Whether its losses are known to be of classes, without being asked."""

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
            raise MetaplError(
                f"the metric {self.name!r} of {of} is {found.value}; expected a finite number: have the outputs "
                "diverged, or is it not defined on these examples?"
            )
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
    if mode not in (None, "min", "max"):
        raise MetaplError(f"mode={mode!r}: expected 'min' or 'max', which values of the metric are better, or None.")
    if given is None:
        if mode is not None:
            raise MetaplError(f"mode={mode!r} was given without a metric, of which it is; expected metric=... too.")
        return None
    if isinstance(given, str):
        named = {"accuracy": ACCURACY, "loss": LOSS}.get(given)
        if named is None:
            raise MetaplError(f"metric={given!r}{did_you_mean(given, ['accuracy', 'loss']) or f': {_EXPECTED}.'}")
        metric = named
    elif isinstance(given, type):
        raise MetaplError(f"metric is the class {given.__name__}; expected an instance: {given.__name__}().")
    elif hasattr(given, "update"):
        lacking = [name for name in ("update", "compute", "reset") if not callable(getattr(given, name, None))]
        if lacking:
            raise MetaplError(f"metric is {described(given)}, without {' and '.join(lacking)}; {_EXPECTED}.")
        known = {True: "max", False: "min"}.get(getattr(given, "higher_is_better", None))  # type: ignore[arg-type]
        metric = Metric(_name_of(given), known, partial(_updated, given))  # type: ignore[arg-type]
    elif callable(given):
        metric = Metric(_name_of(given), None, partial(_by_rows, given))
    else:
        raise MetaplError(f"metric is {described(given)}; {_EXPECTED}.")
    if None not in (mode, metric.better) and mode != metric.better:
        raise MetaplError(
            f"mode={mode!r} was given, and of the metric {metric.name!r} the {metric.better} is best; leave mode out."
        )
    return Metric(metric.name, mode, metric.over) if metric.better is None else metric


def default_metric(judge: Judge, batch: Any, outputs: Tensor) -> Metric:
    """Accuracy where the problem is one of classes (:func:`of_classes`), and else its loss; ``outputs`` are those of a
    few rows of the batch."""
    return ACCURACY if of_classes(judge, batch, outputs) else LOSS


def of_classes(judge: Judge, batch: Any, outputs: Tensor) -> bool:
    r"""Whether the labels of a batch (inputs, labels, ...) are classes, of which the outputs (B, C) are the logits.

    Shapes and types cannot tell: a count is an integer too, and a mean and a variance are two outputs. So the loss is
    asked, with labels :math:`y_i = i \bmod C` in the place of the given ones: it is one of classes where
    :math:`f_{ik} = -\partial L / \partial z_{ik}` at equal outputs, z = 0, is positive for :math:`k = y_i` and for no
    other k, and where all other k count alike: f is negative there, at z = 0 or at a great z, or zero at both with the
    same f for :math:`y_i` (of log-probabilities). A label that says which output is meant, such as the action whose
    reward is predicted, has no part in the others; of a time to an event, the outputs before it and behind it differ.
    Nor is it one that takes labels for numbers: between two of them, of y + 1/2, a loss of classes fails, takes it for
    y, or for no class, so that no f is positive; but a count of 1 1/2 raises a rate that one of 1/2 lowers.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2 or outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    count, classes, labels = min(_count(batch[0], batch), ASKED), outputs.shape[1], batch[1]
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.shape[1:] == outputs.shape[1:]:
        return False  # a distribution for each example, or a number for each output
    if judge.classifies:
        return True
    inputs, *others = rows([batch[0], *batch[2:]], 0, count)
    made = torch.arange(count, device=judge.device) % classes
    is_label = torch.nn.functional.one_hot(made, classes).bool()
    for term in judge.outer_terms():

        def falls(height: float, labels: Tensor = made, term: Term = term) -> Tensor:
            z = torch.full((count, classes), height, dtype=outputs.dtype, device=judge.device, requires_grad=True)
            loss, _ = sum_and_weight(term(lambda _: z, inputs, (inputs, labels, *others)))
            return -torch.autograd.grad(loss, z)[0]

        with suppress(Exception), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of labels that are not the user's
            low = falls(0.0)
            counted = low.ne(0).any(1)  # all but those that a mask leaves out
            if not counted.any() or not (is_label == (low > 0))[counted].all():
                continue
            low, is_it = low[counted], is_label[counted]
            if not (low[~is_it] < 0).all():
                high = falls(HIGH)[counted]
                if low[~is_it].any() or not ((high[~is_it] < 0).all() or (high == low).all()):
                    continue
            with suppress(Exception):
                between = falls(0.0, made + 0.5)[counted] > 0
                if between.any() and not (between == is_it).all():
                    continue
            return True
    return False


def labels_of(batch: Any) -> Any:
    """The second element of a tuple, or what a dict has under ``labels``; None where there is neither."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


# --------------------------------------------------------------------------------------------------------- over batches


def _accuracy(judge: Judge, network: nn.Module, batches: Batches) -> Evaluation:
    return evaluate_logits(*predict_logits(network, ((x, _labels(batch, "accuracy")) for x, batch in batches)))


def _loss(judge: Judge, network: nn.Module, batches: Batches) -> Measured:
    terms = judge.outer_terms()
    sums, n = [[0.0, 0.0] for _ in terms], 0
    with passes(network):
        for inputs, batch in batches:
            count = _count(inputs, batch)
            n += count
            for held, term in zip(sums, terms, strict=True):
                with _named(None):
                    total, weight = sum_and_weight(term(network, inputs, batch))
                if isinstance(weight, float):  # a mean over examples
                    total, weight = total.double() * count, count
                held[0] += float(total)
                held[1] += float(weight)
    if _some(n) and not all(weight > 0 for _, weight in sums):
        raise MetaplError(
            f"the weights that outer_loss returned beside its sums add up to {min(w for _, w in sums):g} over all "
            "batches, and nothing can be divided by that; expected examples that count."
        )
    return Measured("loss", sum(total / weight for total, weight in sums), n)


def _by_rows(function: Callable[[Tensor, Any], Any], judge: Judge, network: nn.Module, batches: Batches) -> Measured:
    name, total, n = _name_of(function), 0.0, 0
    with passes(network) as outputs_of:
        for inputs, batch in batches:
            outputs = outputs_of(inputs)
            with _named(name):
                value = _number(_left_alone(name, network, batch, function, outputs, batch), name)
            count = _count(inputs, batch)
            total, n = total + value * count, n + count
    return Measured(name, total / _some(n), n)


def _updated(metric: Any, judge: Judge, network: nn.Module, batches: Batches) -> Measured:
    name, n = _name_of(metric), 0
    named = [p.name for p in inspect.signature(metric.update).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    whole = named[1:2] == ["batch"]
    with passes(network) as outputs_of, _named(name):
        metric.reset()
        for inputs, batch in batches:
            given = outputs_of(inputs), batch if whole else _labels(batch, name)
            _left_alone(name, network, batch, metric.update, *to_device(given, getattr(metric, "device", judge.device)))
            n += _count(inputs, batch)
        value = _number(metric.compute(), name) if _some(n) else 0.0
        metric.reset()
    return Measured(name, value, n)


def _left_alone(name: str, network: nn.Module, batch: Any, function: Callable[..., Any], *given: Any) -> Any:
    """What a metric returns; one that writes to the network or to the batch, which the next look reads, is refused."""
    return function(*given)


ACCURACY = Metric("accuracy", "max", _accuracy)
LOSS = Metric("loss", "min", _loss)


def _count(inputs: Any, batch: Any) -> int:
    """The number of examples in a batch, in which other tensors, such as weights of classes, may be longer."""
    labels = labels_of(batch)
    known = next((t for t in (inputs, labels) if isinstance(t, Tensor) and t.ndim), None)
    return length(batch) if known is None else len(known)


def _labels(batch: Any, name: str) -> Tensor:
    labels = labels_of(batch)
    if not isinstance(labels, Tensor):
        raise MetaplError(
            f"the metric {name!r} is of outputs and labels, and a batch is {described(batch)}, with the labels "
            f"{described(labels)}; expected (inputs, labels), a dict with a tensor under 'labels', or a metric that "
            "takes (outputs, batch)."
        )
    return labels


def _name_of(metric: Any) -> str:
    named = getattr(metric, "name", None)
    if isinstance(named, str) and named:
        return named
    while isinstance(metric, partial):
        metric = metric.func
    name: str = getattr(metric, "__name__", type(metric).__name__)
    return "metric" if name == "<lambda>" else name


def _number(value: Any, name: str) -> float:
    plain = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise MetaplError(
            f"what the metric {name!r} returned is {described(value)}; expected one number, or a tensor without "
            "dimensions."
        )
    return float(plain)


def _some(n: int) -> int:
    if not n:
        raise MetaplError("there are no examples to measure on; give at least one, and a fresh iterator for each call")
    return n


@contextmanager
def _named(name: str | None) -> Iterator[None]:
    """Say which metric failed, and how one is called; None: the trainer's own loss."""
    try:
        yield
    except MetaplError:
        raise
    except Exception as error:
        if name is None:
            raise MetaplError(
                f"the loss failed on such a batch ({type(error).__name__}: {reason_of(error)}); expected batches as "
                "those that are trained on."
            ) from error
        raise MetaplError(
            f"the metric {name!r} failed ({type(error).__name__}: {reason_of(error)}). A function is called as "
            "f(outputs, batch), with the batch as the problem's outer_batch reads it; an object by update(outputs, "
            "labels), or update(outputs, batch) where its second parameter is called batch."
        ) from error
