"""Attention within transforms of torch.func, as it is without one.

Within a transform PyTorch takes ``F.scaled_dot_product_attention`` apart before it chooses a
kernel, and before a region of autocast has cast its arguments. So attention would run by its
formula alone, in products of half precision around a softmax of float32, and some releases have no
derivative of that mixture. Here the arguments are cast first, as autocast does it for the whole
function, and the fused kernels are called behind a ``torch.autograd.Function``, which transforms
leave in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from metapl.execution.numerics import takes_formulas

BY_PYTORCH: Any = F.scaled_dot_product_attention


class AttentionInOnePiece(TorchFunctionMode):
    """Run attention in this block by the kernels that it has without a transform.

    Args:
        is_derived_once: whether nothing in the block takes a second derivative of attention, nor a
            derivative forward, but where :func:`takes_formulas` says so. Only then may its fused
            kernels run, which have neither.
    """

    def __init__(self, *, is_derived_once: bool) -> None:
        super().__init__()
        self.is_derived_once = is_derived_once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func is BY_PYTORCH:
            return self.attend(*args, **keywords)
        if func is F.multi_head_attention_forward:
            with self.within_layers():
                return func(*args, **keywords)
        return func(*args, **keywords)

    @contextmanager
    def within_layers(self) -> Iterator[None]:
        """Attend so in PyTorch's attention layers too, which no mode sees into.

        They find the function by its name.
        """
        F.scaled_dot_product_attention = self.attend
        try:
            yield
        finally:
            F.scaled_dot_product_attention = BY_PYTORCH

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend as ``torch.nn.functional.scaled_dot_product_attention``, of these arguments."""
        place = query.device.type
        if torch.is_autocast_enabled(place):
            dtype = torch.get_autocast_dtype(place)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        # A mask of numbers may be learned, and the Function below has no gradient for it.
        has_plain_mask = attn_mask is None or attn_mask.dtype is torch.bool
        is_fused = self.is_derived_once and has_plain_mask and dropout_p == 0
        with torch.autocast(place, enabled=False):
            if is_fused and not takes_formulas():
                attended: Tensor = FusedAttention.apply(
                    query, key, value, attn_mask, is_causal, scale, enable_gqa
                )
                return attended
            by_formula: Tensor = BY_PYTORCH(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            return by_formula


class FusedAttention(torch.autograd.Function):
    """Attention by the kernel that PyTorch chooses without a transform.

    Its backward pass runs the kernel once more, so that no version's own outputs, such as the sums
    of the softmax, are passed around.
    """

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        return fused(query, key, value, mask, is_causal, scale, enable_gqa)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, mask, *options = inputs
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradients = FusedAttentionBackward.apply(*grads, *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, None)


class FusedAttentionBackward(torch.autograd.Function):
    """The gradients of attention in query, key and value. They have no derivative."""

    @staticmethod
    def forward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = tuple(t.detach().requires_grad_() for t in (query, key, value))
            arguments: tuple[Any, ...] = (*leaves, mask, *options)
            attended = fused(*arguments)
        return torch.autograd.grad(attended, leaves, grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError("the fused kernels of attention have no second derivative")


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Return what PyTorch's own function returns, past the modes that are active."""
    with torch._C.DisableTorchFunction():
        attended: Tensor = BY_PYTORCH(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return attended
