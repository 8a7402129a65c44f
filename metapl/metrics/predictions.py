"""A network's outputs on inputs that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.batch import (
    as_tensors,
    inputs_of,
    is_array,
    is_record_of_rows,
    is_whole,
    labeled_pair,
    length,
    plain,
    rows,
    to_device,
)
from metapl.execution.layout import reshard

ROWS = 1024  # examples in a pass, where data comes as a whole


def predict_logits(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Runs a classifier over labeled batches in eval mode and without gradients.

    Args:
        model: gives logits (B, C); the batches are moved to the device of its first parameter.
        batches: pairs (x, y) with y of shape (B,); x is a tensor, or a dict or tuple of tensors.

    Returns: logits (N, C) and labels (N,), on the CPU. Every submodule is in the mode (train or
    eval) that it had. Cost: one forward pass per example; the logits of all examples in memory.

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

    return logits_of(model, inputs()), torch.cat(labels)


def logits_of(model: nn.Module, inputs: Iterable[Any]) -> Tensor:
    """The logits (N, C) of batches of inputs, on the CPU.

    The rest is as in :func:`predict_logits`.
    """
    with passes(model) as outputs_of:
        logits = [outputs_of(x).cpu() for x in inputs]
    if len({t.shape[1:] for t in logits}) != 1:
        shapes = few(tuple(t.shape) for t in logits) or "none, for there are no batches"
        raise MetaplError(
            f"the network's outputs have the shapes {shapes}; expected rows of one shape."
        )
    return torch.cat(logits)


@contextmanager
def passes(model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
    """A function from inputs to the network's outputs on them, in eval mode and without gradients."""
    first = next(model.parameters(), None)
    try:
        with (
            eval_mode(model),
            torch.no_grad(),
        ):  # what a module keeps of inference mode has no gradient
            yield lambda x: checks.logits(
                model(x if first is None else to_device(x, first.device)), "network"
            )
    finally:
        reshard(model)


def outer_batches(
    data: Any, read: Callable[[Any, str], tuple[Any, Any]], device: torch.device, name: str
) -> Iterator[tuple[Any, Any]]:
    """The inputs of a network and the batch as its loss reads it, on the device, of a labeled batch
    or an iterable of such; ``read`` makes them of a batch and its name."""
    whole = is_whole(data) or isinstance(data, Tensor)
    for batch in _batches(data, whole):
        yield read(to_device(batch, device), name if whole else f"a batch of {name}")


def batches_of(
    data: Any, device: torch.device, name: str = "the labeled data"
) -> Iterator[tuple[Any, Tensor]]:
    """(inputs, labels) in batches on the device, from one labeled batch or an iterable of such."""
    return outer_batches(data, lambda batch, of: labeled_pair(batch, of)[:2], device, name)


def input_batches(
    data: Any, dtype: torch.dtype, read: Callable[[Any], Any] = inputs_of
) -> Iterator[Any]:
    """The inputs of data in batches, labels left out by ``read``.

    Arrays of floating point become ``dtype``.
    """
    whole = is_array(data) or isinstance(plain(data), dict | tuple) or is_record_of_rows(data)
    for batch in _batches(as_tensors(data, dtype) if whole else data, whole):
        yield as_tensors(read(as_tensors(batch, dtype)), dtype, "the inputs to predict are")


def _batches(data: Any, whole: bool) -> Iterator[Any]:
    """The batches of an iterable, or of data that comes as a ``whole``, in batches of at most ``ROWS`` examples."""
    for batch in [plain(data)] if whole else data:
        count = length(batch) if whole else 0
        if count <= ROWS:
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
            if (
                type(module).train is not nn.Module.train
            ):  # which may do more, such as merge weights
                module.train(training)
        # Each flag for itself: `model.train()` alone would wake the layers that a user has frozen
        # in eval mode.
        for module, training in before:
            module.training = training
