"""The running statistics of batch norm, estimated again on pictures as they are predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metapl.errors import MetaplError
from metapl.execution.batch import to_device
from metapl.execution.checks import unexpected
from metapl.execution.state import RandomState, replayed


def trained_batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms whose running statistics move, in the modes as they are."""
    norms: list[_BatchNorm] = []
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training:
            norms.append(module)
    return norms


def refuse_other_inputs(batches: Any, dtype: torch.dtype) -> None:
    """Refuse what no statistics can be estimated of, by its first batch.

    Args:
        dtype: of the network's weights.

    Raises: :class:`metapl.MetaplError`.
    """
    expected = f"batches of inputs (B, ...) in {dtype}, two rows or more, to be read again"
    if isinstance(batches, Iterator | Tensor | str) or not isinstance(batches, Iterable):
        raise unexpected("batch_norm is", batches, expected)
    with replayed(RandomState.now(torch.device("cpu"))):
        first = next(iter(batches), None)
    if first is None:
        raise MetaplError(f"batch_norm has no batches; expected {expected}.")
    if not isinstance(first, Tensor) or first.dtype != dtype or len(first) < 2:
        raise unexpected("batch_norm has the batch", first, expected)
    if not bool(first.isfinite().all()):
        raise MetaplError("batch_norm has a batch with NaN or infinite numbers; expected finite.")


@torch.no_grad()
def estimate_statistics(
    network: nn.Module, batches: Iterable[Tensor], norms: Sequence[_BatchNorm] | None = None
) -> bool:
    """Give batch norm the statistics of these pictures: their mean and variance over all batches.

    In training it saw augmented pictures, whose statistics are others: with those, a network that
    predicts pictures as they are is several points worse, and prefers some classes.

    Args:
        network: its batch norms take the mean of the batches' statistics, as in training mode;
            everything else runs as in evaluation, without noise. Its modes are put back.
        batches: pictures (B, C, H, W), each batch of two or more.
        norms: whose statistics are estimated; default: those that train where the network does.

    Returns: whether there was any batch norm to be estimated. Cost: a forward pass a picture.
    """
    modes = {module: module.training for module in network.modules()}
    if norms is None:
        norms = trained_batch_norms(network.train())
    momenta = [norm.momentum for norm in norms]
    device = next(network.parameters()).device
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            # None: each batch counts alike.
            norm.momentum = None
            norm.train()
        count = 0
        if norms:
            for pictures in batches:
                network(to_device(pictures, device))
                count += len(pictures)
        if norms and count < 2:
            expected = "two or more, each time that they are read"
            raise MetaplError(f"batch_norm had {count} rows of inputs; expected {expected}.")
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return bool(norms)


@contextmanager
def estimated_statistics(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[nn.Module]:
    """Give batch norm the statistics of these pictures in a block, and then those of before.

    Norms in evaluation mode have theirs. No generator moves.
    """
    norms = trained_batch_norms(network)
    buffers = [t for norm in norms for t in norm.buffers(recurse=False)]
    before = [t.clone() for t in buffers]
    try:
        with replayed(RandomState.now(next(network.parameters()).device)):
            estimate_statistics(network, batches, norms)
        yield network
    finally:
        for t, value in zip(buffers, before, strict=True):
            t.copy_(value)
