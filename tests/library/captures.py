"""How a test runs the functions that ``compile=True`` captures, where no compiler matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from metapl.functional import capture
from metapl.functional.capture import Capture, Captured, Kind, put_together, take_apart


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

    run_graph = Captured.run

    def run(captured: Captured[Any], *arguments: Any) -> tuple[Capture, Sequence[Any]]:
        if not captured.is_compiled:
            return run_graph(captured, *arguments)
        tensors: list[Tensor] = []
        take_apart(arguments, tensors, [])
        returned = captured.function(*put_together(arguments, iter(tensors)))
        leaves, structure = pytree.tree_flatten(returned)
        results = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return Capture(Kind([], []), captured.function, [], [], results, structure), found

    monkeypatch.setattr(Captured, "run", run)
