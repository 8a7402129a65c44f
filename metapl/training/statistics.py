"""The running statistics of batch norm, estimated again on pictures as they are predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metapl.errors import MetaplError
from metapl.execution.batch import to_device


def trained_batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms whose running statistics move in training; those of frozen parts stay.

    The network is in training mode.
    """
    norms: list[_BatchNorm] = []
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.training:
            norms.append(module)
    return norms


@torch.no_grad()
def estimate_statistics(network: nn.Module, batches: Iterable[Tensor]) -> bool:
    """Give batch norm the statistics of these pictures: their mean and variance over all batches.

    In training it saw augmented pictures, whose statistics are others: with those, a network that
    predicts pictures as they are is several points worse, and prefers some classes.

    Args:
        network: its batch norms take the mean of the batches' statistics, as in training mode;
            everything else runs as in evaluation, without noise. Its modes are put back.
        batches: pictures (B, C, H, W), each batch of two or more.

    Returns: whether there was any batch norm to be estimated. Cost: a forward pass a picture.
    """
    modes = {module: module.training for module in network.modules()}
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
                count += 1
        if norms and not count:
            expected = "one batch or more, each time that they are read"
            raise MetaplError(f"batch_norm had no batches of inputs; expected {expected}.")
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return bool(norms)


@contextmanager
def estimated_statistics(network: nn.Module, batches: Iterable[Tensor]) -> Iterator[nn.Module]:
    """Give batch norm the statistics of these pictures in a block, and then those of before."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    buffers = [t for norm in norms for t in norm.buffers(recurse=False)]
    before = [t.clone() for t in buffers]
    try:
        estimate_statistics(network, batches)
        yield network
    finally:
        for t, value in zip(buffers, before, strict=True):
            t.copy_(value)
