"""Counter-based random numbers, which have no state.

A draw is a hash of (seed, stream, step, example, draw). The hash is five rounds of ``fold_in``,
each the output function of splitmix64 (Steele, Lea and Flood 2014) on 64 bits with wraparound.
Whatever draws this way is the same on every device, in every worker, in every batch composition and
after every restart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# 64-bit words without a sign, and numbers in float64.
Words = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1

# How many of the 64 bits a uniform draw keeps.
_PRECISIONS = {torch.float32: 24, torch.float64: 53}


def fold_in(seed: int, data: int) -> int:
    """Return an independent seed, mix(seed + (data + 1)·γ) mod 2⁶⁴.

    The mix is that of splitmix64, and γ = 0x9E3779B97F4A7C15.

    >>> fold_in(0, 0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 from 0
    True
    """
    x = (seed + (data + 1) * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """Return the int64 that has the same 64 bits as x modulo 2⁶⁴."""
    x &= _MASK
    is_negative = x >> 63
    return x - (1 << 64) if is_negative else x


def _shift_right(x: Tensor, places: int) -> Tensor:
    """Shift the bits of int64 to the right, and fill up with zeros."""
    # torch shifts int64 arithmetically; the mask removes the copies of the sign bit.
    return (x >> places) & ((1 << (64 - places)) - 1)


def _fold_in(seed: Tensor | int, data: Tensor) -> Tensor:
    """Compute ``fold_in`` elementwise on int64, whose products and sums wrap modulo 2⁶⁴."""
    if isinstance(seed, int):
        seed = _signed(seed)
    x = (data + 1) * _signed(_GOLDEN) + seed
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def _is_on_host(examples: Tensor) -> bool:
    """Return whether NumPy can read the examples."""
    return examples.device.type == "cpu"


def _fold_in_on_host(seed: Words | int, data: Words) -> Words:
    """Compute ``fold_in`` elementwise on words of the host.

    A batch has few of them, so that calls are what costs, and NumPy's take a third of the time of
    torch's.
    """
    x = data + np.uint64(1)
    x *= np.uint64(_GOLDEN)
    x = x + (np.uint64(seed & _MASK) if isinstance(seed, int) else seed)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MULTIPLIERS[0])
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MULTIPLIERS[1])
    x ^= x >> np.uint64(31)
    return x


def _bits_on_host(key: int, examples: Tensor, n: int) -> Words:
    """Return the bits of :func:`bits` for examples on the CPU, (B, n)."""
    words = examples.long().numpy().view(np.uint64)
    return _fold_in_on_host(_fold_in_on_host(key, words)[:, None], np.arange(n, dtype=np.uint64))


def bits(seed: int, step: int, examples: Tensor, n: int, stream: int = 0) -> Tensor:
    """Draw 64 random bits, (B, n) int64.

    They are fold_in(fold_in(fold_in(fold_in(seed, stream), step), example), draw).

    Args:
        seed, step, stream: any integers; ``stream`` keeps uses with the same seed and step apart.
        examples: (B,) int64, what identifies each example; equal entries draw equal bits.
        n: draws per example; a larger n continues the draws of a smaller one.
    """
    key = fold_in(fold_in(seed, stream), step)
    if _is_on_host(examples):
        return torch.from_numpy(_bits_on_host(key, examples, n).view(np.int64))
    draws = torch.arange(n, device=examples.device)
    return _fold_in(_fold_in(key, examples)[:, None], draws)


def uniform(
    seed: int,
    step: int,
    examples: Tensor,
    n: int,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from [0, 1), (B, n), the same on every device.

    The draws are ⌊bits / 2^(64−p)⌋ / 2^p with p = 24 in float32 and 53 in float64. For the
    arguments see :func:`bits`.
    """
    precision = _PRECISIONS[dtype]
    if _is_on_host(examples):
        type_on_host = np.float32 if dtype == torch.float32 else np.float64
        return torch.from_numpy(
            _uniform_on_host(seed, step, examples, n, stream, precision).astype(
                type_on_host, copy=False
            )
        )
    random_bits = bits(seed, step, examples, n=n, stream=stream)
    return _shift_right(random_bits, 64 - precision).to(dtype) * 2.0**-precision


def uniform_on_host(seed: int, step: int, examples: Tensor, n: int, stream: int = 0) -> Numbers:
    """Return the draws of :func:`uniform` in float64 as an array of NumPy, (B, n).

    Examples on a device are copied, which waits for it.
    """
    precision = _PRECISIONS[torch.float64]
    return _uniform_on_host(seed, step, examples.cpu(), n, stream, precision)


def _uniform_on_host(
    seed: int, step: int, examples: Tensor, n: int, stream: int, precision: int
) -> Numbers:
    """Return draws with so many bits, which float64 holds without rounding."""
    key = fold_in(fold_in(seed, stream), step)
    # Words have no sign that would have to be masked.
    kept_bits = _bits_on_host(key, examples, n) >> np.uint64(64 - precision)
    return kept_bits.astype(np.float64) * 2.0**-precision
