"""A part of a network of which no graph keeps more than its inputs, and which can be differentiated twice.

``torch.utils.checkpoint`` frees what a part computes until the backward pass, but the graph of that backward pass,
which a second one goes through, holds it again for all parts at once. Here the part, y = f(t), and its pullback,
p(c, t) = (∂f/∂t)ᵀ c, are one operation of autograd each: the derivative of f is p, and that of p runs both again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.execution.state import RandomState, Slots, State, replay

Run = Callable[..., list[Tensor]]  # of tensors that require a gradient, the floating-point outputs


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, again: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors)
        return tuple(run(*tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return None, None, *_Pullback.apply(ctx.again, len(cotangents), *cotangents, *ctx.saved_tensors)


class _Pullback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, again: Run, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.count = again, count
        ctx.save_for_backward(*given)
        return tuple(_pulled(again, count, [t.detach() for t in given], create_graph=False)[1])

    @staticmethod
    def backward(ctx: Any, *w: Tensor) -> tuple[Any, ...]:
        given, found = _pulled(ctx.again, ctx.count, [t.detach() for t in ctx.saved_tensors], create_graph=True)
        pairs = [(t, of_t) for t, of_t in zip(found, w, strict=True) if t.requires_grad]
        grads: Any = [None] * len(given)
        if pairs:
            tensors, along = zip(*pairs, strict=True)
            grads = torch.autograd.grad(tensors, given, along, allow_unused=True)
        return None, None, *grads


def _pulled(again: Run, count: int, given: list[Tensor], *, create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Cotangents and inputs as leaves, and (∂f/∂t)ᵀ c of them."""
    with torch.enable_grad():
        inputs = [t.requires_grad_() for t in given[count:]]
        cotangents = [t.requires_grad_(create_graph) for t in given[:count]]
        pairs = [(y, c) for y, c in zip(again(*inputs), cotangents, strict=True) if y.requires_grad]
        grads: Any = [None] * len(inputs)
        if pairs:
            outputs, along = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, inputs, along, create_graph=create_graph, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    return [*cotangents, *inputs], found


def recomputed(
    part: nn.Module, forward: Callable[..., Any], device: torch.device, weights: list[Tensor], using: Callable[..., Any]
) -> Callable[..., Any]:
    """The ``forward`` of a part that runs again in each backward pass, on the draws, state and precision of its first
    run. The gradient is also in ``weights``, which the part has in a context ``using(weights)``."""

    def run_part(*args: Any, **kwargs: Any) -> Any:
        values, given_as = pytree.tree_flatten((args, kwargs))
        entering = [i for i, t in enumerate(values) if isinstance(t, Tensor) and t.requires_grad]
        random, state = RandomState.now(device), State(Slots(part))
        precision = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        returned: list[Any] = []  # by the first run alone: what later ones return has a graph

        def run(*tensors: Tensor) -> tuple[list[Any], Any, list[int]]:
            replaced = {**dict(enumerate(values)), **dict(zip(entering, tensors, strict=False))}
            own_args, own_kwargs = pytree.tree_unflatten([*replaced.values()], given_as)
            with using(tensors[len(entering) :]):
                results, returned_as = pytree.tree_flatten(forward(*own_args, **own_kwargs))
            places = [i for i, t in enumerate(results) if isinstance(t, Tensor) and t.is_floating_point()]
            return results, returned_as, places

        def first(*tensors: Tensor) -> list[Tensor]:
            returned[:] = run(*tensors)
            return [returned[0][i] for i in returned[2]]

        def again(*tensors: Tensor) -> list[Tensor]:
            with replay(random, state), torch.autocast(device.type, *precision):
                results, _, places = run(*tensors)
            return [results[i] for i in places]

        outputs = _Part.apply(first, again, *(values[i] for i in entering), *weights)
        results, returned_as, places = returned
        returned.clear()
        for i, t in zip(places, outputs, strict=True):
            results[i] = t
        return pytree.tree_unflatten(results, returned_as)

    return run_part
