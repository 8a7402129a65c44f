"""How a test runs the functions that ``compile=True`` captures, where no compiler matters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from metapl.execution.state import RandomState, replayed
from metapl.functional import capture
from metapl.functional.capture import Capture, Captured
from metapl.functional.kinds import At, Kind, put_together, take_apart


def without_inductor(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Replay graphs of operations as they were recorded; return those that are made from now on."""
    graphs: list[GraphModule] = []

    def replayed(graph: GraphModule, examples: Sequence[Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(capture, "compiled_graph", replayed)
    return graphs


def as_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call functions themselves, in the place of their graphs."""

    find_graph = Captured.find

    def find(captured: Captured[Any], *arguments: Any) -> tuple[Capture, list[Tensor]]:
        if not captured.is_compiled:
            return find_graph(captured, *arguments)
        tensors: list[Tensor] = []
        take_apart(arguments, tensors, [])

        def call(*given: Tensor) -> Sequence[Any]:
            returned = captured.function(*put_together(arguments, iter(given)))
            return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]

        # Its results are known by a call on copies.
        with replayed(RandomState.now(captured.device)):
            copies = [t.clone() for t in tensors]
            returned = captured.function(*put_together(arguments, iter(copies)))
        numbers = itertools.count()
        nested = pytree.tree_map_only(Tensor, lambda _: At(next(numbers)), returned)
        results = captured.with_held(nested)
        places = [len(tensors) + place for place in range(next(numbers))]
        return Capture(Kind([], []), call, [], len(tensors), places, results), tensors

    monkeypatch.setattr(Captured, "find", find)
