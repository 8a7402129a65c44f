"""TorchOpt transforms: functional updates, with corrections for their known defects."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution.numerics import Tree
from metapl.updates.base import Parameters, Update

_checked: WeakSet[Any] = WeakSet()
"""The ``update`` functions of transforms whose derivative is known to be right."""


def is_transform(optimizer: Any) -> bool:
    """Whether an optimizer is a TorchOpt transform: a named pair of ``init`` and ``update``."""
    return isinstance(optimizer, tuple) and all(callable(getattr(optimizer, n, None)) for n in ("init", "update"))


class TransformUpdate(Update):
    """The update of a TorchOpt transform: its state goes in and comes out, its adjoint is autograd's.

    Two defects of TorchOpt are corrected here. ``trace`` ignores the momentum of a given state on its first call (it
    has a hidden flag): a dummy call clears the flag, so with ``dampening`` the first step is damped like every other,
    unlike TorchOpt's own. The VJP of ``adam`` is NaN where a gradient entry is exactly zero: there it is taken at a
    negligible entry. Transforms whose VJP is wrong otherwise, such as ``clip_grad_norm``, which hides its norm from
    autograd, and ``adam(use_accelerated_op=True)``, are found by a central difference on small tensors, and refused.
    """

    def __init__(self, transform: Any, parameters: Parameters, state: Any) -> None:
        self.transform, self.parameters = transform, dict(parameters)
        theta = {name: p.detach() for name, p in parameters.items()}
        fresh = transform.init(theta)
        transform.update({name: torch.zeros_like(t) for name, t in theta.items()}, fresh, params=theta, inplace=False)
        self.state = fresh if state is None else state
        if transform.update not in _checked:
            self._refuse_wrong_derivative(theta)
            _checked.add(transform.update)

    def follow(self, parameters: Parameters) -> None:
        known = self.parameters
        changed = [name for name in {**known, **parameters} if known.get(name) is not parameters.get(name)]
        if changed:
            raise MetaplError(
                f"the student's trainable parameters {few(changed, 3)} were added, removed or replaced since the state "
                "of the TorchOpt transform was made; build a new BilevelTrainer, or use a torch.optim inner "
                "optimizer and its add_param_group."
            )

    def read_state(self) -> Any:
        return self.state

    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        grads = {name: grads[name] if name in grads else torch.zeros_like(p) for name, p in params.items()}
        if any(g.requires_grad for g in grads.values()):
            # For autograd, sqrt(g²) has no derivative at 0; of an update that is smooth there, such as Adam's with its
            # ε, the derivative differs by O(1e-15/ε).
            least = {torch.float64: 1e-60}
            grads = {n: torch.where(g == 0, g + least.get(g.dtype, 1e-15), g) for n, g in grads.items()}
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
        stored = state["leaves"]
        if len(leaves) != len(stored):
            raise MetaplError(
                f"the stored state has {len(stored)} entries, this transform's has {len(leaves)}; expected the state "
                "of a transform that is built in the same way."
            )
        pairs = zip(leaves, stored, strict=True)
        placed = [new.to(old.device) if isinstance(old, Tensor) else new for old, new in pairs]
        self.state = pytree.tree_unflatten(placed, structure)

    def _refuse_wrong_derivative(self, like: Tree) -> None:
        """Compare autograd with a central difference: of the update along a direction of g, or of it and s′ along one
        of s.

        At the first step with small gradients, where Adam's ε counts, and at the third with large ones, where a clip
        works; on small float64 tensors of the names in ``like``.
        """
        for steps, scale, in_state in ((0, 1e-2, False), (2, 1e8, False), (2, 1e8, True)):
            by_autograd, terms = self._slopes(like, steps, scale, in_state)
            by_difference = float(terms.sum())
            if not abs(by_autograd - by_difference) <= 1e-3 * (abs(by_autograd) + float(terms.norm())) + 1e-9:
                raise MetaplError(
                    "inner_optimizer is a transform whose derivative in the gradient, or in its state, is wrong: along "
                    f"one direction it is {by_autograd:.4g} by autograd and {by_difference:.4g} by a difference of "
                    "updates. Of TorchOpt's own, clip_grad_norm is such (use clip_norm= in its place), "
                    "and adam and adamw with use_accelerated_op=True (leave that out)."
                )

    def _slopes(self, like: Tree, steps: int, scale: float, in_state: bool) -> tuple[float, Tensor]:
        """One of these after ``steps`` steps with gradients of size ``scale``: by autograd, and its terms."""
        draw = torch.Generator().manual_seed(steps)

        def off_zero(t: Tensor) -> Tensor:
            """Entries of random sign, none of them near 0, and at most two along a dimension."""
            entries = torch.randn([min(n, 2) for n in t.shape], generator=draw, dtype=torch.float64)
            return entries / 2 + entries.sign() / 2

        params, g, d, *past = ({name: off_zero(t) for name, t in like.items()} for _ in range(steps + 3))
        state = self.transform.init(params)
        for before in past:
            grads = {name: scale * t for name, t in before.items()}
            _, state = self.transform.update(grads, state, params=params, inplace=False)
        leaves, structure = pytree.tree_flatten(state)
        numbers = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        e = {i: off_zero(leaves[i]).abs() for i in numbers if in_state}  # so that second moments stay positive

        def moved(eps: Tensor) -> list[Tensor]:
            of_g = 0 if in_state else eps
            ahead = {name: scale * t * (1 + of_g * d[name]) for name, t in g.items()}
            there = pytree.tree_unflatten(
                [t * (1 + eps * e[i]) if i in e else t for i, t in enumerate(leaves)], structure
            )
            updates, after = self.transform.update(ahead, there, params=params, inplace=False)
            found = pytree.tree_leaves(after)
            return [*(updates[name] for name in g), *(found[i] for i in e)]

        # Each tensor counts alike, so that what is clipped is seen beside what is not.
        at = torch.zeros((), dtype=torch.float64, requires_grad=True)
        ends = moved(at)
        bars = [off_zero(t) / t.detach().norm().clamp_min(1e-300) for t in ends]
        total = torch.stack([(b * t).sum() for b, t in zip(bars, ends, strict=True)]).sum()
        by_autograd = float(torch.autograd.grad(total, at, materialize_grads=True)[0]) if total.requires_grad else 0.0
        ahead, behind = moved(at.detach() + 1e-6), moved(at.detach() - 1e-6)
        terms = [(b * (x - y)).flatten() / 2e-6 for b, x, y in zip(bars, ahead, behind, strict=True)]
        return by_autograd, torch.cat(terms)
