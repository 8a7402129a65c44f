"""A network's outputs on inputs that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError, few, warn
from metapl.execution import checks
from metapl.execution.batch import (
    Batch,
    Inputs,
    as_tensors,
    inputs_of,
    is_array,
    is_record_of_rows,
    is_whole,
    labeled_pair,
    length,
    plain,
    returned_by,
    rows,
    to_device,
)
from metapl.execution.checks import described, unexpected
from metapl.execution.layout import reshard
from metapl.execution.state import RandomState

# The number of examples in a pass, where data comes as one batch.
ROWS = 1024


def predict_logits(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Run a classifier over labeled batches in eval mode and without gradients.

    Args:
        model: gives logits (B, C); the batches are moved to the device of its first parameter.
        batches: pairs (x, y) with y of shape (B,); x is a tensor, or a dict or tuple of tensors.

    Returns: logits (N, C) and labels (N,), on the CPU. Every submodule is in the mode (train or
    eval) that it had. Cost: one forward pass per example; the logits of all examples in memory.

    >>> model = torch.nn.Linear(3, 2)
    >>> batch = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    >>> logits, labels = predict_logits(model, [batch])
    >>> logits.shape, labels.shape, model.training
    (torch.Size([4, 2]), torch.Size([4]), True)
    """
    return labeled_logits(model, batches)


def labeled_logits(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], finite_of: str = ""
) -> tuple[Tensor, Tensor]:
    """Return what :func:`predict_logits` does; ``finite_of`` is that of :func:`logits_of`."""
    labels: list[Tensor] = []

    def inputs() -> Iterator[Any]:
        for x, y in batches:
            labels.append(y.cpu())
            yield x

    return logits_of(model, inputs(), finite_of), torch.cat(labels)


def logits_of(model: nn.Module, inputs: Iterable[Any], finite_of: str = "") -> Tensor:
    """Return the logits (N, C) of batches of inputs, on the CPU.

    The rest is as in :func:`predict_logits`.

    Args:
        finite_of: what an error calls the batches if logits are NaN or infinite; empty: they may.
    """
    logits = []
    with passes(model) as outputs_of:
        for x in inputs:
            logits_BC = outputs_of(x).cpu()
            if finite_of and logits_BC.ndim == 2 and logits_BC.shape[1] > 1:
                finite(logits_BC, x, finite_of)
            logits.append(logits_BC)
    if len({t.shape[1:] for t in logits}) != 1:
        shapes = few(tuple(t.shape) for t in logits) or "no shape"
        raise MetaplError(f"the network's outputs have {shapes}; expected rows of one shape.")
    return torch.cat(logits)


def finite(logits_NC: Tensor, inputs: Any = None, name: str = "") -> None:
    """Refuse logits that are NaN or infinite; the host waits for the answer.

    Args:
        inputs: of the logits, by which an error says what is not finite; None: they are not known.
        name: of the inputs.
    """
    if not logits_NC.isfinite().all():
        # It is loaded where it is used.
        from metapl.execution.failed_steps import what_is_unsound

        text = "the logits of some examples are not finite; the model diverged."
        raise MetaplError(what_is_unsound(inputs, name, text) or text)


@contextmanager
def passes(model: nn.Module) -> Iterator[Callable[[Inputs], Tensor]]:
    """Give a function from inputs to the network's outputs, in eval mode and without gradients."""
    first_parameter = next(model.parameters(), None)

    def outputs_of(inputs: Inputs) -> Tensor:
        device = torch.device("cpu")
        if first_parameter is not None:
            device = first_parameter.device
            inputs = to_device(inputs, device)
        random = RandomState.now(device)
        outputs = checks.logits(returned_by(model, inputs, "network"), "network")
        refuse_one_example(inputs, outputs)
        if not RandomState.now(device).equals(random):
            warn(
                f"{type(model).__name__} draws random numbers in eval() too, so that its "
                "predictions are others in each pass; expected dropout and noise in training "
                "alone, such as F.dropout(x, p, training=self.training), unless that is meant",
            )
        return outputs

    try:
        # Not inference mode: what a module keeps of it can have no gradient later.
        with evaluating(model), torch.no_grad():
            yield outputs_of
    finally:
        reshard(model)


def refuse_one_example(inputs: Inputs, outputs: Tensor) -> None:
    """Refuse a vector as a batch, whose outputs are those of one example."""
    if not isinstance(inputs, Tensor) or 1 not in (inputs.ndim, outputs.ndim):
        return
    if len(inputs) != len(outputs):
        raise MetaplError(
            f"the network was given {described(inputs)} as a batch, and returned "
            f"{described(outputs)}; expected a row for each example, such as x[None] of one."
        )


def outer_batches(
    data: Any, read: Callable[[Any, str], tuple[Any, Any]], device: torch.device, name: str
) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs of a network and the batch as its loss reads it, on the device.

    ``data`` is a labeled batch or an iterable of such. ``read`` makes the inputs and the batch of a
    batch and its name.
    """
    is_one_batch = is_whole(data) or isinstance(data, Tensor)
    name_of_batch = name if is_one_batch else f"a batch of {name}"
    for batch in _batches(data, is_one_batch=is_one_batch):
        yield read(to_device(batch, device), name_of_batch)


def batches_of(
    data: Any, device: torch.device, name: str = "the labeled data"
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (inputs, labels) on the device, from one labeled batch or an iterable of such."""

    def read(batch: Batch, name_of_batch: str) -> tuple[Any, Tensor]:
        inputs, labels, *_ = labeled_pair(batch, name_of_batch)
        return inputs, labels

    return outer_batches(data, read, device=device, name=name)


def input_batches(
    data: Any, dtype: torch.dtype, read: Callable[[Any], Any] = inputs_of
) -> Iterator[Any]:
    """Yield the inputs of data in batches, labels left out by ``read``.

    Arrays of floating point become ``dtype``.
    """
    is_mapping_or_tuple = isinstance(plain(data), dict | tuple)
    is_one_batch = is_array(data) or is_mapping_or_tuple or is_record_of_rows(data)
    if is_one_batch:
        data = as_tensors(data, dtype)
    for batch in _batches(data, is_one_batch=is_one_batch):
        inputs = read(as_tensors(batch, dtype))
        yield as_tensors(inputs, dtype, subject="the inputs to predict are")


def _batches(data: Any, *, is_one_batch: bool) -> Iterator[Any]:
    """Yield the batches of an iterable as they are, or one batch in pieces of ``ROWS`` examples."""
    if not is_one_batch:
        if not isinstance(data, Iterable):
            # It is loaded where it is used.
            from metapl.data import StepBatches

            # Python also iterates over the examples of a data set, which are no batches.
            if not isinstance(data, StepBatches):
                raise unexpected("the data is", data, "a batch, a DataLoader, or a list of batches")
        yield from data
        return
    batch = plain(data)
    count = length(batch)
    if count <= ROWS:
        yield batch
        return
    for start in range(0, count, ROWS):
        yield rows(batch, start, start + ROWS)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation in this block.

    Afterwards every submodule trains or evaluates as it did before.
    """
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in training_flags:
            # A `train` of its own may do more, such as merge weights.
            if type(module).train is not nn.Module.train:
                module.train(training)
        # Each flag for itself: `model.train()` alone would wake the layers that a user has frozen
        # in eval mode.
        for module, training in training_flags:
            module.training = training
