"""SGD, with its adjoint in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.execution.numerics import HALF, Tree
from metapl.updates.base import Cotangents, OptimizerState, Options, cotangents_of
from metapl.updates.lists import Tensors, add, add_and_mul, is_set, mul, plus
from metapl.updates.torch_optim import State, States, TorchUpdate

BUFFER = "momentum_buffer"


class SGD(TorchUpdate):
    r"""d = ±g + λθ; b′ = μb + (1−τ)d (the first time: b′ = d); θ′ = θ − η·(d + μb′ | b′ | d).

    The three cases are Nesterov momentum, momentum, and none. The update is linear, so its pullback
    does not depend on the values. With c = 1 the first time and 1−τ later:

    .. math:: w = \mp\eta\,(1 + \mu c \mid c \mid 1)\, v
    """

    numbers = ("lr", "momentum", "dampening", "weight_decay")

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        mu = group["momentum"]
        damped = 1 - group["dampening"]
        decay = group["weight_decay"]
        rate = group["lr"]
        add_lists, mul_lists = add_and_mul(mu, damped, decay, rate)

        d: Tensors = grads
        if group["maximize"]:
            d = mul_lists(grads, -1.0)
        if is_set(decay):
            d = add_lists(d, params, alpha=decay)
        if not is_set(mu):
            return add_lists(params, d, alpha=-rate), list(states)

        buffers: list[Any] = []
        has_first_step = False
        for state in states:
            buffer = state.get(BUFFER)
            has_first_step = has_first_step or buffer is None
            buffers.append(buffer)
        new_buffers: Tensors
        if has_first_step:
            # A first step takes d undamped.
            new_buffers = [
                d_i if buffer is None else mu * buffer + damped * d_i
                for d_i, buffer in zip(d, buffers, strict=True)
            ]
        else:
            new_buffers = add_lists(mul_lists(buffers, mu), d, alpha=damped)
        if group["nesterov"]:
            d = add_lists(d, new_buffers, alpha=mu)
        else:
            d = new_buffers
        new_states = [
            {**state, BUFFER: buffer} for state, buffer in zip(states, new_buffers, strict=True)
        ]
        return add_lists(params, d, alpha=-rate), new_states

    def stepped(self, params: Tree, grads: Tree, state: States) -> tuple[Tree, States]:
        # The rule has the bits of torch's step, but for fused kernels and half precision.
        is_fused = any(group.get("fused") for group in self.options)
        if is_fused or any(p.dtype in HALF for p in params.values()):
            return super().stepped(params, grads, state)
        return self.update(params, grads, state)

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        # With dampening, a first step is another one than a step from a buffer of zeros.
        is_complete = state.get(BUFFER) is not None
        if is_complete or not group["momentum"] or group["dampening"]:
            return {name: t for name, t in state.items() if t is not None}
        return {**state, BUFFER: torch.zeros_like(p)}

    def pullback(
        self, params: Tree, grads: Tree, state: States, v: Tree, options: Options | None = None
    ) -> Tree:
        w: Tree = {}
        for group, names in self.groups(grads, options):
            v_list = [v[name] for name in names]
            sign = 1.0 if group["maximize"] else -1.0
            rate = group["lr"] * sign
            mu = group["momentum"]
            dampening = group["dampening"]

            # What v is multiplied by in the first step of a weight, and in later ones.
            first: Any = rate
            later: Any = rate
            if is_set(mu):
                damped = 1.0 - dampening
                if group["nesterov"]:
                    first = rate * (1.0 + mu)
                    later = rate * (1.0 + mu * damped)
                else:
                    later = rate * damped
            factors = first
            if is_set(dampening):
                is_first = [state[name].get(BUFFER) is None for name in names]
                if not all(is_first):
                    factors = [first if is_new else later for is_new in is_first]
            w.update(zip(names, mul(v_list, factors), strict=True))
        return {name: w[name] for name in grads}

    def vjp(
        self,
        params: Tree,
        grads: Tree,
        state: States,
        v: Tree,
        state_cotangent: OptimizerState = None,
    ) -> Cotangents:
        r"""Return the adjoint in closed form, with θ̄ for v.

        Without Nesterov momentum, μ = 1 in the first product.

        .. math:: \bar b' \mathrel{+}= -\eta\mu\bar\theta, \quad
                  \bar d = c\,\bar b' (- \eta\bar\theta), \quad
                  \bar b = \mu\bar b', \quad \bar\theta \mathrel{+}= \lambda\bar d
        """
        w: Tree = {}
        of_theta: Tree = dict(v)
        of_next_state, of_state = cotangents_of(state, state_cotangent)
        for group, names in self.groups(grads):
            mu = group["momentum"]
            dampening = group["dampening"]
            decay = group["weight_decay"]
            v_list = [v[name] for name in names]
            of_d: Tensors = mul(v_list, -group["lr"])
            if mu != 0:
                of_buffers = mul(of_d, mu) if group["nesterov"] else of_d
                for name, bar in zip(names, of_buffers, strict=True):
                    of_next_buffer = of_next_state[name].get(BUFFER)
                    if of_next_buffer is not None:
                        bar += of_next_buffer
                is_first = [state[name].get(BUFFER) is None for name in names]
                through_buffers = [
                    bar if is_new or not dampening else bar * (1 - dampening)
                    for bar, is_new in zip(of_buffers, is_first, strict=True)
                ]
                of_d = plus(through_buffers, of_d) if group["nesterov"] else through_buffers
                for name, bar, is_new in zip(names, mul(of_buffers, mu), is_first, strict=True):
                    if BUFFER in state[name]:
                        of_state[name][BUFFER] = None if is_new else bar
            if decay != 0:
                of_theta.update(zip(names, add(v_list, of_d, alpha=decay), strict=True))
            of_g = mul(of_d, -1.0) if group["maximize"] else of_d
            w.update(zip(names, of_g, strict=True))
        return Cotangents({name: w[name] for name in grads}, of_theta, state=of_state)
