"""Operations on lists of tensors: PyTorch's fused kernels, or one tensor after another.

A fused operation is a few kernels for all weights of a param group. Neither transforms of
``torch.func`` nor factors that are tensors go through it, so there the same arithmetic is done one
tensor after another. The two forms have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.execution.checks import transformed

Tensors = Sequence[Tensor]

# One factor for all tensors of a list, or one for each of them.
Factors = Sequence[Any] | Tensor | float


def _on_lists(
    operation: Callable[[Any, Any], Tensor], fused: Callable[..., Any]
) -> Callable[[Tensors, Factors], Any]:
    def apply(tensors: Tensors, factors: Factors) -> Any:
        if not (transformed() or isinstance(factors, Tensor)):
            return fused(tensors, factors)
        if not isinstance(factors, list | tuple):
            factors = [factors] * len(tensors)
        return [operation(t, factor) for t, factor in zip(tensors, factors, strict=True)]

    return apply


mul = _on_lists(torch.mul, torch._foreach_mul)
div = _on_lists(torch.div, torch._foreach_div)
sub = _on_lists(torch.sub, torch._foreach_sub)
plus = _on_lists(torch.add, torch._foreach_add)


def add(a: Tensors, b: Tensors, alpha: Any = 1.0) -> Any:
    """Return a + alpha·b, tensor by tensor."""
    if transformed() or isinstance(alpha, Tensor):
        return plus(a, mul(b, alpha))
    fused: Any = torch._foreach_add
    return fused(a, b, alpha=alpha)


def add_and_mul(*factors: Any) -> tuple[Any, Any]:
    """Return :func:`add` and :func:`mul` for these factors, looked at once for many operations.

    They are PyTorch's own fused ones where no factor is a tensor and no transform runs.
    """
    if transformed():
        return add, mul
    for factor in factors:
        if isinstance(factor, Tensor):
            return add, mul
    return torch._foreach_add, torch._foreach_mul


def is_set(setting: Any) -> bool:
    """Return whether a number of a param group counts as another than 0.

    A number in a tensor always does: its value may be differentiated, or unknown to a compiler.
    """
    return isinstance(setting, Tensor) or setting != 0
