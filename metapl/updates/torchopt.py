"""TorchOpt transforms: functional updates, with corrections for their known defects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import CellType, FunctionType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.numerics import Tree
from metapl.updates.base import Cotangents, Parameters, Update


def is_transform(optimizer: Any) -> bool:
    """Whether an optimizer is a TorchOpt transform: a named pair of ``init`` and ``update``."""
    return (
        isinstance(optimizer, tuple)
        and callable(getattr(optimizer, "init", None))
        and callable(getattr(optimizer, "update", None))
    )


class TransformUpdate(Update):
    """The update of a TorchOpt transform: its state goes in and comes out, its pullback is the VJP of ``update``.

    Three defects of TorchOpt are corrected here. ``trace`` ignores the momentum of a given state on its first call (it
    has a hidden flag): a dummy call clears the flag, so with ``dampening`` the first step is damped like every other,
    unlike TorchOpt's own. The VJP of ``adam`` is NaN where a gradient entry is exactly zero: there it is taken at a
    negligible entry. ``clip_grad_norm`` hides its norm from autograd: it is replaced by a differentiable clip, also in
    chains and masks. Transforms with another wrong VJP, such as ``adam(use_accelerated_op=True)``, are detected once,
    by a central difference on small tensors, and refused.
    """

    def __init__(self, transform: Any, parameters: Parameters, state: Any) -> None:
        self.transform = _with_differentiable_clip(transform)
        self._parameters = dict(parameters)
        theta = {name: p.detach() for name, p in parameters.items()}
        zeros = {name: torch.zeros_like(t) for name, t in theta.items()}
        fresh = self.transform.init(theta)
        self.transform.update(zeros, fresh, params=theta, inplace=False)
        self.state = fresh if state is None else state
        if transform.update not in _checked:
            _refuse_wrong_vjp(self.transform, theta)
            _checked.add(transform.update)

    def follow(self, parameters: Parameters) -> None:
        known = self._parameters
        changed = [name for name in {**known, **parameters} if known.get(name) is not parameters.get(name)]
        if changed:
            raise MetaplError(
                f"the student's trainable parameters have changed since the state of the TorchOpt transform was made: "
                f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''} were added, removed or replaced. "
                "Build a new BilevelTrainer, or use a torch.optim inner optimizer and its add_param_group."
            )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self._parameters

    def read_state(self) -> Any:
        return self.state

    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        grads = self._filled(params, grads)
        if any(g.requires_grad for g in grads.values()):
            grads = {name: _off_zero(g) for name, g in grads.items()}
        updates, state = self.transform.update(grads, state, params=params, inplace=False)
        return {name: p + updates[name] for name, p in params.items()}, state

    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(params[name])
        self.state = pytree.tree_map_only(Tensor, Tensor.detach, state)

    def state_dict(self) -> dict[str, Any]:
        return {"leaves": pytree.tree_leaves(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Only the leaves are stored, and the structure comes from the transform, so that no code is loaded from a file.
        leaves, structure = pytree.tree_flatten(self.state)
        if len(leaves) != len(state["leaves"]):
            raise MetaplError(
                f"the stored state has {len(state['leaves'])} entries, this transform's has {len(leaves)}; expected "
                "the state of a transform that is built in the same way."
            )
        placed = [
            new.to(old.device) if isinstance(old, Tensor) else new
            for old, new in zip(leaves, state["leaves"], strict=True)
        ]
        self.state = pytree.tree_unflatten(placed, structure)

    def _vjp(
        self, params: Tree, grads: Tree, state: Any, v: Tree, state_cotangent: Any, *, only_gradient: bool
    ) -> Cotangents:
        filled = self._filled(params, grads)
        return super()._vjp(params, filled, state, v, state_cotangent, only_gradient=only_gradient)

    @staticmethod
    def _filled(params: Tree, grads: Tree) -> Tree:
        return {name: grads[name] if name in grads else torch.zeros_like(p) for name, p in params.items()}


def _off_zero(g: Tensor) -> Tensor:
    """g with exact zeros replaced by a negligible number: for autograd, sqrt(g²) has no derivative at 0.

    For an update that is smooth at 0, such as Adam's with its ε, the derivative differs by O(1e-15/ε).
    """
    return torch.where(g == 0, g + (1e-60 if g.dtype == torch.float64 else 1e-15), g)


_checked: WeakSet[Any] = WeakSet()
"""The ``update`` functions of transforms whose VJP is known to be right."""


def _refuse_wrong_vjp(transform: Any, like: Tree) -> None:
    """Compare derivatives by autograd with central differences: of ⟨v, U⟩ along a direction of g, and of
    ⟨v, U⟩ + ⟨c, s′⟩ along one of s.

    At the first step with small gradients, where Adam's ε counts, and at the third with large ones, where a clip works.
    """
    for steps, scale, in_state in ((0, 1e-2, False), (2, 1e2, False), (2, 1e2, True)):
        by_autograd, terms = _slopes(transform, like, steps, scale, in_state)
        by_difference = float(terms.sum())
        bound = 1e-3 * (abs(by_autograd) + abs(by_difference) + float(terms.norm())) + 1e-9
        if not abs(by_autograd - by_difference) <= bound:
            raise MetaplError(
                "inner_optimizer is a transform whose derivative in the gradient, or in its state, is wrong: along one "
                f"direction it is {by_autograd:.4g} by autograd and {by_difference:.4g} by a difference of updates, so "
                "the feedback would be wrong. Of TorchOpt's own, adam and adamw with use_accelerated_op=True are such: "
                "leave that out, or use torch.optim SGD, Adam or AdamW."
            )


def _slopes(transform: Any, like: Tree, steps: int, scale: float, in_state: bool) -> tuple[float, Tensor]:
    """One of these derivatives after ``steps`` steps with gradients of size ``scale``: by autograd, and its terms by
    differences; on small float64 tensors of the names in ``like``."""
    draw = torch.Generator().manual_seed(steps)

    def off_zero(shape: Sequence[int]) -> Tensor:
        """Entries of random sign, none of them near 0."""
        t = torch.randn(shape, generator=draw, dtype=torch.float64)
        return t / 2 + t.sign() / 2

    def tree(scale: float) -> Tree:
        return {name: scale * off_zero([min(n, 2) for n in t.shape]) for name, t in like.items()}

    params, g, d, v = tree(1.0), tree(scale), tree(scale), tree(1.0)
    state = transform.init(params)
    for _ in range(steps):
        _, state = transform.update(tree(scale), state, params=params, inplace=False)
    leaves, structure = pytree.tree_flatten(state)
    s = {i: t.detach() for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()}
    # Relative to s, so that second moments stay positive and weigh no more than first ones.
    e = {i: in_state * t * off_zero(t.shape).abs() for i, t in s.items()}
    c = {i: in_state * off_zero(t.shape) / t.abs().clamp_min(1e-12) for i, t in s.items()}
    d = {n: (not in_state) * t for n, t in d.items()}

    def terms(g: Tree, s: dict[int, Tensor]) -> Tensor:
        before = pytree.tree_unflatten([s.get(i, t) for i, t in enumerate(leaves)], structure)
        moved, state = transform.update(g, before, params=params, inplace=False)
        after = pytree.tree_leaves(state)
        return torch.cat([*((v[n] * moved[n]).flatten() for n in v), *((c[i] * after[i]).flatten() for i in c)])

    at = {n: _off_zero(t).requires_grad_() for n, t in g.items()}
    at_state = {i: t.clone().requires_grad_() for i, t in s.items()}
    with torch.enable_grad():
        inputs = [*at.values(), *at_state.values()]
        pulled = torch.autograd.grad(terms(at, at_state).sum(), inputs, materialize_grads=True)
    by_autograd = sum(float((p * t).sum()) for p, t in zip(pulled, [*d.values(), *e.values()], strict=True))
    ahead, behind = (
        terms({n: t + eps * d[n] for n, t in g.items()}, {i: t + eps * e[i] for i, t in s.items()})
        for eps in (1e-6, -1e-6)
    )
    return by_autograd, (ahead - behind) / 2e-6


def _with_differentiable_clip(transform: Any, within: tuple[Any, ...] = ()) -> Any:
    """The transform with TorchOpt's ``clip_grad_norm`` replaced by a differentiable one, wherever it is used:
    by itself, in a chain, or inside a transform that wraps others, such as ``masked``."""
    update = _seen_by_autograd(transform.update, within)
    if update is transform.update:
        return transform
    import torchopt

    return torchopt.base.GradientTransformation(transform.init, update)


def _seen_by_autograd(value: Any, within: tuple[Any, ...]) -> Any:
    """A function, transform or tuple of these, with the clips that its functions close over replaced.

    Args:
        value: the function, transform or tuple; any other value is returned unchanged.
        within: the enclosing functions, to stop at cycles.
    """
    if is_transform(value):
        return _with_differentiable_clip(value, within)
    if type(value) is tuple:
        parts = tuple(_seen_by_autograd(part, within) for part in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if not isinstance(value, FunctionType) or not value.__closure__ or value in within:
        return value
    if value.__module__ == "torchopt.clip":
        closed = inspect.getclosurevars(value).nonlocals
        return _clip_update(float(closed["max_norm"]), closed["norm_type"])
    cells = tuple(_cell_seen_by_autograd(cell, (*within, value)) for cell in value.__closure__)
    if all(new is old for new, old in zip(cells, value.__closure__, strict=True)):
        return value
    copy = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    copy.__kwdefaults__ = value.__kwdefaults__
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
        # A mask replaces the tensors that it leaves out by empty nodes.
        present = [g for g in pytree.tree_leaves(updates) if isinstance(g, Tensor)]
        if not present:
            return updates, state
        flat = torch.cat([g.flatten() for g in present])
        scale = (max_norm / (torch.linalg.vector_norm(flat, norm_type) + 1e-6)).clamp(max=1.0)
        return pytree.tree_map_only(Tensor, lambda g: g * scale, updates), state

    return update
