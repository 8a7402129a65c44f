"""TorchOpt transforms: functional updates, with corrections for their known defects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.checks import transformed
from metapl.execution.numerics import Tree
from metapl.updates.base import OptimizerState, Options, Parameters, Update


class Transform(Protocol):
    """A functional optimizer as TorchOpt makes it: a named pair of functions."""

    @property
    def init(self) -> Callable[..., Any]:
        """The first state, of the parameters by name."""

    @property
    def update(self) -> Callable[..., Any]:
        """The updates and the next state, of gradients, state and ``params=``."""


def is_transform(optimizer: object) -> bool:
    """Return whether an optimizer is a TorchOpt transform: a named pair ``init`` and ``update``."""
    if not isinstance(optimizer, tuple):
        return False
    has_init = callable(getattr(optimizer, "init", None))
    has_update = callable(getattr(optimizer, "update", None))
    return has_init and has_update


class TransformUpdate(Update):
    """The update of a TorchOpt transform: its state goes in and comes out.

    The adjoint is autograd's. Two defects of TorchOpt are corrected here. ``trace`` ignores the
    momentum of a given state on its first call, by a hidden flag that a dummy call clears; so with
    ``dampening`` the first step is damped too. The VJP of ``adam`` is NaN where a gradient entry is
    exactly zero: it is taken at a negligible entry. Other wrong VJPs, such as that of
    ``clip_grad_norm``, are found by the verification of the first step.

    Attributes:
        is_learned: whether what the transform returns requires a gradient, because it reads a
            learned tensor.
        state: the transform's.
    """

    def __init__(self, transform: Transform, parameters: Parameters, state: OptimizerState) -> None:
        self.transform = transform
        self.parameters = dict(parameters)
        theta = {name: p.detach() for name, p in parameters.items()}
        initial_state = transform.init(theta)
        zeros = {name: torch.zeros_like(t) for name, t in theta.items()}
        # The dummy call.
        result = transform.update(zeros, initial_state, params=theta, inplace=False)
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.is_learned = any(t.requires_grad for t in tensors)
        self.state = initial_state if state is None else state

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformUpdate:
        # A chain of TorchOpt is a tuple of two functions, whose copy is a chain of these two.
        memo[id(self.transform)] = self.transform
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def follow(self, parameters: Parameters) -> None:
        changed: list[str] = []
        for name in {**self.parameters, **parameters}:
            if self.parameters.get(name) is not parameters.get(name):
                changed.append(name)
        if changed:
            raise MetaplError(f"the student's {few(changed, 3)} changed; expected a new trainer.")

    def read_state(self) -> OptimizerState:
        return self.state

    def update(
        self, params: Tree, grads: Tree, state: OptimizerState, options: Options | None = None
    ) -> tuple[Tree, OptimizerState]:
        all_grads: Tree = {}
        for name, p in params.items():
            all_grads[name] = grads[name] if name in grads else torch.zeros_like(p)
        if transformed() or any(g.requires_grad for g in all_grads.values()):
            # For autograd, sqrt(g²) has no derivative at 0; of an update that is smooth there, such
            # as Adam's with its ε, the derivative differs by O(1e-15/ε).
            for name, g in all_grads.items():
                negligible = 1e-60 if g.dtype == torch.float64 else 1e-15
                all_grads[name] = torch.where(g == 0, g + negligible, g)
        updates, new_state = self.transform.update(all_grads, state, params=params, inplace=False)
        return {name: p + updates[name] for name, p in params.items()}, new_state

    def write(self, parameters: Parameters, params: Tree, state: OptimizerState) -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(params[name])
        self.state = pytree.tree_map_only(Tensor, Tensor.detach, state)

    def state_dict(self) -> dict[str, Any]:
        return {"leaves": pytree.tree_leaves(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Only the leaves are stored, and the structure comes from the transform, so that no code is
        # loaded from a file.
        leaves, structure = pytree.tree_flatten(self.state)
        new_leaves: list[Any] = []
        for leaf, stored in zip(leaves, copy.deepcopy(state["leaves"]), strict=True):
            new_leaves.append(stored.to(leaf.device) if isinstance(leaf, Tensor) else stored)
        self.state = pytree.tree_unflatten(new_leaves, structure)
