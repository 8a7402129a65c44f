"""Adam and AdamW, with their adjoints in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.checks import transformed
from metapl.execution.numerics import Tree
from metapl.updates.base import Cotangents, OptimizerState, Options, Parameters, cotangents_of
from metapl.updates.lists import Tensors, add, div, is_set, mul, plus, sub
from metapl.updates.torch_optim import State, States, TorchUpdate

SMOOTHING = "adjoint_smoothing"
"""The option of a param group by which its adjoint, and no step, divides by more than √n̂ + ε."""


class Adam(TorchUpdate):
    r"""m′ = β₁m + (1−β₁)d; n′ = β₂n + (1−β₂)d²; θ′ = θ(1−ηλ) − η m̂/(√n̂ + ε).

    d = ±g, or ±g + λθ where λ is coupled, and then without the factor 1−ηλ.
    m̂ = m′/(1−β₁ᵗ) and n̂ = n′/(1−β₂ᵗ), or the greatest n′ so far with ``amsgrad``. Where n̂ = 0
    the update is smooth in d, and the square root is not: there n̂ counts as the smallest normal
    number, a constant. In float16 that is above many a real n̂, and such weights are refused.

    Where second moments are small, a step is nearly a sign, whose derivative says nothing of finite
    changes. A param group with the option :data:`SMOOTHING`, c, has the same steps, and the adjoint
    of steps with ε + c·rms(√n̂) of each tensor, a constant, in the place of ε.
    """

    numbers = ("lr", "betas", "eps", "weight_decay")

    def follow(self, parameters: Parameters) -> None:
        refuse_half(parameters)
        super().follow(parameters)

    @staticmethod
    def rule(
        params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> tuple[Tensors, list[State]]:
        eta, kept = group["lr"], params
        if is_set(group["weight_decay"]) and group.get("decoupled_weight_decay", False):
            kept = mul(params, 1 - eta * group["weight_decay"])
        _, m_hat, root, _, new = _moments(params, grads, states, group)
        moves = div(m_hat, plus(root, group["eps"]))
        if SMOOTHING in group:
            smooth_moves = div(m_hat, _divisors(root, group))
            pairs = zip(moves, smooth_moves, strict=True)
            moves = [move.detach() + (smooth - smooth.detach()) for move, smooth in pairs]
        return sub(kept, mul(moves, eta)), new

    @staticmethod
    def completed(p: Tensor, state: State, group: Mapping[str, Any]) -> State:
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        return {"step": torch.zeros(()), **{name: torch.zeros_like(p) for name in moments}, **state}

    def pullback(
        self, params: Tree, grads: Tree, state: States, v: Tree, options: Options | None = None
    ) -> Tree:
        r"""Return w in closed form, with a few fused operations instead of autograd's many.

        .. math:: \frac{\partial\theta'}{\partial d} = \frac{-\eta}{\sqrt{\hat n} + \epsilon} \Big[
                  \frac{1-\beta_1}{1-\beta_1^t} - \frac{\hat m}{\sqrt{\hat n} + \epsilon}
                  \frac{1-\beta_2}{1-\beta_2^t} \frac{d}{\sqrt{\hat n}} \Big]
        """
        w: Tree = {}
        for group, names in self.groups(grads, options):
            (beta1, beta2), sign = group["betas"], -1.0 if group["maximize"] else 1.0
            given = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            d, m_hat, root, steps, new = _moments(*given, group)
            size = _divisors(root, group)
            of_root = mul(div(d, root), [(1 - beta2) / (1 - beta2**t) for t in steps])
            if group["amsgrad"]:
                # Where an older maximum rules, n̂ does not depend on d.
                pairs = [(s["exp_avg_sq"], s["max_exp_avg_sq"]) for s in new]
                of_root = [
                    torch.where(n >= top, t, 0.0)
                    for t, (n, top) in zip(of_root, pairs, strict=True)
                ]
            slopes = mul(div(mul(m_hat, of_root), size), -1.0)
            slopes = plus(slopes, [(1 - beta1) / (1 - beta1**t) for t in steps])
            slopes = div(mul(slopes, -sign * group["lr"]), size)
            w.update(zip(names, mul([v[n] for n in names], slopes), strict=True))
        return {name: w[name] for name in grads}

    def vjp(
        self,
        params: Tree,
        grads: Tree,
        state: States,
        v: Tree,
        state_cotangent: OptimizerState = None,
    ) -> Cotangents:
        r"""Return the adjoint in closed form, but with ``amsgrad``.

        With :math:`\bar\theta` for v, and :math:`\rho = \sqrt{\hat n}`:

        .. math:: \bar m' \mathrel{+}= \frac{-\eta\bar\theta}{(1-\beta_1^t)(\rho + \epsilon)}, \quad
                  \bar n' \mathrel{+}= \frac{\eta\bar\theta\,\hat m}
                  {2 (1-\beta_2^t)\rho (\rho + \epsilon)^2}, \quad
                  \bar d = (1-\beta_1)\bar m' + 2(1-\beta_2)\, d\, \bar n'
        """
        if any(group["amsgrad"] for group, _ in self.groups(grads)):
            return super().vjp(params, grads, state, v, state_cotangent)
        moments = ("exp_avg", "exp_avg_sq")
        w: Tree = {}
        theta, (given, of_state) = dict(v), cotangents_of(state, state_cotangent)
        for group, names in self.groups(grads):
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            held = [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]
            d, m_hat, root, steps, _ = _moments(*held, group)
            size = _divisors(root, group)
            # The cotangent of m̂, which becomes that of m below.
            of_m = div(mul([v[n] for n in names], -lr), size)
            of_n = div(div(mul(of_m, m_hat), size), root)
            of_n = mul(of_n, [-0.5 / (1 - beta2**t) for t in steps])
            of_m = div(of_m, [1 - beta1**t for t in steps])
            for bar, r in zip(of_n, root, strict=True):
                # There n̂ counts as a constant.
                bar.masked_fill_(r * r <= torch.finfo(r.dtype).tiny, 0.0)
            for key, of_moment in zip(moments, (of_m, of_n), strict=True):
                for n, bar in zip(names, of_moment, strict=True):
                    if (later := given[n].get(key)) is not None:
                        bar += later
            of_d = add(mul(mul(d, of_n), 2 * (1 - beta2)), of_m, 1 - beta1)
            if decay != 0 and group.get("decoupled_weight_decay", False):
                theta.update(zip(names, mul([v[n] for n in names], 1 - lr * decay), strict=True))
            elif decay != 0:
                theta.update(zip(names, add([v[n] for n in names], of_d, decay), strict=True))
            for key, of_moment, beta in zip(moments, (of_m, of_n), (beta1, beta2), strict=True):
                for n, bar in zip(names, mul(of_moment, beta), strict=True):
                    of_state[n] |= {key: bar} if key in state[n] else {}
            w.update(zip(names, mul(of_d, -1.0) if group["maximize"] else of_d, strict=True))
        return Cotangents({name: w[name] for name in grads}, theta, of_state)


def _divisors(root: Tensors, group: Mapping[str, Any]) -> Tensors:
    """Return √n̂ + ε, and in a smoothed adjoint √n̂ + ε + c·rms(√n̂) of each tensor."""
    divisors: Tensors = plus(root, group["eps"])
    if SMOOTHING not in group:
        return divisors
    sizes = [r.detach().square().mean().sqrt() for r in root]
    return [t + group[SMOOTHING] * size for t, size in zip(divisors, sizes, strict=True)]


def refuse_half(parameters: Parameters) -> None:
    half = [name for name, p in parameters.items() if p.dtype == torch.float16]
    if half:
        raise MetaplError(f"{half[0]} is in float16; expected float32, or SGD in place of Adam.")


def _moments(
    params: list[Tensor], grads: list[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> tuple[Tensors, Tensors, Tensors, list[Any], list[State]]:
    """d, m̂, √n̂ and the steps t of the parameters of a group, and their new states."""
    if any(map(Tensor.is_complex, params)):
        raise MetaplError("inner_optimizer is Adam of a complex weight; expected torch.optim.SGD.")
    beta1, beta2 = group["betas"]
    d: Tensors = mul(grads, -1.0) if group["maximize"] else grads
    if is_set(group["weight_decay"]) and not group.get("decoupled_weight_decay", False):
        d = add(d, params, group["weight_decay"])
    # On the eager road the counts of steps are on the host.
    counts = [torch.as_tensor(state.get("step", 0.0)) for state in states]
    steps: list[Any] = [
        n.double() + 1.0 if transformed() else float(n.detach()) + 1.0 for n in counts
    ]
    m = _average("exp_avg", d, beta1, states)
    n = _average("exp_avg_sq", mul(d, d), beta2, states)
    new: list[State] = [
        {**state, "step": torch.as_tensor(t, dtype=count.dtype), "exp_avg": m_i, "exp_avg_sq": n_i}
        for state, t, count, m_i, n_i in zip(states, steps, counts, m, n, strict=True)
    ]
    if group["amsgrad"]:
        for state in new:
            # Where they are equal, the derivative is that of n.
            n_i, top = state["exp_avg_sq"], state.get("max_exp_avg_sq")
            state["max_exp_avg_sq"] = n_i if top is None else torch.where(n_i >= top, n_i, top)
        n = [state["max_exp_avg_sq"] for state in new]
    m_hat = div(m, [1 - beta1**t for t in steps])
    n_hat = div(n, [1 - beta2**t for t in steps])
    # Not torch._foreach_sqrt and _foreach_clamp_min, which a transform cannot trace.
    root = [n_i.clamp_min(torch.finfo(n_i.dtype).tiny).sqrt() for n_i in n_hat]
    return d, m_hat, root, steps, new


def _average(name: str, new: Tensors, beta: Any, states: Sequence[State]) -> Tensors:
    """β·old + (1−β)·new; old is 0 in the first step."""
    fresh: Tensors = mul(new, 1 - beta)
    if any(name not in state for state in states):
        return [
            t + beta * state[name] if name in state else t
            for t, state in zip(fresh, states, strict=True)
        ]
    averaged: Tensors = plus(mul([state[name] for state in states], beta), fresh)
    return averaged
