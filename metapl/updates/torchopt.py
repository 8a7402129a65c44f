"""TorchOpt transforms: functional updates, with corrections for their known defects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.checks import transformed
from metapl.execution.numerics import Tree
from metapl.updates.base import Options, Parameters, Update


def is_transform(optimizer: Any) -> bool:
    """Whether an optimizer is a TorchOpt transform: a named pair of ``init`` and ``update``."""
    return isinstance(optimizer, tuple) and all(
        callable(getattr(optimizer, n, None)) for n in ("init", "update")
    )


class TransformUpdate(Update):
    """The update of a TorchOpt transform: its state goes in and comes out, its adjoint is autograd's.

    ``is_learned`` says whether what the transform returns requires a gradient, because it reads a
    learned tensor.

    Two defects of TorchOpt are corrected here. ``trace`` ignores the momentum of a given state on
    its first call, by a hidden flag that a dummy call clears; so with ``dampening`` the first step
    is damped too. The VJP of ``adam`` is NaN where a gradient entry is exactly zero: it is taken at
    a negligible entry. Other wrong VJPs, such as that of ``clip_grad_norm``, are found by the
    verification of the first step.
    """

    def __init__(self, transform: Any, parameters: Parameters, state: Any) -> None:
        self.transform, self.parameters = transform, dict(parameters)
        theta = {name: p.detach() for name, p in parameters.items()}
        fresh = transform.init(theta)
        zeros = {name: torch.zeros_like(t) for name, t in theta.items()}
        result = transform.update(zeros, fresh, params=theta, inplace=False)
        self.is_learned = any(
            isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(result)
        )
        self.state = fresh if state is None else state

    def follow(self, parameters: Parameters) -> None:
        before = self.parameters
        changed = [
            name
            for name in {**before, **parameters}
            if before.get(name) is not parameters.get(name)
        ]
        if changed:
            raise MetaplError(
                f"the student's {few(changed, 3)} changed; expected a new trainer for TorchOpt."
            )

    def read_state(self) -> Any:
        return self.state

    def update(
        self, params: Tree, grads: Tree, state: Any, options: Options | None = None
    ) -> tuple[Tree, Any]:
        grads = {
            name: grads[name] if name in grads else torch.zeros_like(p)
            for name, p in params.items()
        }
        if transformed() or any(g.requires_grad for g in grads.values()):
            # For autograd, sqrt(g²) has no derivative at 0; of an update that is smooth there, such
            # as Adam's with its ε, the derivative differs by O(1e-15/ε).
            least = {torch.float64: 1e-60}
            grads = {
                n: torch.where(g == 0, g + least.get(g.dtype, 1e-15), g) for n, g in grads.items()
            }
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
        # Only the leaves are stored, and the structure comes from the transform, so that no code is
        # loaded from a file.
        leaves, structure = pytree.tree_flatten(self.state)
        pairs = zip(leaves, state["leaves"], strict=True)
        placed = [new.to(old.device) if isinstance(old, Tensor) else new for old, new in pairs]
        self.state = pytree.tree_unflatten(placed, structure)
