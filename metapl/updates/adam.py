"""``torch.optim.Adam`` and ``AdamW``; the adjoint is autograd's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.updates.torch_optim import State, Tensors, TorchUpdate


class Adam(TorchUpdate):
    r"""m′ = β₁m + (1−β₁)d; n′ = β₂n + (1−β₂)d²; θ′ = θ(1−ηλ) − η m̂/(√n̂ + ε), with d = ±g (+ λθ where λ is coupled).

    m̂ = m′/(1−β₁ᵗ) and n̂ = n′/(1−β₂ᵗ), or the greatest n′ so far with ``amsgrad``. Where n̂ = 0 the update is smooth in
    d, because m̂ vanishes with it, and the square root is not: there n̂ counts as the smallest normal number, a constant.
    """

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: dict[str, Any]
    ) -> tuple[Tensors, list[State]]:
        beta1, beta2 = group["betas"]
        eta, decay = group["lr"], group["weight_decay"]
        d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
        if decay != 0 and group.get("decoupled_weight_decay", False):
            params = list(torch._foreach_mul(params, 1 - eta * decay))
        elif decay != 0:
            d = torch._foreach_add(d, params, alpha=decay)
        t = [_count(state) + 1.0 for state in states]
        m = _average("exp_avg", d, beta1, states)
        n = _average("exp_avg_sq", torch._foreach_mul(d, d), beta2, states)
        new = [
            {**state, "step": torch.tensor(steps), "exp_avg": one_m, "exp_avg_sq": one_n}
            for state, steps, one_m, one_n in zip(states, t, m, n, strict=True)
        ]
        if group["amsgrad"]:
            n = [_greatest(one, state.get("max_exp_avg_sq")) for one, state in zip(n, states, strict=True)]
            for state, one in zip(new, n, strict=True):
                state["max_exp_avg_sq"] = one
        m_hat = torch._foreach_div(m, [1 - beta1**steps for steps in t])
        n_hat = torch._foreach_div(n, [1 - beta2**steps for steps in t])
        root = torch._foreach_sqrt([one.clamp_min(torch.finfo(one.dtype).tiny) for one in n_hat])
        step = torch._foreach_div(m_hat, torch._foreach_add(root, group["eps"]))
        return torch._foreach_sub(params, torch._foreach_mul(step, eta)), new


def _count(state: State) -> float:
    """The steps so far; the optimizer holds them as a tensor on the host."""
    steps = state.get("step", 0.0)
    return float(steps.detach() if isinstance(steps, Tensor) else steps)


def _average(name: str, new: Tensors, beta: float, states: Sequence[State]) -> Tensors:
    """β·old + (1−β)·new, the old one 0 at first."""
    fresh = torch._foreach_mul(new, 1 - beta)
    if any(name not in state for state in states):
        return [one + beta * state[name] if name in state else one for one, state in zip(fresh, states, strict=True)]
    return torch._foreach_add(torch._foreach_mul([state[name] for state in states], beta), fresh)


def _greatest(n: Tensor, before: Tensor | None) -> Tensor:
    """The greater of the two; n′ itself where they are equal, so that it is n′ that has the derivative."""
    return n if before is None else torch.where(n >= before, n, before)
