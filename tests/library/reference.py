"""The teacher's gradient by plain double backward, and update rules from the textbook: no code of the library.

The student's step is differentiated through from end to end by autograd; nothing here knows of
pullbacks, directional derivatives or score functions.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Tree = dict[str, Tensor]
Rule = Callable[[Tree, Tree, Any], tuple[Tree, Any]]
"""(θ, g, state or None) -> (θ′, state′), differentiable in g."""


def sgd(
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Rule:
    def rule(params: Tree, grads: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        new, velocity = {}, {}
        for name, p in params.items():
            d = (-grads[name] if maximize else grads[name]) + weight_decay * p
            velocity[name] = d if state is None else momentum * state[name] + (1 - dampening) * d
            step = d
            if momentum:
                step = d + momentum * velocity[name] if nesterov else velocity[name]
            new[name] = p - lr * step
        return new, velocity

    return rule


def adam(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
) -> Rule:
    beta1, beta2 = betas

    def rule(
        params: Tree, grads: Tree, state: dict[str, Any] | None
    ) -> tuple[Tree, dict[str, Any]]:
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        state = state or {"t": 0, "m": zeros, "n": zeros, "top": zeros}
        t = state["t"] + 1
        new, m, n, top = {}, {}, {}, {}
        for name, p in params.items():
            d = -grads[name] if maximize else grads[name]
            d = d if decoupled else d + weight_decay * p
            m[name] = beta1 * state["m"][name] + (1 - beta1) * d
            n[name] = beta2 * state["n"][name] + (1 - beta2) * d.square()
            top[name] = torch.where(n[name] >= state["top"][name], n[name], state["top"][name])
            m_hat, n_hat = m[name] / (1 - beta1**t), (top if amsgrad else n)[name] / (1 - beta2**t)
            kept = p * (1 - lr * weight_decay) if decoupled else p
            root = n_hat.clamp_min(1e-300).sqrt()  # keeps the derivative at 0 finite, and right
            new[name] = kept - lr * m_hat / (root + eps)
        return new, {"t": t, "m": m, "n": n, "top": top}

    return rule


def adamw(**options: Any) -> Rule:
    return adam(**options, decoupled=True)


def clipped(max_norm: float, then: Rule) -> Rule:
    def rule(params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        length = sum(g.square().sum() for g in grads.values()).sqrt()
        factor = torch.clamp(max_norm / (length + 1e-6), max=1.0)
        return then(params, {name: factor * g for name, g in grads.items()}, state)

    return rule


@dataclass(frozen=True)
class Found:
    """What the reference finds; gradients of the labelled loss, so without the feedback's sign."""

    grads: Tree
    signal_grad: Tensor
    student_params: Tree
    state: Any
    inner_loss: Tensor
    outer_loss: Tensor
    labels: Tensor | None = None


def at(module: nn.Module, params: Tree, x: Tensor) -> Tensor:
    """A copy of the module at other weights, so that running statistics stay."""
    with sdpa_kernel(SDPBackend.MATH):
        return functional_call(copy.deepcopy(module), params, (x,))


def own_stream(state: Tensor) -> Tensor:
    """Where L(θ′) draws from.

    A stream seeded by a hash of the generator's state after the inner pass.
    """
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1).get_state()


def weights(module: nn.Module) -> Tree:
    return {
        name: p.detach().clone().requires_grad_()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def stepped(loss: Tensor, params: Tree, rule: Rule, state: Any = None) -> tuple[Tree, Any]:
    """(θ′, state′) of one step, in the graph.

    The gradient of a weight that the loss does not reach is ``None``.
    """
    grads = torch.autograd.grad(loss, [*params.values()], create_graph=True, allow_unused=True)
    return rule(params, dict(zip(params, grads, strict=True)), state)


def drawn(q: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A label for each row of probabilities, (B,), by Gumbel's argmax."""
    u = torch.rand(q.shape, generator=generator).to(q.dtype)
    return (q.detach().log() - (-u.log()).log()).argmax(-1)


def cross_entropy(target: Tensor, outputs: Tensor) -> Tensor:
    """−Σ_k target_k log softmax(outputs)_k, (B,)."""
    return -(target * torch.log_softmax(outputs, -1)).sum(-1)


def pseudo_labels(
    teacher: nn.Module,
    student: nn.Module,
    labeled: tuple[Tensor, Tensor],
    unlabeled: Any,
    rule: Rule,
    state: Any = None,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    smoothing: float = 0.0,
    labels: Tensor | None = None,
) -> Found:
    """One step of Meta Pseudo Labels.

    Args:
        kind: ``"soft"``: the student learns q; ``"expected"``: it learns ŷ, and the teacher is told
            of q as if the student's step were linear in it (a straight-through label); ``"score"``:
            it learns ŷ, and the teacher gets Σ_i (∂L/∂u_i) ∇log p_i(ŷ_i), with u_i = 1 the weight
            of example i in the inner loss; ``"batch_score"``: the same with one weight u for the
            whole batch; ``"batch_mean"``: 1/B of it, Algorithm 1 as it is written.
        labels: ŷ, where it is not to be drawn.
    """
    weak, strong = unlabeled if isinstance(unlabeled, tuple) else (unlabeled, unlabeled)
    theta, phi = weights(student), weights(teacher)
    z = at(student, theta, strong)  # draws first
    after_inner = torch.get_rng_state()
    log_q = torch.log_softmax(at(teacher, phi, weak) / temperature, -1)  # draws next
    q = log_q.exp()
    classes, rows = q.shape[-1], len(q)
    if kind != "soft" and labels is None:
        labels = drawn(q)
    end = torch.get_rng_state()
    hard = None if labels is None else F.one_hot(labels, classes).to(q)
    of_batch = kind in ("batch_score", "batch_mean")
    u = torch.ones((1,) if of_batch else (rows,), dtype=q.dtype, requires_grad=True)
    leaf = (q if hard is None else hard).detach().requires_grad_()
    target = (1 - smoothing) * leaf + smoothing / classes
    inner = (u * cross_entropy(target, z)).mean()
    moved, new_state = stepped(inner, theta, rule, state)
    torch.set_rng_state(own_stream(after_inner))
    outer = F.cross_entropy(at(student, moved, labeled[0]), labeled[1])
    torch.set_rng_state(end)
    if kind in ("soft", "expected"):
        (signal_grad,) = torch.autograd.grad(outer, leaf)
        told = (signal_grad * q).sum()
    else:
        (signal_grad,) = torch.autograd.grad(outer, u)
        told = (signal_grad * (log_q * hard).sum(-1)).sum()
        told = told / rows if kind == "batch_mean" else told
    grads = torch.autograd.grad(told, list(phi.values()))
    return Found(
        dict(zip(phi, grads, strict=True)),
        signal_grad.detach(),
        _constant(moved),
        new_state,
        inner.detach(),
        outer.detach(),
        labels,
    )


@dataclass(frozen=True)
class FoundAhead:
    """As :class:`Found`, over several student steps."""

    grads: Tree
    signal_grads: list[Tensor]
    student_params: Tree
    outer_loss: Tensor


def several_steps(
    teacher: nn.Module,
    student: nn.Module,
    labeled: tuple[Tensor, Tensor],
    batches: list[Any],
    rule: Rule | list[Rule],
    state: Any = None,
    *,
    kind: str = "soft",
) -> FoundAhead:
    """Student steps on the batches one after another, all in one graph; ``kind`` is ``"soft"`` or ``"expected"``.

    Args:
        rule: of all steps, or of each.
    """
    theta, phi = weights(student), weights(teacher)
    leaves, told = [], []
    for x, taken in zip(
        batches, rule if isinstance(rule, list) else [rule] * len(batches), strict=True
    ):
        weak, strong = x if isinstance(x, tuple) else (x, x)
        z = at(student, theta, strong)
        after_inner = torch.get_rng_state()
        q = torch.softmax(at(teacher, phi, weak), -1)
        hard = None if kind == "soft" else F.one_hot(drawn(q), q.shape[-1]).to(q)
        leaves.append((q if hard is None else hard).detach().requires_grad_())
        told.append(q)
        theta, state = stepped(cross_entropy(leaves[-1], z).mean(), theta, taken, state)
    end = torch.get_rng_state()
    torch.set_rng_state(own_stream(after_inner))
    outer = F.cross_entropy(at(student, theta, labeled[0]), labeled[1])
    torch.set_rng_state(end)
    signal_grads = torch.autograd.grad(outer, leaves)
    total = sum((g * q).sum() for g, q in zip(signal_grads, told, strict=True))
    grads = torch.autograd.grad(total, list(phi.values()))
    return FoundAhead(
        dict(zip(phi, grads, strict=True)), list(signal_grads), _constant(theta), outer.detach()
    )


def flat(tree: Tree | Tensor) -> Tensor:
    return (
        (tree if isinstance(tree, Tensor) else torch.cat([t.flatten() for t in tree.values()]))
        .detach()
        .double()
    )


def error(found: Tree | Tensor, expected: Tree | Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all entries."""
    a, b = flat(found), flat(expected)
    assert b.norm() > 0, "an expected value of zero proves nothing here"
    return float((a - b).norm() / b.norm())


def _constant(tree: Tree) -> Tree:
    return {name: t.detach() for name, t in tree.items()}
