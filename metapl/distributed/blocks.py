"""The parts of a network that are gathered, and checkpointed, one at a time, and how a weight is cut over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList)
"""Modules that only list others; a subclass has a purpose of its own."""


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in order: the outermost modules in its lists that have parts of their own.

    These are the residual blocks of metapl's, torchvision's and timm's convolutional networks and the layers of their
    vision transformers. A network without any, such as a plain stack of layers, is a single part.

    >>> from torch import nn
    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.linear = nn.Linear(4, 4)
    >>> len(blocks(nn.Sequential(nn.Linear(4, 4), nn.Sequential(Residual(), Residual()), nn.Linear(4, 2))))
    2
    """
    return list(_blocks(module))


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    listed = type(module) in LISTS
    for child in module.children():
        if type(child) in LISTS or not listed:
            yield from _blocks(child)
        elif any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child


def cut_dimension(shape: tuple[int, ...], parts: int) -> int:
    """The dimension along which a weight is cut: the first that divides evenly, so that nothing is padded, else 0.

    FSDP2 cuts dimension 0 and pads it to the number of parts. The position embedding of a transformer, (1, N, D), would
    then be gathered as parts·N·D numbers.

    >>> cut_dimension((1, 257, 1280), 128), cut_dimension((3, 3), 2)
    (2, 0)
    """
    return next((d for d, size in enumerate(shape) if size and size % parts == 0), 0)


def placement(parts: int) -> Callable[[nn.Parameter], Any]:
    """``shard_placement_fn`` for :func:`torch.distributed.fsdp.fully_shard` over so many ranks."""
    from torch.distributed.tensor import Shard

    def place(parameter: nn.Parameter) -> Any:
        return Shard(cut_dimension(tuple(parameter.shape), parts))

    return place
