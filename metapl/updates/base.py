r"""The student's update θ′ = U(θ, g, s) as a pure function of weights, gradient and optimizer state.

Estimators need an update that can be differentiated, and computed without moving the weights; optimizers offer neither.
The adjoint of one step maps the cotangents of θ′ and s′ to the cotangents of g, θ and s:

.. math:: (w, \bar\theta, \bar s) = \Big(\frac{\partial (U, s')}{\partial (g, \theta, s)}\Big)^{\!\top}
          (\bar\theta', \bar s')

For a look-ahead of one step, w = (∂U/∂g)ᵀ v with v = ∇L(θ′) is enough.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.execution.numerics import Tree

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Cotangents:
    """The result of :meth:`Update.vjp`.

    Args:
        gradient: w, the cotangent of g, for the parameters that have a gradient.
        params: the cotangent of θ.
        state: the cotangent of s, in the update's own form, for the ``vjp`` of the step before; None: zero.
    """

    gradient: Tree
    params: Tree
    state: Any


class Update(ABC):
    """The update of one optimizer; trees are dictionaries by parameter name.

    Parameters that the inner loss does not depend on are missing in ``grads``, and do not move.
    """

    @property
    def learning_rate(self) -> float | None:
        """η of the first param group, for feedback in units of it; None if the optimizer does not expose it."""
        return None

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """The student's trainable parameters, as last given to :meth:`follow`."""

    @abstractmethod
    def follow(self, parameters: Parameters) -> None:
        """Update the set of the student's trainable parameters; refuse parameters that the optimizer does not hold."""

    @abstractmethod
    def read_state(self) -> Any:
        """The current state, for :meth:`update`; reading it changes nothing."""

    @abstractmethod
    def update(self, params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        """θ′ and s′, differentiable in all three arguments."""

    def pullback(self, params: Tree, grads: Tree, state: Any, v: Tree) -> Tree:
        """w = (∂U/∂g)ᵀ v. Cost: the update and its backward pass, a few operations per weight."""
        return self._vjp(params, grads, state, v, None, only_gradient=True).gradient

    def vjp(self, params: Tree, grads: Tree, state: Any, v: Tree, state_cotangent: Any = None) -> Cotangents:
        """The adjoint of the whole step, from the cotangents v of θ′ and ``state_cotangent`` of s′ (None: zero)."""
        return self._vjp(params, grads, state, v, state_cotangent, only_gradient=False)

    def commit(self, parameters: Parameters, grads: Tree, moved: Callable[[], tuple[Tree, Any]]) -> None:
        """Take one step: move the parameters, and the optimizer's state.

        Args:
            parameters: the student's.
            grads: g, for a step of the optimizer itself.
            moved: returns θ′ and s′, for an update that is a function and no more.
        """
        self.write(parameters, *moved())

    @abstractmethod
    def write(self, parameters: Parameters, params: Tree, state: Any) -> None:
        """Set the parameters and the optimizer's state to these values, such as those after several steps."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, as plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""

    def _vjp(
        self, params: Tree, grads: Tree, state: Any, v: Tree, state_cotangent: Any, *, only_gradient: bool
    ) -> Cotangents:
        """By autograd through :meth:`update`; the cotangent of the state is a list with an entry per leaf."""
        at_grads = _leaves(grads)
        leaves, structure = pytree.tree_flatten(state)
        if only_gradient:
            at_params, at_leaves = params, leaves
        else:
            at_params = _leaves(params)
            at_leaves = [t.detach().requires_grad_() if _is_continuous(t) else t for t in leaves]
        with torch.enable_grad():
            moved, new_state = self.update(at_params, at_grads, pytree.tree_unflatten(at_leaves, structure))
        outputs, cotangents = [moved[name] for name in v], list(v.values())
        if state_cotangent is not None:
            pairs = zip(pytree.tree_leaves(new_state), state_cotangent, strict=True)
            kept = [(t, bar) for t, bar in pairs if bar is not None and isinstance(t, Tensor) and t.requires_grad]
            outputs, cotangents = outputs + [t for t, _ in kept], cotangents + [bar for _, bar in kept]
        reached = [(t, bar) for t, bar in zip(outputs, cotangents, strict=True) if t.requires_grad]
        inputs = list(at_grads.values())
        if not only_gradient:
            inputs += [*at_params.values(), *(t for t in at_leaves if _is_continuous(t))]
        cotangents_of_inputs = iter(
            torch.autograd.grad([t for t, _ in reached], inputs, [bar for _, bar in reached], materialize_grads=True)
            if reached
            else [torch.zeros_like(t) for t in inputs]
        )
        gradient = {name: next(cotangents_of_inputs) for name in at_grads}
        if only_gradient:
            return Cotangents(gradient, {}, None)
        of_params = {name: next(cotangents_of_inputs) for name in at_params}
        return Cotangents(
            gradient, of_params, [next(cotangents_of_inputs) if _is_continuous(t) else None for t in leaves]
        )


def _leaves(tree: Tree) -> Tree:
    return {name: t.detach().requires_grad_() for name, t in tree.items()}


def _is_continuous(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def described(optimizer: Any) -> str:
    """An optimizer in words, by its class."""
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    return f"{'the class ' if isinstance(optimizer, type) else ''}{kind.__module__}.{kind.__qualname__}"
