"""The teacher's gradient by plain double backward, and update rules from the textbook.

No code of the library is used. The student's step is differentiated through from end to end by
autograd; nothing here knows of pullbacks, directional derivatives or score functions.
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
    """Return the rule of ``torch.optim.SGD``; its state is the velocity."""

    def rule(params: Tree, grads: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        new_params: Tree = {}
        velocity: Tree = {}
        for name, p in params.items():
            ascent = -grads[name] if maximize else grads[name]
            direction = ascent + weight_decay * p
            if state is None:
                velocity[name] = direction
            else:
                velocity[name] = momentum * state[name] + (1 - dampening) * direction
            step = direction
            if momentum and nesterov:
                step = direction + momentum * velocity[name]
            elif momentum:
                step = velocity[name]
            new_params[name] = p - lr * step
        return new_params, velocity

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
    """Return the rule of ``torch.optim.Adam``, or with ``decoupled`` weight decay that of AdamW.

    Its state: the number of steps t, both moments m and n, and the greatest n so far.
    """
    beta1, beta2 = betas

    def rule(
        params: Tree, grads: Tree, state: dict[str, Any] | None
    ) -> tuple[Tree, dict[str, Any]]:
        if state is None:
            zeros = {name: torch.zeros_like(p) for name, p in params.items()}
            state = {"t": 0, "m": zeros, "n": zeros, "top": zeros}
        t = state["t"] + 1
        new_params: Tree = {}
        m: Tree = {}
        n: Tree = {}
        top: Tree = {}
        for name, p in params.items():
            direction = -grads[name] if maximize else grads[name]
            decayed = p
            if decoupled:
                decayed = p * (1 - lr * weight_decay)
            else:
                direction = direction + weight_decay * p
            m[name] = beta1 * state["m"][name] + (1 - beta1) * direction
            n[name] = beta2 * state["n"][name] + (1 - beta2) * direction.square()
            top[name] = torch.where(n[name] >= state["top"][name], n[name], state["top"][name])
            second_moment = top[name] if amsgrad else n[name]
            m_hat = m[name] / (1 - beta1**t)
            n_hat = second_moment / (1 - beta2**t)
            # The clamp keeps the derivative at 0 finite, and right.
            root = n_hat.clamp_min(1e-300).sqrt()
            new_params[name] = decayed - lr * m_hat / (root + eps)
        return new_params, {"t": t, "m": m, "n": n, "top": top}

    return rule


def adamw(**options: Any) -> Rule:
    """Return the rule of ``torch.optim.AdamW``."""
    return adam(**options, decoupled=True)


def clipped(max_norm: float, rule_of_clipped: Rule) -> Rule:
    """Return a rule on gradients that are clipped by their global norm before."""

    def rule(params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        length = sum(g.square().sum() for g in grads.values()).sqrt()
        factor = torch.clamp(max_norm / (length + 1e-6), max=1.0)
        return rule_of_clipped(params, {name: factor * g for name, g in grads.items()}, state)

    return rule


@dataclass(frozen=True)
class Found:
    """What the reference finds.

    The gradients are those of the labeled loss, so without the feedback's sign.
    """

    grads: Tree
    signal_grad: Tensor
    student_params: Tree
    state: Any
    inner_loss: Tensor
    outer_loss: Tensor
    labels: Tensor | None = None


def outputs_at(module: nn.Module, params: Tree, x: Tensor) -> Tensor:
    """Return the outputs of a copy of the module at other weights; running statistics stay."""
    with sdpa_kernel(SDPBackend.MATH):
        return functional_call(copy.deepcopy(module), params, (x,))


def own_stream(state: Tensor) -> Tensor:
    """Return the state of the generator that L(θ′) draws from.

    It is seeded by a hash of the default generator's state after the inner pass.
    """
    digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1).get_state()


def weights(module: nn.Module) -> Tree:
    """Return copies of the trainable weights, as leaves of a graph."""
    tree = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            tree[name] = p.detach().clone().requires_grad_()
    return tree


def stepped(loss: Tensor, params: Tree, rule: Rule, state: Any = None) -> tuple[Tree, Any]:
    """Return θ′ and the next state after one step, in the graph.

    The gradient of a weight that the loss does not reach is ``None``.
    """
    grads = torch.autograd.grad(loss, [*params.values()], create_graph=True, allow_unused=True)
    return rule(params, dict(zip(params, grads, strict=True)), state)


def drawn(q: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a label for each row of probabilities, (B,), by Gumbel's argmax."""
    u = torch.rand(q.shape, generator=generator).to(q.dtype)
    return (q.detach().log() - (-u.log()).log()).argmax(-1)


def cross_entropy(target: Tensor, outputs: Tensor) -> Tensor:
    """Return −Σ_k target_k log softmax(outputs)_k, (B,)."""
    return -(target * torch.log_softmax(outputs, -1)).sum(-1)


def views(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the weak and the strong view of an inner batch; a tensor is both."""
    if isinstance(batch, tuple):
        weak, strong = batch
        return weak, strong
    return batch, batch


def pseudo_labels(
    teacher: nn.Module,
    student: nn.Module,
    outer: tuple[Tensor, Tensor],
    inner: Any,
    rule: Rule,
    state: Any = None,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    smoothing: float = 0.0,
    labels: Tensor | None = None,
    one_stream: bool = False,
) -> Found:
    """Take one step of Meta Pseudo Labels.

    Args:
        kind: ``"soft"``: the student learns q; ``"expected"``: it learns ŷ, and the teacher is told
            of q as if the student's step were linear in it (a straight-through label); ``"score"``:
            it learns ŷ, and the teacher gets Σ_i (∂L/∂u_i) ∇log p_i(ŷ_i), with u_i = 1 the weight
            of example i in the inner loss; ``"batch_score"``: the same with one weight u for the
            whole batch; ``"batch_mean"``: 1/B of it, Algorithm 1 as it is written.
        labels: ŷ, where it is not to be drawn.
        one_stream: whether L(θ′) draws on from the default generator, as in a graph.
    """
    weak, strong = views(inner)
    theta = weights(student)
    phi = weights(teacher)
    # The student draws first, then the teacher, then the labels.
    z = outputs_at(student, theta, strong)
    after_inner = torch.get_rng_state()
    log_q = torch.log_softmax(outputs_at(teacher, phi, weak) / temperature, -1)
    q = log_q.exp()
    rows = len(q)
    classes = q.shape[-1]
    if kind != "soft" and labels is None:
        labels = drawn(q)
    end = torch.get_rng_state()

    # The leaves that the labeled loss is differentiated in: targets, and weights of examples.
    one_hot = None if labels is None else F.one_hot(labels, classes).to(q)
    leaf = (q if one_hot is None else one_hot).detach().requires_grad_()
    is_of_batch = kind in ("batch_score", "batch_mean")
    u = torch.ones((1,) if is_of_batch else (rows,), dtype=q.dtype, requires_grad=True)
    target = (1 - smoothing) * leaf + smoothing / classes
    inner_loss = (u * cross_entropy(target, z)).mean()
    moved, new_state = stepped(inner_loss, theta, rule, state)
    if not one_stream:
        torch.set_rng_state(own_stream(after_inner))
    outer_loss = F.cross_entropy(outputs_at(student, moved, outer[0]), outer[1])
    torch.set_rng_state(end)

    if kind in ("soft", "expected"):
        (signal_grad,) = torch.autograd.grad(outer_loss, leaf)
        objective = (signal_grad * q).sum()
    else:
        (signal_grad,) = torch.autograd.grad(outer_loss, u)
        objective = (signal_grad * (log_q * one_hot).sum(-1)).sum()
        if kind == "batch_mean":
            objective = objective / rows
    grads = torch.autograd.grad(objective, list(phi.values()))
    return Found(
        grads=dict(zip(phi, grads, strict=True)),
        signal_grad=signal_grad.detach(),
        student_params=_constant(moved),
        state=new_state,
        inner_loss=inner_loss.detach(),
        outer_loss=outer_loss.detach(),
        labels=labels,
    )


@dataclass(frozen=True)
class FoundAhead:
    """What the reference finds over several student steps, as :class:`Found`."""

    grads: Tree
    signal_grads: list[Tensor]
    student_params: Tree
    outer_loss: Tensor


def several_steps(
    teacher: nn.Module,
    student: nn.Module,
    outer: tuple[Tensor, Tensor],
    batches: list[Any],
    rule: Rule | list[Rule],
    state: Any = None,
    *,
    kind: str = "soft",
) -> FoundAhead:
    """Take student steps on the batches one after another, all in one graph.

    Args:
        rule: of all steps, or of each.
        kind: ``"soft"`` or ``"expected"``.
    """
    theta = weights(student)
    phi = weights(teacher)
    rules = rule if isinstance(rule, list) else [rule] * len(batches)
    leaves = []
    signals = []
    for batch, rule_of_step in zip(batches, rules, strict=True):
        weak, strong = views(batch)
        z = outputs_at(student, theta, strong)
        after_inner = torch.get_rng_state()
        q = torch.softmax(outputs_at(teacher, phi, weak), -1)
        value = q
        if kind == "expected":
            value = F.one_hot(drawn(q), q.shape[-1]).to(q)
        leaf = value.detach().requires_grad_()
        leaves.append(leaf)
        signals.append(q)
        theta, state = stepped(cross_entropy(leaf, z).mean(), theta, rule_of_step, state)
    end = torch.get_rng_state()
    torch.set_rng_state(own_stream(after_inner))
    outer_loss = F.cross_entropy(outputs_at(student, theta, outer[0]), outer[1])
    torch.set_rng_state(end)
    signal_grads = torch.autograd.grad(outer_loss, leaves)
    objective = sum((g * q).sum() for g, q in zip(signal_grads, signals, strict=True))
    grads = torch.autograd.grad(objective, list(phi.values()))
    return FoundAhead(
        grads=dict(zip(phi, grads, strict=True)),
        signal_grads=list(signal_grads),
        student_params=_constant(theta),
        outer_loss=outer_loss.detach(),
    )


def flat(tree: Tree | Tensor) -> Tensor:
    """Return all entries of a tree in one vector of float64, without a graph."""
    if not isinstance(tree, Tensor):
        tree = torch.cat([t.flatten() for t in tree.values()])
    return tree.detach().double()


def error(value: Tree | Tensor, expected: Tree | Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all entries."""
    a = flat(value)
    b = flat(expected)
    assert b.norm() > 0, "an expected value of zero proves nothing here"
    return float((a - b).norm() / b.norm())


def _constant(tree: Tree) -> Tree:
    """Return a tree without its graph."""
    return {name: t.detach() for name, t in tree.items()}
