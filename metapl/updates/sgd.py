"""``torch.optim.SGD``, with its adjoint in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.execution.numerics import Tree
from metapl.updates.base import Cotangents
from metapl.updates.torch_optim import State, States, Tensors, TorchUpdate


class SGD(TorchUpdate):
    r"""d = ±g + λθ; b′ = μb + (1−τ)d (the first time: b′ = d); θ′ = θ − η·(d + μb′ | b′ | d).

    The three cases are Nesterov momentum, momentum, and none. The update is linear, so its adjoint does not depend on
    the values. With c = 1 the first time and 1−τ later, and :math:`\bar\theta', \bar b'` the cotangents of θ′ and b′:

    .. math:: \bar d = -\eta\,(1 + \mu c \mid c \mid 1)\,\bar\theta' + c\,\bar b', \quad
              w = \pm\bar d, \quad \bar\theta = \bar\theta' + \lambda\,\bar d, \quad
              \bar b = -\eta\mu\,(\mu \mid 1)\,\bar\theta' + \mu\,\bar b'
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
            sign = -1.0 if group["maximize"] else 1.0
            slopes = [_scaled(sign * _slope(state[name], group), group["lr"], v[name]) for name in names]
            w.update(zip(names, torch._foreach_mul([v[name] for name in names], slopes), strict=True))
        return {name: w[name] for name in grads}

    def vjp(self, params: Tree, grads: Tree, state: States, v: Tree, state_cotangent: Any = None) -> Cotangents:
        w, theta_bar, buffer_bar = {}, dict(v), {}
        for group, names in self.groups(grads):
            mu, sign = group["momentum"], -1.0 if group["maximize"] else 1.0
            for name in names:
                d_bar = v[name] * _scaled(_slope(state[name], group), group["lr"], v[name])
                later = None if state_cotangent is None else state_cotangent.get(name)
                if later is not None:
                    d_bar = d_bar + _share(state[name], group) * later
                w[name] = sign * d_bar
                if group["weight_decay"] != 0:
                    theta_bar[name] = v[name] + group["weight_decay"] * d_bar
                if mu != 0 and state[name].get("momentum_buffer") is not None:
                    direct = -mu * (mu if group["nesterov"] else 1.0)
                    bar = v[name] * _scaled(direct, group["lr"], v[name])
                    buffer_bar[name] = bar if later is None else bar + mu * later
        # A parameter without a gradient did not move, nor did its buffer.
        buffer_bar |= {name: later for name, later in (state_cotangent or {}).items() if name not in grads}
        return Cotangents({name: w[name] for name in grads}, theta_bar, buffer_bar)


def _momentum(d: Tensors, buffers: list[Tensor | None], group: dict[str, Any]) -> Tensors:
    mu, damped = group["momentum"], 1 - group["dampening"]
    old = [b for b in buffers if b is not None]
    if len(old) == len(buffers):
        return torch._foreach_add(torch._foreach_mul(old, mu), d, alpha=damped)
    return [d_i if b is None else mu * b + damped * d_i for d_i, b in zip(d, buffers, strict=True)]


def _share(state: State, group: dict[str, Any]) -> float:
    """c, the share of d in b′."""
    return 1.0 if state.get("momentum_buffer") is None else 1.0 - float(group["dampening"])


def _slope(state: State, group: dict[str, Any]) -> float:
    """The derivative of θ′ in d, in units of η."""
    mu = group["momentum"]
    if mu == 0:
        return -1.0
    c = _share(state, group)
    return -(1.0 + mu * c) if group["nesterov"] else -c


def _scaled(factor: float, lr: float | Tensor, like: Tensor) -> Any:
    """factor·η, on the device of ``like`` where η is a tensor."""
    return (lr * factor).to(like) if isinstance(lr, Tensor) else lr * factor
