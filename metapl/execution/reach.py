"""The tensors that a loss reaches: the feedback knows of the signal and of the student's weights, and of no other."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from metapl.checks import described
from metapl.errors import MetaplError


def stranger(values: Iterable[Tensor], known: Iterable[Tensor], leaves: Collection[int] = ()) -> Tensor | None:
    """A tensor that requires a gradient and that the values depend on other than through known ones; None: there is
    none.

    Args:
        values: where the walk over their graph begins.
        known: where it ends.
        leaves: the ids of further tensors where it ends, such as parameters.

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
        if leaf is not None and id(leaf) not in allowed:
            return leaf
        edges.extend(node.next_functions)
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
