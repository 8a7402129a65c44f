"""Inside and outside of the transforms of ``torch.func``, and results that have no derivative."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError


def is_transformed() -> bool:
    """Return whether this runs inside a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def no_transform() -> AbstractContextManager[Any]:
    """Leave all transforms of ``torch.func`` in a block."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def is_differentiated(values: Any) -> bool:
    """Return whether a function of nested tensors is differentiated, by whatever way.

    It runs inside a transform other than ``torch.func.vmap``, or a tensor has a graph or a tangent.
    """
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    if is_transformed():
        mapping = torch._C._functorch.TransformType.Vmap
        if any(one.key() != mapping for one in retrieve_all_functorch_interpreters()):
            return True
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    if torch.is_grad_enabled() and any(map(requires_grad, tensors)):
        return True
    return any(map(has_tangent, tensors))


def has_tangent(t: Tensor) -> bool:
    """Return whether a tensor carries a tangent of forward-mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def requires_grad(t: Tensor) -> bool:
    """Return whether a tensor, or what a mapped one stands for, requires a gradient."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t.requires_grad


class WithoutDerivative(torch.autograd.Function):
    """A function of tensors as an operation whose derivative raises, in these words."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., Any], text: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.text, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise MetaplError(ctx.text)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise MetaplError(ctx.text)


def without_derivative(results: Any, *, of: Any, text: str) -> Any:
    """Return nested results of a function, whose derivative in what it was given raises a text.

    It would be 0 in silence where a loss reads what was given besides. In forward mode it is taken
    with the results, so that this call raises.
    """
    given = [t for t in pytree.tree_leaves(of) if isinstance(t, Tensor)]
    if any(map(has_tangent, given)):
        raise MetaplError(text)
    given = [t for t in given if requires_grad(t)]
    if not given or not torch.is_grad_enabled():
        return results
    leaves, structure = pytree.tree_flatten(results)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    run = partial(without_first, len(given))
    without = iter(WithoutDerivative.apply(run, text, *given, *tensors))
    filled = [next(without) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(filled, structure)


def without_first(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors without the first ones."""
    return tensors[count:]


def first_of_mapped(t: Tensor) -> Tensor:
    """Return the first of the tensors that a mapped one stands for; any other as it is."""
    functorch = torch._C._functorch
    dimensions = []
    while functorch.is_functorch_wrapped_tensor(t):
        dimensions.append(functorch.maybe_get_bdim(t))
        t = functorch.get_unwrapped(t)
    # Of several maps the inner one's dimension is among those that the outer one leaves.
    for dimension in reversed(dimensions):
        if dimension >= 0:
            t = t.select(dimension, 0)
    return t
