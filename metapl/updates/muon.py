"""Muon: steps along orthogonalized momentum, of matrices alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.updates.torch_optim import State, Tensors, TorchUpdate

# What torch.optim.Muon computes its products in, whatever the type of the weights.
SHORT = torch.bfloat16


def orthogonalized(matrix: Tensor, group: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    r"""Near UVᵀ of matrix = USVᵀ, (A, B), by the iteration of Newton and Schulz, with its products in a type.

    .. math:: X_0 = M / \max(\|M\|, \epsilon), \qquad X_{k+1} = a X_k + (b G_k + c G_k^2) X_k, \quad G_k = X_k X_k^\top
    """
    (a, b, c), tall = group["ns_coefficients"], matrix.shape[0] > matrix.shape[1]
    with torch.autocast(matrix.device.type, enabled=False):
        x = matrix.to(dtype).mT if tall else matrix.to(dtype)  # (least, most) of A and B
        x = x / x.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def factor(shape: torch.Size, how: str | None) -> float:
    """What the rate of a matrix of this shape is multiplied by."""
    rows, columns = shape
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns if how == "spectral_unclamped" else max(1.0, rows / columns))


class Muon(TorchUpdate):
    r"""b′ = μb + (1−μ)g; θ′ = θ(1−ηλ) − η·factor·NS(g + μ(b′−g) | b′), with Nesterov momentum or without.

    NS is :func:`orthogonalized`. ``torch.optim.Muon`` has its products in bfloat16, whose rounding
    has no derivative; the rule, which is differentiated and verified, in the type of the weights.
    The adjoint is autograd's.

    Source: Jordan et al., 2024; ``torch.optim.Muon``, whose b is an average of gradients.
    """

    numbers = ("lr", "momentum", "weight_decay", "eps")
    is_rounded = True

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        mu, eta = group["momentum"], group["lr"]
        moved: list[Tensor] = []
        new: list[State] = []
        for p, g, state in zip(params, grads, states, strict=True):
            old = state.get("momentum_buffer")
            buffer = (1 - mu) * g if old is None else old + (1 - mu) * (g - old)
            direction = g + mu * (buffer - g) if group["nesterov"] else buffer
            step = orthogonalized(direction, group, group.get("products", p.dtype)).to(p.dtype)
            moved.append(
                p * (1 - eta * group["weight_decay"])
                - eta * factor(p.shape, group["adjust_lr_fn"]) * step
            )
            new.append({**state, "momentum_buffer": buffer})
        return moved, new

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        return {"momentum_buffer": torch.zeros_like(p), **state}


def rounded_options(options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Options of param groups by which a rule rounds as the optimizer's own step does."""
    return [{**group, "products": SHORT} for group in options]
