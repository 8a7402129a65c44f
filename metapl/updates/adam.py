"""``torch.optim.Adam`` and ``AdamW``, with their pullback in closed form."""

from __future__ import annotations

from collections.abc import Sequence
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
                'second moments; expected weights in float32, with precision="bfloat16" where passes are to be short.'
            )
        super().follow(parameters)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        eta, kept = group["lr"], tuple(params)
        if group["weight_decay"] != 0 and _is_decoupled(group):
            kept = torch._foreach_mul(params, 1 - eta * group["weight_decay"])
        _, m_hat, root, _, new = _moments(params, grads, states, group)
        step = torch._foreach_div(m_hat, torch._foreach_add(root, group["eps"]))
        return torch._foreach_sub(kept, torch._foreach_mul(step, eta)), new

    def pullback(self, params: Tree, grads: Tree, state: States, v: Tree) -> Tree:
        r"""In closed form, with a few fused operations instead of autograd's many:

        .. math:: \frac{\partial\theta'}{\partial d} = \frac{-\eta}{\sqrt{\hat n} + \epsilon} \Big[
                  \frac{1-\beta_1}{1-\beta_1^t} - \frac{\hat m}{\sqrt{\hat n} + \epsilon}
                  \frac{1-\beta_2}{1-\beta_2^t} \frac{d}{\sqrt{\hat n}} \Big]
        """
        w: Tree = {}
        for group, names in self.groups(grads):
            (beta1, beta2), sign = group["betas"], -1.0 if group["maximize"] else 1.0
            given = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            d, m_hat, root, steps, new = _moments(*given, group)
            size = torch._foreach_add(root, group["eps"])
            of_root = torch._foreach_div(d, root)
            torch._foreach_mul_(of_root, [(1 - beta2) / (1 - beta2**t) for t in steps])
            if group["amsgrad"]:  # where an older maximum rules, n̂ does not depend on d
                pairs = [(s["exp_avg_sq"], s["max_exp_avg_sq"]) for s in new]
                of_root = tuple(torch.where(n >= top, t, 0.0) for t, (n, top) in zip(of_root, pairs, strict=True))
            slopes = torch._foreach_neg(torch._foreach_div(torch._foreach_mul(m_hat, of_root), size))
            torch._foreach_add_(slopes, [(1 - beta1) / (1 - beta1**t) for t in steps])
            slopes = torch._foreach_div(torch._foreach_mul(slopes, -sign * group["lr"]), size)
            w.update(zip(names, torch._foreach_mul([v[n] for n in names], slopes), strict=True))
        return {name: w[name] for name in grads}


def _moments(
    params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
) -> tuple[Tensors, Tensors, Tensors, list[float], list[State]]:
    """d, m̂, √n̂ and the steps t of the parameters of a group, and their new states."""
    beta1, beta2 = group["betas"]
    d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
    if group["weight_decay"] != 0 and not _is_decoupled(group):
        d = torch._foreach_add(d, params, alpha=group["weight_decay"])
    counts = [state.get("step", 0.0) for state in states]  # tensors on the host
    steps = [float(n.detach() if isinstance(n, Tensor) else n) + 1.0 for n in counts]
    m = _average("exp_avg", d, beta1, states)
    n = _average("exp_avg_sq", torch._foreach_mul(d, d), beta2, states)
    new = [
        {**state, "step": torch.tensor(t), "exp_avg": m_i, "exp_avg_sq": n_i}
        for state, t, m_i, n_i in zip(states, steps, m, n, strict=True)
    ]
    if group["amsgrad"]:
        for state in new:  # where they are equal, the derivative is that of n
            n_i, top = state["exp_avg_sq"], state.get("max_exp_avg_sq")
            state["max_exp_avg_sq"] = n_i if top is None else torch.where(n_i >= top, n_i, top)
        n = [state["max_exp_avg_sq"] for state in new]
    m_hat = torch._foreach_div(m, [1 - beta1**t for t in steps])
    n_hat = torch._foreach_div(n, [1 - beta2**t for t in steps])
    root = torch._foreach_sqrt([n_i.clamp_min(torch.finfo(n_i.dtype).tiny) for n_i in n_hat])
    return d, m_hat, root, steps, new


def _is_decoupled(group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", False))


def _average(name: str, new: Tensors, beta: float, states: Sequence[State]) -> Tensors:
    """β·old + (1−β)·new; old is 0 in the first step."""
    fresh = torch._foreach_mul(new, 1 - beta)
    if any(name not in state for state in states):
        return [t + beta * state[name] if name in state else t for t, state in zip(fresh, states, strict=True)]
    return torch._foreach_add(torch._foreach_mul([state[name] for state in states], beta), fresh)
