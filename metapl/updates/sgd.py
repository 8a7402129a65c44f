"""``torch.optim.SGD``, with its pullback in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.execution.numerics import Tree
from metapl.updates.torch_optim import State, States, Tensors, TorchUpdate


class SGD(TorchUpdate):
    r"""d = ±g + λθ; b′ = μb + (1−τ)d (the first time: b′ = d); θ′ = θ − η·(d + μb′ | b′ | d).

    The three cases are Nesterov momentum, momentum, and none. The update is linear, so its pullback does not depend on
    the values. With c = 1 the first time and 1−τ later:

    .. math:: w = \mp\eta\,(1 + \mu c \mid c \mid 1)\, v
    """

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
        d = torch._foreach_add(d, params, alpha=group["weight_decay"]) if group["weight_decay"] != 0 else d
        mu = group["momentum"]
        if mu != 0:
            buffers = _momentum(d, [state.get("momentum_buffer") for state in states], group)
            states = [{**state, "momentum_buffer": b} for state, b in zip(states, buffers, strict=True)]
            d = torch._foreach_add(d, buffers, alpha=mu) if group["nesterov"] else buffers
        return torch._foreach_sub(params, torch._foreach_mul(d, group["lr"])), list(states)

    def pullback(self, params: Tree, grads: Tree, state: States, v: Tree) -> Tree:
        w: Tree = {}
        for group, names in self.groups(grads):
            mu, lr, sign = group["momentum"], group["lr"], -1.0 if group["maximize"] else 1.0
            slopes = []
            for name in names:
                c = 1.0 if state[name].get("momentum_buffer") is None else 1.0 - float(group["dampening"])
                slope = sign * -(1.0 if mu == 0 else 1.0 + mu * c if group["nesterov"] else c)
                slopes.append((lr * slope).to(v[name]) if isinstance(lr, Tensor) else lr * slope)
            w.update(zip(names, torch._foreach_mul([v[name] for name in names], slopes), strict=True))
        return {name: w[name] for name in grads}


def _momentum(d: Tensors, buffers: list[Tensor | None], group: dict[str, Any]) -> Tensors:
    mu, damped = group["momentum"], 1 - group["dampening"]
    old = [b for b in buffers if b is not None]
    if len(old) == len(buffers):
        return torch._foreach_add(torch._foreach_mul(old, mu), d, alpha=damped)
    return [d_i if b is None else mu * b + damped * d_i for d_i, b in zip(d, buffers, strict=True)]
