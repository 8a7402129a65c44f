"""Writes to the parameters of a network in its own forward pass.

A pass that moves a trainable weight is no function of the weights: its replays, the labeled pass and the step would be
at other weights than the gradient. It is refused before the write. A *frozen* parameter (``requires_grad`` False) that
a pass moves, such as the average of a momentum encoder, is state, as buffers are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metapl.errors import MetaplError

Slot = tuple[dict[str, Any], str, Any]


class Journal:
    """The frozen parameters that passes have moved, as they were before."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # with their memory, and a copy of it
        self._exchanged: dict[tuple[int, str], Slot] = {}

    def note(self, p: Tensor, data: Tensor, before: Tensor | None = None) -> None:
        """A parameter, its memory before, and a copy of it where that is about to be written to."""
        self._written.setdefault(id(p), (p, data, before))

    @property
    def any_written(self) -> bool:
        return bool(self._written)

    def knows(self, p: Tensor) -> bool:
        return id(p) in self._written

    def note_exchanged(self, table: dict[str, Any], name: str, p: Tensor) -> None:
        """Another object is held in the place of a parameter."""
        self._exchanged.setdefault((id(table), name), (table, name, p))

    def slots(self, parameters: Sequence[Slot]) -> list[Slot]:
        """The slots, of these, whose parameter has moved, with its values before."""
        places = {(id(table), name): (table, name, p) for table, name, p in parameters if id(p) in self._written}
        return [(table, name, self._before(p)) for table, name, p in (places | self._exchanged).values()]

    def _before(self, p: Tensor) -> Tensor:
        _, data, before = self._written.get(id(p), (p, p.data, None))
        return data if before is None else before

    def put_back(self, but: Collection[int] = ()) -> None:
        """Put everything back, except the values of parameters with these ids."""
        for table, name, p in self._exchanged.values():
            table[name] = p
        for p, data, before in (entry for i, entry in self._written.items() if i not in but):
            if before is not None:
                data.copy_(before)
            p.data = data


_journals: ContextVar[tuple[Journal, ...]] = ContextVar("journals", default=())


@contextmanager
def journal(found: Journal | None = None) -> Iterator[Journal]:
    """The frozen parameters that passes in this block move, beside those already found."""
    found = Journal() if found is None else found
    token = _journals.set((*_journals.get(), found))
    try:
        yield found
    finally:
        _journals.reset(token)


class Watch(TorchDispatchMode):
    """Looks at the operators of a pass before they run.

    Version counters would tell of a write afterwards, when the weights have moved, and not of one by ``.data``.

    Args:
        refuse: raises for the name of a weight.
        learned: names of weights, by their memory.
        frozen: parameters, by their memory.

    Attributes:
        narrowed: the types of numbers that it rounded to from wider ones.
        cut: whether its backward pass may be of another function: where a value that has a gradient is taken out of the
            graph, or rounded.
    """

    def __init__(self, refuse: Callable[[str], None], learned: Mapping[int, str], frozen: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refuse, self.learned, self.frozen = refuse, learned, frozen
        self.narrowed: set[torch.dtype] = set()
        self.cut = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = _written.get(func)
        if places is None:
            places = _written[func] = _places(func)
        for index, name in places:
            given = args[index] if index < len(args) else kwargs.get(name)
            for t in given if isinstance(given, list | tuple) else (given,):
                if isinstance(t, Tensor):
                    self._before_write(t)
        if not self.cut and (func in _CUTTING or not torch.is_grad_enabled()):
            self.cut = func in _ROUNDING or any(isinstance(t, Tensor) and t.requires_grad for t in args)
        result = func(*args, **kwargs)
        if type(result) is Tensor and result.dtype in _NARROW and result.dtype not in self.narrowed:
            size = result.dtype.itemsize
            if any(type(t) is Tensor and t.is_floating_point() and t.dtype.itemsize > size for t in args):
                self.narrowed.add(result.dtype)
        return result

    def _before_write(self, t: Tensor) -> None:
        memory = memory_of(t)
        if memory is None:
            return
        if memory in self.learned:
            self.refuse(self.learned[memory])
        if memory in self.frozen:
            p = self.frozen[memory]
            unknown = [one for one in _journals.get() if not one.knows(p)]
            if unknown:
                data, before = p.data, p.detach().clone()
                for one in unknown:
                    one.note(p, data, before)


_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_ROUNDING = {
    getattr(torch.ops.aten, name).default for name in ("round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside")
}
_CUTTING = {torch.ops.aten.detach.default, torch.ops.aten._local_scalar_dense.default, *_ROUNDING}

_written: dict[Any, tuple[tuple[int, str], ...]] = {}

_UNDECLARED = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
"""Operators that write to the running statistics that they are given, and do not say so."""


def _places(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operator writes to, by position and name."""
    schema = func._schema
    undeclared = ("running_mean", "running_var") if schema.name in _UNDECLARED else ()
    return tuple(
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if a.name in undeclared or (a.alias_info is not None and a.alias_info.is_write)
    )


def memory_of(t: Tensor) -> int | None:
    """What tensors that share memory have in common; None where a tensor has no memory of its own."""
    try:
        return int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse ones
        return None


Parameters = list[tuple[str, dict[str, Any], frozenset[str]]]
"""Of each part of a network: the prefix of its names, the dictionary of its parameters, and those that are learned."""


@contextmanager
def weights_watched(parts: Parameters, role: str, *, looking: bool, replay: bool = False) -> Iterator[Watch | None]:
    """Refuse a network that moves the weights that its parts hold now in a pass of this block.

    Args:
        parts: the network's.
        role: the network's, as errors call it.
        looking: look at every operator, so that a write is refused before it happens and frozen parameters are state.
            Otherwise all parameters are compared afterwards, by PyTorch's version counters and their memory.
        replay: of a pass that was looked at; frozen parameters that this moved are copies.
    """
    before = [(table, dict(table)) for _, table, _ in parts]
    held = [
        (prefix + name, t, name in learned)
        for (prefix, _, learned), (_, contents) in zip(parts, before, strict=True)
        for name, t in contents.items()
        if t is not None
    ]
    data = [t.data for _, t, _ in held]
    marks = [(memory_of(t), t._version) for _, t, _ in held]
    not_learned = {name for (name, t, _) in held if isinstance(t, nn.Parameter) and not t.requires_grad}
    watch: Watch | None = None
    if looking:
        places = [(memory, entry) for (memory, _), entry in zip(marks, held, strict=True) if memory is not None]
        watch = Watch(
            lambda name: _refuse(role, name, not_learned),
            {memory: name for memory, (name, _, learned) in places if learned},
            {memory: t for memory, (_, t, learned) in places if not learned},
        )

    def moved() -> str | None:
        """Put exchanged weights back, and note frozen ones; the name of the first that may not move."""
        found: list[str] = []
        for (prefix, table, learned), (_, contents) in zip(parts, before, strict=True):
            if table.keys() == contents.keys() and not any(map(is_not, table.values(), contents.values())):
                continue
            others = [n for n in {**contents, **table} if table.get(n) is not contents.get(n)]
            if not any(n in learned or not _frozen(contents.get(n), table.get(n)) for n in others):
                if looking:
                    for one in _journals.get():
                        for n in others:
                            one.note_exchanged(table, n, contents[n])
                if looking or replay:
                    continue
            found += [prefix + n for n in others]
            table.clear()
            table.update(contents)
        for (name, t, is_learned), values, (memory, version) in zip(held, data, marks, strict=True):
            if replay and not is_learned:
                continue
            if memory_of(t) != memory:
                if looking and not is_learned:
                    for one in _journals.get():
                        one.note(t, values)
                    continue
                t.data = values
                found.append(name)
            elif not looking and t._version != version:
                found.append(name)
        return found[0] if found else None

    try:
        with watch or nullcontext():
            yield watch
    except BaseException as error:
        moved()
        if isinstance(error, RuntimeError) and _LEAF.search(str(error)):
            _refuse(role, None, cause=error)
        raise
    name = moved()
    if name is not None:
        _refuse(role, name, not_learned)


def _frozen(*given: Any) -> bool:
    return all(isinstance(p, Tensor) and not p.requires_grad for p in given)


_LEAF = re.compile(r"leaf Variable that requires grad (is being|has been) used in an in-place operation")


def _refuse(role: str, name: str | None, frozen: Collection[str] = (), *, cause: BaseException | None = None) -> None:
    if name in frozen:
        raise MetaplError(
            f"the {role} writes to its frozen parameter {name} in its forward, of which the feedback passes need the "
            "values before; a sharded network or a compiled pass keeps none. Hold it in a buffer (register_buffer), or "
            "leave compile out."
        )
    which = "one of its parameters" if name is None else f"its parameter {name}"
    raise MetaplError(
        f"the {role} writes to {which} in its forward, so its passes would be at different weights and the gradients "
        "wrong. Expected a forward that leaves the weights as they are. For a mask, a clamp or a norm of a weight, "
        "compute with the changed value and leave the weight (F.linear(x, self.weight * self.mask), or "
        "torch.nn.utils.parametrize); change weights between the steps (in place of nn.Embedding(max_norm=...), too); "
        "where the first batch initializes them, run it before; what forward moves and no optimizer learns belongs in "
        "a buffer (register_buffer) or has requires_grad=False."
    ) from cause
