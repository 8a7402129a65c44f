"""``torch.optim.Adam`` and ``AdamW``: the pullback in closed form, the whole adjoint by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.numerics import Tree
from metapl.updates.base import Parameters
from metapl.updates.torch_optim import State, States, Tensors, TorchUpdate


class Adam(TorchUpdate):
    r"""m′ = β₁m + (1−β₁)d; n′ = β₂n + (1−β₂)d²; θ′ = θ(1−ηλ) − η m̂/(√n̂ + ε), with d = ±g (+ λθ where λ is coupled).

    m̂ = m′/(1−β₁ᵗ) and n̂ = n′/(1−β₂ᵗ), or the greatest n′ so far with ``amsgrad``. Where n̂ = 0 the update is smooth
    in d, because m̂ vanishes with it, and the square root is not: there n̂ counts as the smallest normal number, a
    constant. In float16 that is above many a real n̂, and such weights are refused.
    """

    def follow(self, parameters: Parameters) -> None:
        half = [name for name, p in parameters.items() if p.dtype == torch.float16]
        if half:
            raise MetaplError(
                f"the student's {half[0]} is in float16, whose smallest normal number, 6e-5, is above many of Adam's "
                "second moments, so the feedback would be that of another step; expected weights in float32, with "
                'precision="bfloat16" where passes are to be short.'
            )
        super().follow(parameters)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        eta = group["lr"]
        if group["weight_decay"] != 0 and _is_decoupled(group):
            kept = torch._foreach_mul(params, 1 - eta * group["weight_decay"])
        else:
            kept = tuple(params)
        now = _moments(params, grads, states, group)
        step = torch._foreach_div(now.m_hat, torch._foreach_add(now.root, group["eps"]))
        return torch._foreach_sub(kept, torch._foreach_mul(step, eta)), now.states

    def pullback(self, params: Tree, grads: Tree, state: States, v: Tree) -> Tree:
        r"""In closed form, with a few fused operations instead of autograd's many:

        .. math:: \frac{\partial\theta'}{\partial d} = \frac{-\eta}{\sqrt{\hat n} + \epsilon} \Big[
                  \frac{1-\beta_1}{1-\beta_1^t} - \frac{\hat m}{\sqrt{\hat n} + \epsilon}
                  \frac{1-\beta_2}{1-\beta_2^t} \frac{d}{\sqrt{\hat n}} \Big]
        """
        w: Tree = {}
        for group, names in self.groups(grads):
            (beta1, beta2), sign = group["betas"], -1.0 if group["maximize"] else 1.0
            now = _moments([params[n] for n in names], [grads[n] for n in names], [state[n] for n in names], group)
            size = torch._foreach_add(now.root, group["eps"])
            of_root = torch._foreach_div(now.d, now.root)
            torch._foreach_mul_(of_root, [(1 - beta2) / (1 - beta2**t) for t in now.t])
            if group["amsgrad"]:  # where an older maximum rules, n̂ does not depend on d
                pairs = [(state["exp_avg_sq"], state["max_exp_avg_sq"]) for state in now.states]
                of_root = tuple(torch.where(n >= top, t, 0.0) for t, (n, top) in zip(of_root, pairs, strict=True))
            slopes = torch._foreach_div(torch._foreach_mul(now.m_hat, of_root), size)
            slopes = torch._foreach_neg(slopes)
            torch._foreach_add_(slopes, [(1 - beta1) / (1 - beta1**t) for t in now.t])
            slopes = torch._foreach_div(torch._foreach_mul(slopes, -sign * group["lr"]), size)
            w.update(zip(names, torch._foreach_mul([v[n] for n in names], slopes), strict=True))
        return {name: w[name] for name in grads}


@dataclass(frozen=True)
class _Moments:
    """d, m̂, √n̂ and the steps t of the parameters of a group, and their new states."""

    d: Tensors
    m_hat: Tensors
    root: Tensors
    t: list[float]
    states: list[State]


def _moments(params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]) -> _Moments:
    beta1, beta2 = group["betas"]
    d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
    if group["weight_decay"] != 0 and not _is_decoupled(group):
        d = torch._foreach_add(d, params, alpha=group["weight_decay"])
    t = [_count(state) + 1.0 for state in states]
    m = _average("exp_avg", d, beta1, states)
    n = _average("exp_avg_sq", torch._foreach_mul(d, d), beta2, states)
    new = [
        {**state, "step": torch.tensor(t_i), "exp_avg": m_i, "exp_avg_sq": n_i}
        for state, t_i, m_i, n_i in zip(states, t, m, n, strict=True)
    ]
    if group["amsgrad"]:
        n = [_greatest(n_i, state.get("max_exp_avg_sq")) for n_i, state in zip(n, states, strict=True)]
        for state, n_i in zip(new, n, strict=True):
            state["max_exp_avg_sq"] = n_i
    m_hat = torch._foreach_div(m, [1 - beta1**t_i for t_i in t])
    n_hat = torch._foreach_div(n, [1 - beta2**t_i for t_i in t])
    root = torch._foreach_sqrt([n_i.clamp_min(torch.finfo(n_i.dtype).tiny) for n_i in n_hat])
    return _Moments(d, m_hat, root, t, new)


def _is_decoupled(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _count(state: State) -> float:
    """The steps taken so far; the optimizer stores them in a tensor on the host."""
    steps = state.get("step", 0.0)
    return float(steps.detach() if isinstance(steps, Tensor) else steps)


def _average(name: str, new: Tensors, beta: float, states: Sequence[State]) -> Tensors:
    """β·old + (1−β)·new; old is 0 in the first step."""
    fresh = torch._foreach_mul(new, 1 - beta)
    if any(name not in state for state in states):
        return [t + beta * state[name] if name in state else t for t, state in zip(fresh, states, strict=True)]
    return torch._foreach_add(torch._foreach_mul([state[name] for state in states], beta), fresh)


def _greatest(n: Tensor, before: Tensor | None) -> Tensor:
    """The elementwise maximum; where they are equal, the derivative is that of n."""
    return n if before is None else torch.where(n >= before, n, before)
