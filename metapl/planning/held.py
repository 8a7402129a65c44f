"""The memory that tensors hold, by what they are for, as a step goes on."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = "activations"
"""What no name was given to: activations, gathered weights, and what operations need for a moment."""


@dataclass
class Peak:
    """What is held where the most is.

    Args:
        total: bytes.
        by_name: bytes by what they are for.
    """

    total: int = 0
    by_name: dict[str, int] = field(default_factory=dict)


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this block make, for as long as each is alive.

    It works on tensors without values too. What an operation uses within itself is not seen.

    Attributes:
        bytes: held now, by name.
        peaks: of each phase, in their order.
        sent: bytes that this rank sends to others, by collective operation, if these run in rings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[str, Peak] = {}
        self.sent: Counter[str] = Counter()
        self._entries: dict[int, tuple[str, int]] = {}
        self._phase = Peak()

    def name(self, tensors: Iterable[Any], name: str) -> None:
        """Say what tensors are for, whether or not an operation of this block made them."""
        for t in tensors:
            storage = _local(t).untyped_storage()
            self._count(storage)
            _, size = self._entries[id(storage)]
            self._change(id(storage), name, size)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step, which may go on later; one inside another counts for the inner one."""
        before = self._phase
        self._phase = self.peaks.setdefault(name, Peak())
        self._look()
        try:
            yield
        finally:
            self._phase = before

    def __enter__(self) -> Held:
        # Sharded networks free and allocate storages in place, past the dispatcher.
        self._resize = UntypedStorage.resize_
        UntypedStorage.resize_ = self._resizing(self._resize)  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "redistribute") for kind in types):
            return NotImplemented  # a DTensor: what it does with its parts is seen afterwards
        if func.namespace == "c10d":
            self._count_sent(func, args)
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        self._look()
        return result

    def _count(self, storage: UntypedStorage) -> None:
        key = id(storage)
        if key not in self._entries:
            self._entries[key] = (OTHER, 0)
            weakref.finalize(storage, self._gone, key)
        name, size = self._entries[key]
        if size != storage.nbytes():
            self._change(key, name, storage.nbytes())

    def _change(self, key: int, name: str, size: int) -> None:
        old_name, old_size = self._entries[key]
        self._entries[key] = (name, size)
        self.bytes[old_name] -= old_size
        self.bytes[name] += size
        self.total += size - old_size

    def _gone(self, key: int) -> None:
        name, size = self._entries.pop(key)
        self.bytes[name] -= size
        self.total -= size

    def _look(self) -> None:
        if self.total > self._phase.total:
            self._phase.total, self._phase.by_name = self.total, dict(self.bytes)

    def _resizing(self, resize: Callable[[UntypedStorage, int], Any]) -> Any:
        def resized(storage: UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._count(storage)
            self._look()
            return result

        return resized

    def _count_sent(self, func: Any, args: Any) -> None:
        """In a ring over n ranks each sends (n − 1)/n of what is gathered or scattered, twice that in a reduction."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        if "process_group" not in given or not tensors:  # a barrier, say
            return
        name = func.overloadpacket.__name__.strip("_")
        ranks = ProcessGroup.unbox(given["process_group"]).size()
        whole = max(t.numel() * t.element_size() for t in tensors)
        self.sent[name] += (2 if name.startswith("allreduce") else 1) * whole * (ranks - 1) // ranks


def _local(t: Any) -> Tensor:
    part: Tensor = t.detach().to_local() if hasattr(t, "to_local") else t
    return part
