"""What a graph shows about derivatives that PyTorch would leave out without an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metapl.errors import few
from metapl.execution.numerics import MissingDerivative

# PyTorch puts this node behind the gradients that a once_differentiable backward returns. It raises
# where a second backward pass comes to it; but ``torch.autograd.grad`` runs only the nodes that
# lead to its inputs, and never does.
_NO_SECOND_DERIVATIVE = "torch::autograd::Error"

# The code of the function that the decorator puts around a backward.
_WRAPPER_CODE = once_differentiable(lambda ctx: None).__code__


def nodes_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Return the nodes of the graphs of tensors, once each."""
    nodes: list[Any] = []
    visited: set[Any] = set()
    to_visit = [t.grad_fn for t in tensors]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        nodes.append(node)
        to_visit += [next_node for next_node, _ in node.next_functions]
    return nodes


def leaves_in_graph(value: Tensor) -> list[Tensor]:
    """Return the leaves of a graph that require a gradient, each once."""
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    leaves: dict[int, Tensor] = {}
    for node in nodes_of([value]):
        if type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = node.variable
    return list(leaves.values())


def types_in_graphs(tensors: Iterable[Tensor]) -> set[torch.dtype]:
    """Return the types of floating point in the graphs of tensors, of results and of weights."""
    types: set[torch.dtype] = set()
    for node in nodes_of(tensors):
        types |= {result.dtype for result in getattr(node, "_input_metadata", ())}
    return {dtype for dtype in types if dtype.is_floating_point}


def refuse_once_differentiable(gradients: Iterable[Tensor], value: Tensor) -> None:
    """Refuse gradients of ``value`` whose graph ends at a once_differentiable backward.

    Cost: a walk over the graph of the gradients, which holds that of the value.
    Raises: :class:`MissingDerivative`, with the names of the operations.
    """
    if not any(type(node).name(node) == _NO_SECOND_DERIVATIVE for node in nodes_of(gradients)):
        return
    marked: set[str] = set()
    for node in nodes_of([value]):
        function = getattr(node, "_forward_cls", None)
        if function is not None and _is_once_differentiable(function):
            marked.add(function.__name__)
    name = "an operation of the student or of its loss"
    if marked:
        name = few(sorted(marked), 3)
    lacks = f"{name} lacks a derivative that this mode needs"
    raise MissingDerivative(f"{lacks} (its backward is marked once_differentiable)")


def _is_once_differentiable(function: Any) -> bool:
    """Return whether the backward of an ``autograd.Function`` is marked."""
    return getattr(function.backward, "__code__", None) is _WRAPPER_CODE
