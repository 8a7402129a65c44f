"""The tensors that a loss reaches: the feedback knows of the signal and of the student's weights, and of no other."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.execution.writes import memory_of


class Made(TorchFunctionMode):
    """Notes the memory that the functions of a block make, or are given as ``inputs``: a leaf there, such as
    ``x.clone().requires_grad_()``, which a network differentiates in, is its own."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.memory = _memory(inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.memory |= _memory(result) - _memory((args, kwargs))  # a view of a weight is not made here
        return result


def _memory(tree: Any) -> set[int | None]:
    return {memory_of(t) for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)}


def has_own_functions(values: Iterable[Tensor]) -> bool:
    """Whether the graph of the values has an ``autograd.Function``, whose derivatives are its author's."""
    seen: set[Any] = set()
    nodes: list[Any] = [value.grad_fn for value in values]
    while nodes:
        node = nodes.pop()
        if isinstance(node, BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(following for following, _ in node.next_functions)
    return False


def stranger(
    values: Iterable[Tensor],
    known: Iterable[Tensor],
    leaves: Collection[int] = (),
    made: Made | None = None,
    *,
    parameters_alone: bool = False,
) -> Tensor | None:
    """A tensor that requires a gradient and that the values depend on other than through known ones; None: there is
    none.

    Args:
        values: where the walk over their graph begins.
        known: where it ends.
        leaves: the ids of further tensors where it ends, such as parameters.
        made: what was made on the way, where leaves may be made.
        parameters_alone: other leaves may be made, and what was is not known.

    Cost: a few microseconds for each operation between the values and the known tensors.
    """
    stops = list(known)
    ends = {(t.grad_fn, t.output_nr) for t in stops if t.grad_fn is not None}
    allowed = {*leaves, *(id(t) for t in stops if t.grad_fn is None)}
    seen: set[Any] = set()
    edges: list[tuple[Any, int]] = []
    for value in values:
        if value.grad_fn is not None:
            edges.append((value.grad_fn, value.output_nr))
        elif value.requires_grad and id(value) not in allowed:
            return value
    while edges:
        edge = edges.pop()
        node = edge[0]
        if node is None or node in seen or edge in ends:
            continue
        seen.add(node)
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is None or id(leaf) in allowed or (made is not None and memory_of(leaf) in made.memory):
            edges.extend(node.next_functions)
        elif not parameters_alone or isinstance(leaf, nn.Parameter):
            return leaf
    return None


def refuse_stranger(who: str, found: Tensor | None, remedy: str) -> None:
    """Refuse what depends on a tensor that the feedback knows nothing of.

    Args:
        who: reads it, as the subject of a sentence.
        found: the tensor; None: there is none.
        remedy: how to mend it.
    """
    if found is not None:
        raise MetaplError(
            f"{who} reads {described(found)}, that requires a gradient and is no weight of the student, such as a "
            "weight of the teacher or a parameter of the problem. The feedback is on the signal alone, so this "
            f"gradient would be lost; {remedy} Where it is meant as a constant, write .detach()."
        )
