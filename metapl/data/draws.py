"""Counter-based random numbers: a draw is a hash of (seed, stream, step, example, draw), and nothing has a state.

The hash is five rounds of ``fold_in``, each the output function of splitmix64 (Steele, Lea and
Flood 2014) on 64 bits with wraparound. Whatever draws this way is the same on every device, in
every worker, in every batch composition and after every restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def fold_in(seed: int, data: int) -> int:
    """An independent seed: mix(seed + (data + 1)·γ) mod 2⁶⁴, with splitmix64's mix and γ = 0x9E3779B97F4A7C15.

    >>> fold_in(0, 0) == 0xE220A8397B1DCDAF  # the first output of splitmix64 from 0
    True
    """
    x = (seed + (data + 1) * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, places: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask removes the copies of the sign bit.
    return (x >> places) & ((1 << (64 - places)) - 1)


def _fold_in(seed: Tensor | int, data: Tensor) -> Tensor:
    """``fold_in`` elementwise on int64, whose products and sums wrap modulo 2⁶⁴."""
    x = (data + 1) * _signed(_GOLDEN) + (_signed(seed) if isinstance(seed, int) else seed)
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, 31)


def bits(seed: int, step: int, examples: Tensor, n: int, stream: int = 0) -> Tensor:
    """64 random bits, fold_in(fold_in(fold_in(fold_in(seed, stream), step), example), draw), (B, n) int64.

    Args:
        seed, step, stream: any integers; ``stream`` keeps uses with the same seed and step apart.
        examples: (B,) int64, what identifies each example; equal entries draw equal bits.
        n: draws per example; a larger n continues the draws of a smaller one.
    """
    key = fold_in(fold_in(seed, stream), step)
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
    """Draws from [0, 1), (B, n): ⌊bits / 2^(64−p)⌋ / 2^p with p = 24 in float32 and 53 in float64,
    the same on every device; for the arguments see :func:`bits`."""
    precision = {torch.float32: 24, torch.float64: 53}[dtype]
    return (
        _shift_right(bits(seed, step, examples, n, stream), 64 - precision).to(dtype)
        * 2.0**-precision
    )
