"""A network's outputs on inputs that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import as_tensors, inputs_of, is_array, is_whole, labeled_pair, length, plain, rows
from metapl.execution.device import to_device
from metapl.execution.layout import without_gradients

ROWS = 1024  # examples in a pass, where data comes as a whole


def predict_logits(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> tuple[Tensor, Tensor]:
    """Runs a classifier over labeled batches in eval mode and without gradients.

    Args:
        model: gives logits (B, C); the batches are moved to the device of its first parameter.
        batches: pairs (x, y) with y of shape (B,); x is a tensor, or a dict or tuple of tensors.

    Returns: logits (N, C) and labels (N,), on the CPU, in the order of the batches. Every submodule is in the mode
        (train or eval) that it had, whatever happens.
    Cost: one forward pass per example; the logits of all examples in memory.
    Raises: :class:`metapl.MetaplError` where there are no batches.

    >>> model = torch.nn.Linear(3, 2)
    >>> logits, labels = predict_logits(model, [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))])
    >>> logits.shape, labels.shape, model.training
    (torch.Size([4, 2]), torch.Size([4]), True)
    """
    labels: list[Tensor] = []

    def inputs() -> Iterator[Any]:
        for x, y in batches:
            labels.append(y.cpu())
            yield x

    logits = logits_of(model, inputs())
    return logits, torch.cat(labels)


def logits_of(model: nn.Module, inputs: Iterable[Any]) -> Tensor:
    """The logits (N, C) of batches of inputs, on the CPU; the rest is as in :func:`predict_logits`."""
    with passes(model) as outputs_of:
        logits = [outputs_of(x).cpu() for x in inputs]
    if not logits:
        raise MetaplError("there are no batches to predict; give at least one, and a fresh iterator for each call")
    shapes = dict.fromkeys(t.shape[1:] if t.ndim else None for t in logits)
    if len(shapes) > 1 or None in shapes:
        raise MetaplError(
            f"the network's outputs on the batches have the shapes {few(tuple(t.shape) for t in logits)}; expected a "
            "row for each example, all of one shape: predict batch by batch."
        )
    return torch.cat(logits)


@contextmanager
def passes(model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
    """A function from inputs to the network's outputs on them, in eval mode and without gradients while the block
    lasts."""
    first = next(model.parameters(), None)

    def outputs_of(x: Any) -> Tensor:
        given = x if first is None else to_device(x, first.device)
        return checks.logits(model(given), "network")

    with eval_mode(model), without_gradients(model):
        yield outputs_of


def batches_of(data: Any, device: torch.device, name: str = "the labeled data") -> Iterator[tuple[Any, Tensor]]:
    """(inputs, labels) in batches on the device, from one labeled batch or an iterable of such; ``name`` is that of the
    data in errors."""
    for batch in iterated(data, name, whole := is_whole(data)):
        inputs, labels = labeled_pair(batch, batch_name(data, name))[:2]
        yield from _pieces((to_device(inputs, device), to_device(labels, device)), whole)


def input_batches(data: Any, dtype: torch.dtype, read: Callable[[Any], Any] = inputs_of) -> Iterator[Any]:
    """The inputs of data in batches, labels left out by ``read``: of a tensor, an array or a dict of these, a tuple
    that begins with such inputs, or an iterable of all these. Arrays of floating point become ``dtype``; tensors stay
    as they are."""
    whole = is_array(data) or isinstance(plain(data), dict | tuple)
    for batch in iterated(data, "the data to predict", whole):
        yield from _pieces(as_tensors(read(as_tensors(batch, dtype)), dtype, "the inputs to predict are"), whole)


def outer_batches(
    data: Any, read: Callable[[Any, str], tuple[Any, Any]], device: torch.device, name: str
) -> Iterator[tuple[Any, Any]]:
    """The inputs of a network and the batch as its loss reads it, on the device, of one labeled batch or an iterable of
    such; ``read`` makes them of a batch, whose name in errors it takes."""
    whole = is_whole(data) or isinstance(data, Tensor)
    for batch in iterated(data, name, whole):
        for piece in _pieces(to_device(plain(batch), device), whole):
            yield read(piece, name if whole else batch_name(data, name))


def iterated(data: Any, name: str, whole: bool = False) -> Iterator[Any]:
    """The batches of an iterable, or of what has them by position, or data that is ``whole`` as one; other data are
    refused."""
    try:
        batches: Iterator[Any] = iter([data] if whole else data)
    except TypeError as error:
        expected = "expected tensors, or an iterable of batches of them"
        raise MetaplError(f"{name} is {checks.described(data)}; {expected}.") from error
    return batches


def batch_name(data: Any, name: str) -> str:
    """A batch of data in errors: data that is not one pair is read as batches, and who gave it may not know that."""
    read = f"{name} is {checks.described(data)}, which is read as batches, and a batch of it"
    return name if is_whole(data) else read


def _pieces(batch: Any, whole: bool) -> Iterator[Any]:
    """A batch, or, of data that comes as a whole, batches of at most ``ROWS`` examples."""
    count = length(batch)
    if not whole or count <= ROWS:
        yield batch
    else:
        yield from (rows(batch, start, start + ROWS) for start in range(0, count, ROWS))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every submodule is in the mode that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            if type(module).train is not nn.Module.train:  # which may do more, such as merge weights
                module.train(training)
        # Each flag for itself: `model.train()` alone would wake the layers that a user has frozen in eval mode.
        for module, training in before:
            module.training = training
