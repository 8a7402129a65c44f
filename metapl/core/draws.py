"""Random numbers of an estimator, as a function of a key that stands in its state.

The state of a generator of torch is no tensor of a graph, and a stack of trainings would share it.
These numbers are computed from a key by arithmetic on integers: the eager, the pure, the compiled
and the stacked step draw the same ones, whatever the networks draw besides, and a checkpoint that
holds the state holds them too.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

DrawnFor = Literal["rows", "weights"]
"""What a tensor of draws is as: one with this process's rows, or with the student's weights."""

BITS = 0xFFFFFFFF


class Draws:
    """The draws of one step.

    Args:
        key: (2,), int64: a seed, and the number of the step.
        rank: of the process, since each draws for rows of its own.
        shard: the number of the part of the weights that this process holds, since processes that
            hold the same weights draw the same for them.
    """

    def __init__(self, key: Tensor, rank: int = 0, shard: int = 0) -> None:
        stream = mixed(mixed(key[0]) + key[1])
        self._streams = {"rows": mixed(stream + rank), "weights": mixed(stream + shard)}
        self._calls = 0

    def uniform_like(self, t: Tensor, *, of: DrawnFor = "rows") -> Tensor:
        """Draw numbers between 0 and 1, and neither, in the shape and the type of ``t``.

        Args:
            of: what ``t`` is as: the rows of the batch, or the ``"weights"``, of which several
                processes may hold the same.
        """
        uniform = self._uniform(t, of).to(t.dtype)
        if not t.is_floating_point():
            return uniform
        # A type of half precision would round the greatest to 1.
        return uniform.clamp(max=1 - torch.finfo(t.dtype).eps / 2)

    def normal_like(self, t: Tensor, *, of: DrawnFor = "rows") -> Tensor:
        """Draw numbers of mean 0 and variance 1, in the shape and the type of ``t``.

        Those of a compiled step are the same to rounding.

        Args:
            of: as of :meth:`uniform_like`.
        """
        uniform = self._uniform(t, of)
        return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).to(t.dtype)

    def _uniform(self, t: Tensor, of: DrawnFor) -> Tensor:
        self._calls += 1
        stream = mixed(self._streams[of] + self._calls)
        index = torch.arange(t.numel(), device=t.device)
        bits = mixed(mixed(index) ^ stream)
        # With 23 bits and a half no number is rounded to 0 or to 1 in float32.
        dtype = torch.promote_types(t.dtype, torch.float32)
        uniform = ((bits >> 9).to(dtype) + 0.5) / 2**23
        return uniform.reshape(t.shape)


def first_key(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw a key, by this generator or by torch's default one."""
    draw_device = torch.device("cpu") if generator is None else generator.device
    seed = torch.randint(2**31, (), generator=generator, device=draw_device)
    return torch.stack([seed, torch.zeros_like(seed)]).to(device)


def next_key(key: Tensor) -> Tensor:
    """Return the key of the next step."""
    return torch.stack([key[0], key[1] + 1])


def mixed(x: Tensor) -> Tensor:
    """Return 32 bits of which each depends on all lower 32 bits of ``x``, int64.

    Shifts and products with odd factors below 2³¹, so that no product is beyond 63 bits. Source:
    the mixers of C. Wellons, hash-prospector.
    """
    x = x & BITS
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & BITS
    x = x ^ (x >> 15)
    x = (x * 0x31848BAB) & BITS
    return x ^ (x >> 14)
