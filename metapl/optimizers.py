r"""Inner optimisers: the student's update θ′ = U(θ, g) as a function, and its pullback w = (∂U/∂g)ᵀ v.

The estimators need two things of an update that optimisers do not offer: to be differentiated through, and to be left
undone. So the update rules of ``torch.optim`` SGD, Adam and AdamW stand here as functions of (θ, g, state); the state
is read from the real optimiser, which alone moves the student in the end. A TorchOpt transform is such a function
already.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, FunctionType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.numerics import Tree, dot, norm

Parameters = Mapping[str, nn.Parameter]


class InnerOptimizer(Protocol):
    """The contract between the inner step and an optimiser; trees are dictionaries by parameter name.

    ``grads`` may lack parameters that the inner loss does not reach: these do not move.
    """

    @property
    def learning_rate(self) -> float | None:
        """η where it is known (the first group's), for feedback that is measured in units of it."""
        ...

    def follow(self, parameters: Parameters) -> None:
        """Go on with the student's trainable parameters as they are now; refuse those that it would not move."""
        ...

    def read_state(self) -> Any:
        """The current state, to be handed to :meth:`update`; reading it changes nothing."""
        ...

    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        """θ′ = U(θ, g) and the next state, differentiable in g."""
        ...

    def pullback(self, params: Tree, grads: Tree, state: Any, v: Tree) -> Tree:
        """w = (∂U/∂g)ᵀ v at (θ, g, state)."""
        ...

    def commit(self, parameters: Parameters, grads: Tree, new_params: Tree, new_state: Any) -> None:
        """Move the real parameters."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, as plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        ...


def _is_transform(optimizer: Any) -> bool:
    return (
        isinstance(optimizer, tuple)
        and callable(getattr(optimizer, "init", None))
        and callable(getattr(optimizer, "update", None))
    )


def inner_optimizer(optimizer: Any, parameters: Parameters, state: Any = None) -> InnerOptimizer:
    """The functional view of a ``torch.optim`` optimiser or a TorchOpt transform.

    Args:
        optimizer: ``torch.optim`` SGD, Adam or AdamW over exactly the student's trainable parameters, or a TorchOpt
            transform such as ``torchopt.sgd(0.1, momentum=0.9)``.
        parameters: the student's trainable parameters by name.
        state: a TorchOpt transform's state to go on from; ``None`` starts afresh.

    Raises:
        MetaplError: an optimiser that is not supported, or one that does not hold the student's parameters, or a state
            handed in beside a ``torch.optim`` optimiser, which has its own.
    """
    if _is_transform(optimizer):
        return TransformUpdate(optimizer, parameters, state)
    rule = _RULES.get(type(optimizer))
    if rule is None:
        raise MetaplError(
            f"inner_optimizer is {_describe(optimizer)}, whose update metapl cannot differentiate; expected "
            "torch.optim.SGD, Adam or AdamW (these classes themselves), or a TorchOpt transform such as "
            "torchopt.sgd(0.1, momentum=0.9)."
        )
    if state is not None:
        raise MetaplError(
            f"inner_state was given beside torch.optim.{type(optimizer).__name__}, which holds its own state; "
            "leave inner_state=None, or use a TorchOpt transform."
        )
    return TorchUpdate(optimizer, parameters, rule)


def _describe(optimizer: Any) -> str:
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return f"{'the class ' if isinstance(optimizer, type) else ''}{kind.__module__}.{kind.__qualname__}"


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that an optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def refuse_not_held(name: str, optimizer: torch.optim.Optimizer, parameters: Parameters, network: str) -> None:
    """Refuse an optimizer that would leave some of a network's trainable parameters where they are.

    Args:
        name: of the argument that the optimizer came in.
        parameters: the network's trainable parameters, by name.
        network: ``"teacher"`` or ``"student"``.
    """
    known = {id(p) for p in held(optimizer)}
    missing = [path for path, p in parameters.items() if id(p) not in known]
    if missing:
        raise MetaplError(
            f"{name} holds {len(known)} tensors, the {network} has {len(parameters)} trainable parameters, of which "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} are not held, so they would not be "
            f"trained; build it as torch.optim.SGD({network}.parameters(), ...) from the {network} that is trained. "
            f"Parameters that are new, such as a head put in later, are added by {name}.add_param_group."
        )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and group["lr"].ndim:
            raise MetaplError(
                f"{name} has lr={group['lr']}, a tensor of shape {tuple(group['lr'].shape)}; expected a number, or a "
                "tensor without dimensions, such as torch.tensor(0.1)."
            )


class TorchUpdate:
    """The update of a ``torch.optim`` optimiser, from its current state and param groups."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Parameters, rule: _Rule) -> None:
        self.optimizer, self.rule = optimizer, rule
        for option in ("differentiable", "capturable"):
            if any(group.get(option) for group in optimizer.param_groups):
                raise MetaplError(f"inner_optimizer has {option}=True, which metapl does not support; leave it out.")
        self.follow(parameters)
        own = {id(p) for p in parameters.values()}
        foreign = [p for p in held(optimizer) if p.requires_grad and id(p) not in own]
        if foreign:
            raise MetaplError(
                f"inner_optimizer holds {len(held(optimizer))} tensors, the student has {len(parameters)} trainable "
                f"parameters; {len(foreign)} of the tensors are not the student's. Build it as "
                "torch.optim.SGD(student.parameters(), ...) from the student that is trained."
            )

    def follow(self, parameters: Parameters) -> None:
        refuse_not_held("inner_optimizer", self.optimizer, parameters, "student")
        groups = enumerate(self.optimizer.param_groups)
        group_of = {id(p): number for number, group in groups for p in group["params"]}
        self.group_of = {name: group_of[id(p)] for name, p in parameters.items()}
        self.parameters = dict(parameters)

    @property
    def learning_rate(self) -> float | None:
        return float(self.optimizer.param_groups[0]["lr"])

    def read_state(self) -> dict[str, dict[str, Any]]:
        return {name: dict(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}

    def update(self, params: Tree, grads: Tree, state: dict[str, dict[str, Any]]) -> tuple[Tree, Any]:
        new_params, new_state = dict(params), dict(state)
        for group, names in self._groups(grads):
            moved, states = self.rule.update(*_columns(names, params, grads, state), group)
            new_params.update(zip(names, moved, strict=True))
            new_state.update(zip(names, states, strict=True))
        return new_params, new_state

    def pullback(self, params: Tree, grads: Tree, state: dict[str, dict[str, Any]], v: Tree) -> Tree:
        w: Tree = {}
        for group, names in self._groups(grads):
            slopes = self.rule.slopes(*_columns(names, params, grads, state), group)
            w.update(zip(names, torch._foreach_mul([v[name] for name in names], slopes), strict=True))
        return {name: w[name] for name in grads}

    def commit(self, parameters: Parameters, grads: Tree, new_params: Tree, new_state: Any) -> None:
        # A frozen parameter that the optimizer holds must not be moved by a gradient left over from earlier.
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for name, p in parameters.items():
                p.grad = grads.get(name)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def _groups(self, grads: Tree) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """The param groups, each with the names of its parameters that have a gradient."""
        for number, group in enumerate(self.optimizer.param_groups):
            names = [name for name in grads if self.group_of[name] == number]
            if names:
                yield group, names


Tensors = list[Tensor] | tuple[Tensor, ...]
Columns = tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]


def _columns(names: Sequence[str], params: Tree, grads: Tree, state: dict[str, dict[str, Any]]) -> Columns:
    return [params[n] for n in names], [grads[n] for n in names], [state[n] for n in names]


class _Rule(Protocol):
    """The update of a param group; ``slopes`` are ∂θ′/∂g, elementwise, since none of these mixes entries.

    Lists go through PyTorch's fused operations on lists: a few kernels for all parameters, where their number would
    keep a GPU waiting for the host.
    """

    @staticmethod
    def update(
        params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> tuple[Tensors, list[dict[str, Any]]]: ...

    @staticmethod
    def slopes(
        params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> Any: ...


class _SGD:
    r"""d = ±g + λθ; buf′ = μ buf + (1−τ) d (the first time: buf′ = d); θ′ = θ − η (d + μ buf′ | buf′ | d).

    ∂θ′/∂g = ∓η·c, where c is 1 without momentum, 1−τ with (1 the first time), and 1 + μ for Nesterov.
    """

    @staticmethod
    def update(
        params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        d: Tensors = torch._foreach_neg(grads) if group["maximize"] else grads
        d = torch._foreach_add(d, params, alpha=group["weight_decay"]) if group["weight_decay"] != 0 else d
        mu = group["momentum"]
        if mu != 0:
            bufs = _SGD._momentum(d, [state.get("momentum_buffer") for state in states], group)
            states = [{**state, "momentum_buffer": buf.detach()} for state, buf in zip(states, bufs, strict=True)]
            d = torch._foreach_add(d, bufs, alpha=mu) if group["nesterov"] else bufs
        return torch._foreach_sub(params, torch._foreach_mul(d, group["lr"])), states

    @staticmethod
    def _momentum(d: Tensors, bufs: list[Tensor | None], group: dict[str, Any]) -> Tensors:
        mu, damped = group["momentum"], 1 - group["dampening"]
        old = [buf for buf in bufs if buf is not None]
        if len(old) == len(bufs):
            return torch._foreach_add(torch._foreach_mul(old, mu), d, alpha=damped)
        return [one if buf is None else mu * buf + damped * one for one, buf in zip(d, bufs, strict=True)]

    @staticmethod
    def slopes(params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> Any:
        mu, sign = group["momentum"], 1.0 if group["maximize"] else -1.0
        factors = []
        for state in states:
            c = 1.0
            if mu != 0:
                fresh = state.get("momentum_buffer") is None
                c = 1.0 if fresh else 1.0 - group["dampening"]
                c = 1.0 + mu * c if group["nesterov"] else c
            factors.append(sign * c)
        lr = group["lr"]
        if isinstance(lr, Tensor):
            return [(lr * c).to(p) for c, p in zip(factors, params, strict=True)]
        return [lr * c for c in factors]


class _Adam:
    r"""m′ = β₁m + (1−β₁)d; n′ = β₂n + (1−β₂)d²; θ′ = θ(1−ηλ) − η m̂/(√n̂ + ε), with d = ±g (+ λθ where λ is coupled).

    ∂θ′/∂d = −η/(√n̂+ε) · [ (1−β₁)/(1−β₁ᵗ) − m̂/(√n̂+ε) · (1−β₂) d / ((1−β₂ᵗ) √n̂) ], the last quotient being 0 where
    n̂ = 0: there d = 0, and the update is differentiable in d because m̂ vanishes with it.
    """

    @staticmethod
    def _moments(
        p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any], Tensor, Tensor]:
        decoupled = group.get("decoupled_weight_decay", False)
        d = -g if group["maximize"] else g
        if not decoupled:
            d = d + group["weight_decay"] * p
        beta1, beta2 = group["betas"]
        zeros = torch.zeros_like(p)
        t = float(state.get("step", 0.0)) + 1.0
        m = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * d
        n = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * d * d
        new = {**state, "step": torch.tensor(t), "exp_avg": m.detach(), "exp_avg_sq": n.detach()}
        if group["amsgrad"]:
            n = torch.maximum(state.get("max_exp_avg_sq", zeros), n)
            new["max_exp_avg_sq"] = n.detach()
        return d, new, m / (1 - beta1**t), n / (1 - beta2**t)

    @staticmethod
    def update(
        params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> tuple[Tensors, list[dict[str, Any]]]:
        moved = [_Adam._update(*one, group) for one in zip(params, grads, states, strict=True)]
        return [p for p, _ in moved], [state for _, state in moved]

    @staticmethod
    def slopes(params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> Any:
        return [_Adam._slope(*one, group) for one in zip(params, grads, states, strict=True)]

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        _, new, m_hat, n_hat = _Adam._moments(p, g, state, group)
        # The square root's own derivative is infinite at 0, where the update's is not: keep it out of the graph.
        root = torch.where(n_hat > 0, torch.where(n_hat > 0, n_hat, 1.0).sqrt(), 0.0)
        decay = group["lr"] * group["weight_decay"] if group.get("decoupled_weight_decay", False) else 0.0
        return p * (1 - decay) - group["lr"] * m_hat / (root + group["eps"]), new

    @staticmethod
    def _slope(p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        d, new, m_hat, n_hat = _Adam._moments(p, g, state, group)
        beta1, beta2 = group["betas"]
        t = float(new["step"])
        root = n_hat.sqrt()
        denominator = root + group["eps"]
        d_root = torch.where(root > 0, (1 - beta2) / (1 - beta2**t) * d / root, 0.0)
        if group["amsgrad"]:  # where an older maximum rules, n̂ does not depend on d
            d_root = torch.where(new["exp_avg_sq"] >= new["max_exp_avg_sq"], d_root, 0.0)
        slope: Tensor = ((1 - beta1) / (1 - beta1**t) - m_hat / denominator * d_root) / denominator
        eta: float = -group["lr"] if group["maximize"] else group["lr"]
        return -eta * slope


_RULES: dict[type, _Rule] = {torch.optim.SGD: _SGD, torch.optim.Adam: _Adam, torch.optim.AdamW: _Adam}


class TransformUpdate:
    """The update of a TorchOpt transform: its state goes in and comes out, its pullback is the VJP of ``update``.

    Three of TorchOpt's traps are closed here. ``trace`` forgets the momentum of a state handed to a fresh transform
    (a hidden first-call flag): the flag is spent on a dummy call, so with ``dampening`` the first step is damped like
    every other, which TorchOpt's own is not. The VJP of ``adam`` is NaN where a gradient entry is
    exactly zero: it is taken at an entry too small to matter instead. ``clip_grad_norm`` hides its norm from autograd:
    its exact derivative is put in its place, in chains and masks too. What else has a wrong VJP, such as
    ``adam(use_accelerated_op=True)``, is found by a central difference on small tensors, once, and refused.
    """

    learning_rate: float | None = None

    def __init__(self, transform: Any, parameters: Parameters, state: Any) -> None:
        self.transform = _with_differentiable_clip(transform)
        self.parameters = dict(parameters)
        theta = {name: p.detach() for name, p in parameters.items()}
        zeros = {name: torch.zeros_like(t) for name, t in theta.items()}
        fresh = self.transform.init(theta)
        self.transform.update(zeros, fresh, params=theta, inplace=False)
        self.state = fresh if state is None else state
        if transform.update not in _checked:
            _refuse_wrong_vjp(self.transform, theta)
            _checked.add(transform.update)

    def follow(self, parameters: Parameters) -> None:
        known = self.parameters
        changed = [name for name in {**known, **parameters} if known.get(name) is not parameters.get(name)]
        if changed:
            raise MetaplError(
                f"the student's trainable parameters are not those that the state of the TorchOpt transform was made "
                f"for: {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''} came, went or were replaced. "
                "Build a new BilevelTrainer, or use a torch.optim inner optimizer and its add_param_group."
            )

    def read_state(self) -> Any:
        return self.state

    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        grads = self._filled(params, grads)
        if any(g.requires_grad for g in grads.values()):
            grads = {name: _off_zero(g) for name, g in grads.items()}
        updates, state = self.transform.update(grads, state, params=params, inplace=False)
        return {name: p + updates[name] for name, p in params.items()}, _detached(state)

    def pullback(self, params: Tree, grads: Tree, state: Any, v: Tree) -> Tree:
        return _vjp(self.transform, params, self._filled(params, grads), state, v)

    def commit(self, parameters: Parameters, grads: Tree, new_params: Tree, new_state: Any) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(new_params[name])
        self.state = new_state

    def state_dict(self) -> dict[str, Any]:
        return {"leaves": pytree.tree_leaves(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The structure is the transform's own: only its leaves are stored, so that no code is read from a file.
        leaves, structure = pytree.tree_flatten(self.state)
        if len(leaves) != len(state["leaves"]):
            raise MetaplError(
                f"the stored state has {len(state['leaves'])} entries, this transform's has {len(leaves)}; build the "
                "transform as it was built before."
            )
        placed = [
            new.to(old.device) if isinstance(old, Tensor) else new
            for old, new in zip(leaves, state["leaves"], strict=True)
        ]
        self.state = pytree.tree_unflatten(placed, structure)

    @staticmethod
    def _filled(params: Tree, grads: Tree) -> Tree:
        return {name: grads[name] if name in grads else torch.zeros_like(p) for name, p in params.items()}


def _off_zero(g: Tensor) -> Tensor:
    """g with exact zeros moved to a number too small to matter: sqrt(g²) has no derivative at 0 for autograd.

    For an update that is smooth at 0, such as Adam's with its ε, the derivative differs by O(1e-15/ε).
    """
    return torch.where(g == 0, g + (1e-60 if g.dtype == torch.float64 else 1e-15), g)


def _detached(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, tree)


def _vjp(transform: Any, params: Tree, grads: Tree, state: Any, v: Tree) -> Tree:
    """(∂U/∂g)ᵀ v by autograd through the transform's ``update``."""
    at = {name: _off_zero(g).requires_grad_() for name, g in grads.items()}
    with torch.enable_grad():
        moved, _ = transform.update(at, state, params=params, inplace=False)
    pulled = torch.autograd.grad(
        [moved[name] for name in v], list(at.values()), [v[name] for name in v], materialize_grads=True
    )
    return dict(zip(at, pulled, strict=True))


_checked: WeakSet[Any] = WeakSet()
"""The ``update`` functions of transforms whose VJP was found right."""


def _refuse_wrong_vjp(transform: Any, like: Tree) -> None:
    """Compare ⟨(∂U/∂g)ᵀv, d⟩ with a central difference of ⟨v, U⟩, on small float64 tensors of the names in ``like``.

    At the first step with small gradients, where Adam's ε counts, and at the third with large ones, where a clip works.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = {name: [min(n, 2) for n in t.shape] for name, t in like.items()}

    def tree(scale: float) -> Tree:
        """Entries of random sign, none of them near 0."""
        drawn = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
        return {name: scale * (t / 2 + t.sign() / 2) for name, t in drawn.items()}

    for steps, scale in ((0, 1e-2), (2, 1e2)):
        params, g, d, v = tree(1.0), tree(scale), tree(scale), tree(1.0)
        state = transform.init(params)
        for _ in range(steps):
            _, state = transform.update(tree(scale), state, params=params, inplace=False)
        by_autograd = sum(float((t * d[name]).sum()) for name, t in _vjp(transform, params, g, state, v).items())
        ahead, behind = (
            transform.update({n: t + eps * d[n] for n, t in g.items()}, state, params=params, inplace=False)[0]
            for eps in (1e-6, -1e-6)
        )
        terms = torch.cat([(v[n] * (ahead[n] - behind[n]) / 2e-6).flatten() for n in v])
        by_difference = float(terms.sum())
        bound = 1e-3 * (abs(by_autograd) + abs(by_difference) + float(terms.norm())) + 1e-9
        if not abs(by_autograd - by_difference) <= bound:
            raise MetaplError(
                f"inner_optimizer is a transform whose derivative in the gradient is wrong: along one direction it is "
                f"{by_autograd:.4g} by autograd and {by_difference:.4g} by a difference of updates, so the feedback "
                "would be wrong. Of TorchOpt's own, adam and adamw with use_accelerated_op=True are such: leave that "
                "out, or use torch.optim SGD, Adam or AdamW."
            )


def _with_differentiable_clip(transform: Any, within: tuple[Any, ...] = ()) -> Any:
    """The transform with TorchOpt's ``clip_grad_norm`` replaced by one that autograd sees, wherever it stands: alone,
    in a chain, or inside a transform that wraps others, such as ``masked``."""
    update = _seen_by_autograd(transform.update, within)
    if update is transform.update:
        return transform
    import torchopt

    return torchopt.base.GradientTransformation(transform.init, update)


def _seen_by_autograd(thing: Any, within: tuple[Any, ...]) -> Any:
    """A function, transform or tuple of these, with the clips that its functions close over replaced.

    Args:
        thing: what is looked into; anything else is returned as it is.
        within: the functions around it, which it may close over again.
    """
    if _is_transform(thing):
        return _with_differentiable_clip(thing, within)
    if type(thing) is tuple:
        parts = tuple(_seen_by_autograd(part, within) for part in thing)
        return parts if any(new is not old for new, old in zip(parts, thing, strict=True)) else thing
    if not isinstance(thing, FunctionType) or not thing.__closure__ or thing in within:
        return thing
    if thing.__module__ == "torchopt.clip":
        closed = inspect.getclosurevars(thing).nonlocals
        return _clip_update(float(closed["max_norm"]), closed["norm_type"])
    cells = tuple(_cell_seen_by_autograd(cell, (*within, thing)) for cell in thing.__closure__)
    if all(new is old for new, old in zip(cells, thing.__closure__, strict=True)):
        return thing
    copy = FunctionType(thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, cells)
    copy.__kwdefaults__ = thing.__kwdefaults__
    return copy


def _cell_seen_by_autograd(cell: CellType, within: tuple[Any, ...]) -> CellType:
    try:
        old = cell.cell_contents
    except ValueError:  # not assigned yet
        return cell
    new = _seen_by_autograd(old, within)
    return cell if new is old else CellType(new)


def _clip_update(max_norm: float, norm_type: float) -> Callable[..., tuple[Any, Any]]:
    """g · min(1, max_norm / (‖g‖ + 1e-6)), ‖·‖ over all parameters: TorchOpt's rule, with its derivative."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        # What a mask leaves out is an empty node, without a tensor.
        present = [g for g in pytree.tree_leaves(updates) if isinstance(g, Tensor)]
        if not present:
            return updates, state
        flat = torch.cat([g.flatten() for g in present])
        scale = (max_norm / (torch.linalg.vector_norm(flat, norm_type) + 1e-6)).clamp(max=1.0)
        return pytree.tree_map_only(Tensor, lambda g: g * scale, updates), state

    return update


class Clipped:
    r"""Another update behind a clip of the gradient's global norm: θ′ = U(θ, c(g)·g), c = min(1, m/(‖g‖ + 1e-6)).

    .. math:: w = c\,\tilde w - [c < 1]\, \frac{c}{\|g\| + 10^{-6}} \Big\langle \tilde w, \tfrac{g}{\|g\|} \Big\rangle g
              , \qquad \tilde w = (\partial U/\partial g)^\top v \text{ at } c\,g

    The rule is that of ``torch.nn.utils.clip_grad_norm_``.
    """

    def __init__(self, inner: InnerOptimizer, max_norm: float) -> None:
        if not max_norm > 0:
            raise MetaplError(f"clip_norm={max_norm}: expected a number above 0, or None.")
        self.inner, self.max_norm = inner, max_norm

    @property
    def learning_rate(self) -> float | None:
        return self.inner.learning_rate

    def follow(self, parameters: Parameters) -> None:
        self.inner.follow(parameters)

    def read_state(self) -> Any:
        return self.inner.read_state()

    def _scale(self, grads: Tree) -> tuple[Tensor, Tensor]:
        length = norm(grads)
        return (self.max_norm / (length + 1e-6)).clamp(max=1.0), length

    def _clip(self, grads: Tree) -> Tree:
        scale, _ = self._scale(grads)
        return {name: g * scale.to(g.dtype) for name, g in grads.items()}

    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        return self.inner.update(params, self._clip(grads), state)

    def pullback(self, params: Tree, grads: Tree, state: Any, v: Tree) -> Tree:
        w = self.inner.pullback(params, self._clip(grads), state, v)
        scale, length = self._scale(grads)
        along = torch.where(scale < 1, scale / (length + 1e-6) * dot(w, grads) / length, torch.zeros_like(scale))
        clipped = {name: scale.to(t.dtype) * t for name, t in w.items()}
        return {n: t - along.to(t.dtype) * grads[n] if n in grads else t for n, t in clipped.items()}

    def commit(self, parameters: Parameters, grads: Tree, new_params: Tree, new_state: Any) -> None:
        self.inner.commit(parameters, self._clip(grads), new_params, new_state)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)
