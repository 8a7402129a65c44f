"""A CUDA graph on the CPU: the operations of a function, repeated with the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metapl.functional.cuda_graphs import Recording, Results

# Operators by which the host reads values.
READS_VALUES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")


class Tape(TorchDispatchMode):
    """Writes down the operations below all transforms, with the tensors that they read and write.

    Whatever the host knows while they run is a constant of the tape, as it is one of a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS_VALUES:
            raise RuntimeError("called a synchronizing CUDA operation")
        options = kwargs or {}
        results = func(*args, **options)
        self.operations.append((func, args, options, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again, from memory to memory."""
        for func, args, options, results in self.operations:
            new_results = func(*args, **options)
            pairs = zip(pytree.tree_leaves(results), pytree.tree_leaves(new_results), strict=True)
            for t, new in pairs:
                # Views, and what is changed in place, are in place already.
                if isinstance(t, Tensor) and t.data_ptr() != new.data_ptr():
                    t.copy_(new)


def record_on_tape(function: Callable[[], Results], device: torch.device, pool: Any) -> Recording:
    """Return the operations of a function as a graph of the CPU; it runs once before."""
    function()
    with Tape() as tape:
        results = function()
    return Recording(results, tape.replay)
