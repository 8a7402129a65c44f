"""The memory that tensors hold, by what they are for, as a step goes on."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup, distributed_c10d
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metapl.execution.shards import local
from metapl.metrics.cost import FORMULAS

OTHER = "activations"
"""What no name was given to: activations, gathered weights, and what operations need for a moment."""

FOR_FEEDBACK = "feedback"
"""What is held for the feedback alone."""

SENT_AS = {
    "all_reduce": "allreduce",
    "all_gather_into_tensor": "allgather_base",
    "reduce_scatter_tensor": "reduce_scatter_base",
}
"""Names of the operations of DTensors, as those of process groups are called."""


@dataclass
class Phase:
    """A phase of a step: bytes by what they are for, where the most is held, and where the most is without feedback."""

    peak: Mapping[str, int] = field(default_factory=dict)
    plain: Mapping[str, int] = field(default_factory=dict)


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this block make, for as long as each is alive.

    It works on tensors without values too. What an operation uses within itself is not seen.

    Attributes:
        bytes: held now, by name.
        phases: by name, in their order.
        sent: bytes that this rank sends to others, by collective operation, if these run in rings.
        flops: floating-point operations of products and convolutions; the rest is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.bytes: Counter[str] = Counter()
        self.phases: dict[str, Phase] = {}
        self.sent: Counter[str] = Counter()
        self.flops = 0
        self._entries: dict[int, tuple[str, int]] = {}
        self._phase = Phase()

    @property
    def total(self) -> int:
        """Bytes that are held now."""
        return self.bytes.total()

    def name(self, tensors: Iterable[Any], name: str, *, others: bool = False) -> None:
        """Say what tensors are for, whoever made them; with ``others``, those alone that have no name yet."""
        for t in tensors:
            storage = local(t).untyped_storage()
            if not others or self._entries.get(id(storage), (OTHER, 0))[0] == OTHER:
                self._count(storage, name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step, which may go on later; one inside another counts for the inner one."""
        before = self._phase
        self._phase = self.phases.setdefault(name, Phase())
        self._look()
        try:
            yield
        finally:
            self._phase = before

    def __enter__(self) -> Held:
        # Sharded networks free and allocate storages in place, past the dispatcher.
        self._resize = UntypedStorage.resize_
        UntypedStorage.resize_ = self._resizing(self._resize)  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]  # of torch
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # of torch
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "redistribute") for kind in types):
            return NotImplemented  # a DTensor: what it does with its parts is seen afterwards
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_sent(func, args)
        result = func(*args, **kwargs)
        for t in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        flops = FORMULAS.get(func.overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        self._look()
        return result

    def _count(self, storage: UntypedStorage, name: str | None = None) -> None:
        """The storage as it is now, under a new name if there is one."""
        key = id(storage)
        if key not in self._entries:
            weakref.finalize(storage, self._change, key, None, 0)
        entry = (name or self._entries.get(key, (OTHER, 0))[0], storage.nbytes())
        if self._entries.get(key) != entry:
            self._change(key, *entry)

    def _change(self, key: int, name: str | None, size: int) -> None:
        before, was = self._entries.pop(key, (OTHER, 0))
        if name is not None:
            self._entries[key] = (name, size)
            self.bytes[name] += size
        self.bytes[before] -= was

    def _look(self) -> None:
        phase, total = self._phase, self.total
        if total > sum(phase.peak.values()):
            phase.peak = dict(self.bytes)
        if total - self.bytes[FOR_FEEDBACK] > sum(phase.plain.values()):
            phase.plain = {name: size for name, size in self.bytes.items() if name != FOR_FEEDBACK}

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
        sizes = [t.numel() * t.element_size() for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        name, group = func.overloadpacket.__name__.strip("_"), given.get("process_group", given.get("group_name"))
        if not sizes or group is None or name == "wait_tensor":  # a barrier, say
            return
        if "process_group" in given:
            group = ProcessGroup.unbox(group)
        elif isinstance(group, str):  # the operations of DTensors
            group = cast(Any, distributed_c10d)._resolve_process_group(group)
        ranks = group.size()
        whole = max(sizes) * (ranks if name == "all_gather_into_tensor" else 1)
        name = SENT_AS.get(name, name)
        self.sent[name] += (2 if name.startswith("allreduce") else 1) * whole * (ranks - 1) // ranks
