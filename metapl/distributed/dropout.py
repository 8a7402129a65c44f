r"""Dropout with the masks of the whole batch, whichever process computes which of its rows.

A mask is a function of a key, which is drawn from the default generator, and of the place of a number in the whole
batch: its row there, its channel, its pixel. So processes whose default generators are in the same state drop what one
process would drop, however rows, products or weights are shared among them:

.. math:: m_{ik} = \mathbb 1[\mathrm{hash}(\mathrm{key}, i, k) \ge p], \quad i \text{ the row in the whole batch}

With micro-batches a key is drawn for each of them, so that their number changes the masks, as it does in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metapl.data.draws import hashed
from metapl.execution.modules import drop_rate, may_drop_by_function, named_parts

_BITS = 31  # of the numbers that a probability is compared with


def keyed_dropout(network: nn.Module, share: int = 0) -> nn.Module:
    """Let the masks of a network's dropout not depend on how it is laid out.

    Replaced, where they are, are ``nn.Dropout``, ``Dropout1d``, ``Dropout2d``, ``Dropout3d``, torchvision's
    ``StochasticDepth`` of rows and timm's ``DropPath``. Call it before :func:`metapl.distributed.shard`, with this
    process's ``mesh.share``, and seed the default generators of all processes alike.

    Cost: some ten passes over 64-bit numbers, one for each that may be dropped.

    >>> network = keyed_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    >>> network[1]
    KeyedDropout(p=0.5)
    """
    for _, part in named_parts(network):
        for name, layer in part._modules.items():
            if (keyed := _keyed(layer, share)) is not None:
                part._modules[name] = keyed
    return network


def drops_by_itself(network: nn.Module) -> bool:
    """Whether a network drops something by the default generator of its process, row after row, as far as its layers
    and their ``drop_rate`` tell."""
    layers, by_function = _dropping(network)
    return bool(layers) or by_function


def can_be_keyed(network: nn.Module) -> bool:
    """Whether :func:`keyed_dropout` has a form for everything that a network drops; dropout that is called as a
    function, as in some of timm's networks, has none."""
    layers, by_function = _dropping(network)
    return not by_function and all(_keyed(layer, 0) is not None for layer in layers)


def _dropping(network: nn.Module) -> tuple[list[nn.Module], bool]:
    parts = [part for _, part in named_parts(network)]
    layers = [part for part in parts if drop_rate(part) and not isinstance(part, KeyedDropout)]
    return layers, any(map(may_drop_by_function, parts))


class KeyedDropout(nn.Module):
    """Dropout, with probability ``p``, by a key and the places of numbers in the whole batch, of which this process has
    the ``share`` of this number.

    All numbers from the dimension ``shared_from`` on share a mask: 2 for whole channels, 1 for whole rows, None for
    none. ``scaled``: what is kept is divided by 1 - p.
    """

    part: int = 0  # of the last dimension, that this process has
    parts: int = 1
    of_images: bool = False  # whether images alone are cut

    def __init__(self, p: float, share: int = 0, shared_from: int | None = None, scaled: bool = True) -> None:
        super().__init__()
        self.p, self.share, self.shared_from, self.scaled = p, share, shared_from, scaled

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        shape = list(x.shape)
        if self.shared_from is not None:
            shape[self.shared_from :] = [1] * (x.ndim - self.shared_from)
        cut = not self.of_images or (x.ndim == 4 and x.shape[-1] > 1)
        part, parts = (self.part, self.parts) if cut else (0, 1)
        *outer, last = shape
        rows = math.prod(outer)
        row = torch.arange(rows, device=x.device) + self.share * rows
        column = torch.arange(last, device=x.device) + part * last
        places = (row[:, None] * (last * parts) + column).view(shape)  # in the whole batch
        kept = hashed(int(torch.randint(2**62, ())), places, _BITS)
        mask = (kept >= int(self.p * 2**_BITS)).to(x.dtype)
        return x * (mask / (1 - self.p) if self.scaled and self.p < 1 else mask)


def _keyed(layer: Any, share: int) -> KeyedDropout | None:
    """What drops the same share as a layer, by places; None for one that drops nothing, or in another way."""
    known: dict[Any, tuple[bool, int | None]] = {
        nn.Dropout: (True, None),
        **dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), (True, 2)),
        "StochasticDepth": (getattr(layer, "mode", None) == "row", 1),
        "DropPath": (hasattr(layer, "scale_by_keep"), 1),
    }
    kind, rate = type(layer), 0.0 if layer is None else drop_rate(layer)
    takes, shared_from = known.get(kind, known.get(kind.__name__, (False, None)))
    return KeyedDropout(rate, share, shared_from, getattr(layer, "scale_by_keep", True)) if rate and takes else None
