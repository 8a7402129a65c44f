"""Arithmetic on lists of tensors: PyTorch's fused operations on the eager road, tensor by tensor where a transform
traces it (``vmap`` has no rules for the fused ones, and a compiler fuses by itself)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.execution.checks import transformed

Tensors = Sequence[Tensor]
Factors = Sequence[Any] | Tensor | float  # one for all, or one for each


def _lifted(operation: Callable[[Any, Any], Tensor], fused: Callable[..., Any]) -> Callable[[Tensors, Factors], Any]:
    def apply(a: Tensors, b: Factors) -> Any:
        if not (transformed() or isinstance(b, Tensor)):
            return fused(a, b)
        several = b if isinstance(b, list | tuple) else [b] * len(a)
        return [operation(x, y) for x, y in zip(a, several, strict=True)]

    return apply


mul = _lifted(torch.mul, torch._foreach_mul)
div = _lifted(torch.div, torch._foreach_div)
sub = _lifted(torch.sub, torch._foreach_sub)
plus = _lifted(torch.add, torch._foreach_add)


def add(a: Tensors, b: Tensors, alpha: Any = 1.0) -> Any:
    """a + alpha b."""
    if transformed() or isinstance(alpha, Tensor):
        return plus(a, mul(b, alpha))
    fused: Any = torch._foreach_add
    return fused(a, b, alpha=alpha)
