"""Muon: steps along orthogonalized momentum, of matrices alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.updates.lists import Tensors
from metapl.updates.torch_optim import State, TorchUpdate

# torch.optim.Muon computes its products in this type, whatever the type of the weights.
PRODUCT_DTYPE = torch.bfloat16


def orthogonalized(matrix: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    r"""Return a matrix near UVᵀ for matrix = USVᵀ, (A, B), by the iteration of Newton and Schulz.

    .. math:: X_0 = M / \max(\|M\|, \epsilon), \qquad
              X_{k+1} = a X_k + (b G_k + c G_k^2) X_k, \quad G_k = X_k X_k^\top

    Args:
        group: has (a, b, c) as ``ns_coefficients``, ``ns_steps``, and ``eps``.
        dtype: in which the products are taken, and returned.
    """
    a, b, c = group["ns_coefficients"]
    is_tall = matrix.shape[0] > matrix.shape[1]
    with torch.autocast(matrix.device.type, enabled=False):
        x = matrix.to(dtype)
        if is_tall:
            # The products X Xᵀ are then of the shorter side.
            x = x.mT
        x = x / x.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def rate_factor(shape: torch.Size, rule: str | None) -> float:
    """Return what the rate of a matrix of this shape is multiplied by.

    Args:
        rule: the ``adjust_lr_fn`` of torch.optim.Muon; None: ``"original"``.
    """
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if rule == "spectral_unclamped":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1.0, rows / columns))


class Muon(TorchUpdate):
    r"""b′ = μb + (1−μ)g; θ′ = θ(1−ηλ) − η·factor·NS(d), with d = g + μ(b′−g) or d = b′.

    The first d is with Nesterov momentum, the second without. NS is :func:`orthogonalized`, and the
    factor :func:`rate_factor`. ``torch.optim.Muon`` has its products in bfloat16, whose rounding
    has no derivative; the rule, which is differentiated and verified, has them in the type of the
    weights. The adjoint is autograd's.

    Source: Jordan et al., 2024; ``torch.optim.Muon``, whose b is an average of gradients.
    """

    numbers = ("lr", "momentum", "weight_decay", "eps")
    is_rounded = True

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        mu = group["momentum"]
        rate = group["lr"]
        new_params: list[Tensor] = []
        new_states: list[State] = []
        for p, g, state in zip(params, grads, states, strict=True):
            old_buffer = state.get("momentum_buffer")
            if old_buffer is None:
                buffer = (1 - mu) * g
            else:
                buffer = old_buffer + (1 - mu) * (g - old_buffer)
            direction = g + mu * (buffer - g) if group["nesterov"] else buffer
            product_dtype = group.get("products", p.dtype)
            step = orthogonalized(direction, group, dtype=product_dtype).to(p.dtype)
            factor = rate_factor(p.shape, group["adjust_lr_fn"])
            new_params.append(p * (1 - rate * group["weight_decay"]) - rate * factor * step)
            new_states.append({**state, "momentum_buffer": buffer})
        return new_params, new_states

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        return {"momentum_buffer": torch.zeros_like(p), **state}


def rounded_options(options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return options of param groups by which a rule rounds as the optimizer's own step does."""
    return [{**group, "products": PRODUCT_DTYPE} for group in options]
