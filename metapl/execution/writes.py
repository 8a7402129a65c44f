"""What a network does besides computing outputs of its inputs and weights: it writes, changes gradients, reads others'.

A pass that moves a trainable weight is no function of the weights: its replays, the labeled pass and the step would be
at other weights than the gradient. It is refused before the write, or put back. A *frozen* parameter (``requires_grad``
False) that a pass writes to, such as the average of a momentum encoder, is state, as buffers are. Hooks that change
gradients are not called where a pass is run again, and of tensors that are neither weights nor signal the feedback
knows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flattened
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.checks import described, leaves_of

# A place that holds a parameter, as its dictionary and name there.
Slot = tuple[dict[str, Any], str, Any]

# Of each part of a network: the prefix of its names, the dictionary of its parameters, and those that are learned.
Parameters = list[tuple[str, dict[str, Any], frozenset[str]]]


@dataclass
class Journal:
    """The frozen parameters that passes have moved: each with its memory before, and a copy of it."""

    written: dict[int, tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=dict)

    def slots(self, parameters: Sequence[Slot]) -> list[Slot]:
        """The slots, of these, whose parameter has moved, with its values before."""
        moved = [(table, name, *self.written[id(p)][1:]) for table, name, p in parameters if id(p) in self.written]
        return [(table, name, data if before is None else before) for table, name, data, before in moved]

    def put_back(self, but: Collection[int] = ()) -> None:
        """Put everything back, except parameters with these ids."""
        for p, data, before in (entry for i, entry in self.written.items() if i not in but):
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
    """Looks at the operators of a pass before they run: version counters tell of a write when weights have moved."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refuse = weights.refuse
        # By their memory, the names of those that are learned, and frozen ones. Where these share memory, that counts.
        held = sorted(weights.held, key=itemgetter(-1))
        self.weights = {memory_of(t): name if learned else t for name, t, *_, learned in held}
        self.weights.pop(None, None)
        self.narrowed: set[torch.dtype] = set()  # the types of numbers that it rounded to from wider ones
        self.cut = False  # whether a value that has a gradient is taken out of the graph, or rounded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = _written.get(func)
        if places is None:
            undeclared = ("running_mean", "running_var") if func._schema.name in _UNDECLARED else ()
            places = _written[func] = tuple(
                (i, a.name)
                for i, a in enumerate(func._schema.arguments)
                if a.name in undeclared or (a.alias_info is not None and a.alias_info.is_write)
            )
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
        p = self.weights.get(memory_of(t))
        if isinstance(p, str):
            self.refuse(p)
        unknown = [] if p is None else [one for one in _journals.get() if id(p) not in one.written]
        if unknown and isinstance(p, Tensor):
            data, before = p.data, p.detach().clone()
            for one in unknown:
                one.written[id(p)] = p, data, before


_COMPARED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {
    getattr(torch.ops.aten, name).default for name in ("round", "floor", "ceil", "trunc", "sign", "sgn", "heaviside")
}
_CUTTING = {torch.ops.aten.detach.default, torch.ops.aten._local_scalar_dense.default, *_ROUNDING}
_written: dict[Any, tuple[tuple[int, str], ...]] = {}  # the arguments that an operator writes to, by position and name
# Operators that write to the running statistics that they are given, and do not say so.
_UNDECLARED = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")


def memory_of(t: Tensor) -> int | None:
    """What tensors that share memory have in common; None where a tensor has no memory of its own."""
    try:
        return None if t.is_nested else int(t.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse ones
        return None


def _same(t: Tensor, before: Tensor) -> bool:
    """Whether a tensor has the values of another, NaN for NaN."""
    return torch.equal(t, before) or (not before.equal(before) and torch.allclose(t, before, 0, 0, equal_nan=True))


class Weights:
    """The parameters that the parts of a network hold now, to refuse passes that move them.

    ``looking``: every operator is looked at, so that a write is refused before it happens and frozen parameters are
    state (in a ``replay``, copies). Otherwise all are compared afterwards, by PyTorch's version counters and their
    memory, and by their ``values``, which are put back: as good as looking where nothing is frozen.
    """

    def __init__(
        self, parts: Parameters, role: str, *, looking: bool = False, replay: bool = False, values: bool = False
    ) -> None:
        self.role, self.looking, self.replay = role, looking, replay
        self._tables = [(prefix, table, table.copy()) for prefix, table, _ in parts]
        self.held = [
            (prefix + name, t, t.data, t._version, t.requires_grad, name in learned)
            for prefix, table, learned in parts
            for name, t in table.items()
            if t is not None
        ]
        self._place: Callable[[Tensor], int | None] = Tensor.data_ptr if values else memory_of
        self._values = flattened([held[2] for held in self.held]) if values and self.held else None
        self._seen = self._now()

    def check(self, error: BaseException | None = None) -> None:
        """Put back what was moved, and refuse it; ``error``: what the pass failed by."""
        same = self._seen == self._now()
        if same and self._values is not None:
            same = torch.equal(flattened([held[2] for held in self.held]), self._values)
        moved, flags = ([], False) if same else self._moved()
        text = str(error) if isinstance(error, RuntimeError) else ""
        if flags or "change requires_grad flags of leaf variables" in text:
            raise MetaplError(
                f"the {self.role}'s forward changes requires_grad of its weights, by which metapl knows what it "
                "learns; expected a forward that leaves them as they are. To keep a gradient from a weight, compute "
                "with weight.detach(); freeze weights before the trainer is built."
            ) from error
        if moved or _LEAF.search(text):
            self.refuse(moved[0] if moved else None, error)

    def _now(self) -> list[Any]:
        """What tells that weights have moved, but for writes by ``.data``."""
        found: list[Any] = [id(t) for _, table, _ in self._tables for t in table.values()]
        found += [(t._version, t.requires_grad, self._place(t)) for _, t, *_ in self.held]
        return found

    def _moved(self) -> tuple[list[str], bool]:
        """Put back what was moved, and note frozen parameters; the names of those that may not move, and whether
        ``requires_grad`` of one has changed."""
        moved: list[str] = []
        for prefix, table, contents in self._tables:
            moved += [prefix + n for n in {**contents, **table} if table.get(n) is not contents.get(n)]
            table.clear()
            table.update(contents)
        flags, at = False, 0
        for name, t, data, version, flag, learned in self.held:
            before = None if self._values is None else self._values[at : at + data.numel()].view(data.shape)
            at += data.numel()
            if self.replay and not learned:
                continue
            if learned and t.requires_grad != flag and self.role == "student":
                t.requires_grad_(flag)
                flags = True
            if self._place(t) != self._place(data) or t.shape != data.shape:
                if self.looking and not learned:
                    for one in _journals.get():
                        one.written.setdefault(id(t), (t, data, None))
                    continue
                t.data = data
                moved.append(name)
            elif not self.looking and t._version != version:
                moved.append(name)
            if before is not None and not _same(data, before.to(data.dtype)):
                data.copy_(before)
                moved.append(name)
        return moved, flags

    def refuse(self, name: str | None, cause: BaseException | None = None) -> None:
        if name in {n for n, t, *_ in self.held if isinstance(t, nn.Parameter) and not t.requires_grad}:
            raise MetaplError(
                f"the {self.role} writes to its frozen parameter {name} in its forward, of which the feedback passes "
                "need the values before; a sharded network, a compiled pass and an assignment of another Parameter "
                "keep none. Hold it in a buffer (register_buffer), write in place, or leave compile out."
            )
        which = "one of its parameters" if name is None else f"its parameter {name}"
        raise MetaplError(
            f"the {self.role} writes to {which} in its forward (or in a hook, or a backward pass of its own), so its "
            "passes would be at different weights and the gradients wrong. Expected passes that leave the weights as "
            "they are: compute with the changed value (F.linear(x, self.weight * self.mask), "
            "torch.nn.utils.parametrize); change weights between the steps (in place of nn.Embedding(max_norm=...), "
            "too); where the first batch initializes them, run it before; what no optimizer learns belongs in a "
            "buffer (register_buffer) or has requires_grad=False."
        ) from cause


@contextmanager
def weights_watched(
    parts: Parameters, role: str, inputs: Any = None, *, looking: bool, replay: bool = False, values: bool = False
) -> Iterator[Watch | None]:
    """Refuse a network that moves its inputs, or its weights, in a pass of this block; see :class:`Weights`."""
    weights = Weights(parts, role, looking=looking, replay=replay, values=values)
    given = tensors_in(inputs)
    versions = [t._version for t in given]
    # Writes by .data or numpy count in no version.
    plain = [t for t in given if type(t) is Tensor and t.dtype in _COMPARED and not (t.is_nested or checks.waits(t))]
    copies = [(t, t.detach().clone()) for t in plain if (looking or values) and t.layout is torch.strided]
    watch: Any = Watch(weights) if looking else nullcontext()
    try:
        with watch as watching:
            yield watching
    except BaseException as error:
        weights.check(error)
        raise
    weights.check()
    if versions != [t._version for t in given] or not all(_same(t, copy) for t, copy in copies):
        raise changed_input(f"the {role}")


def changed_input(who: str) -> MetaplError:
    return MetaplError(
        f"{who} changed its input in place (an operation such as x.mul_() or ReLU(inplace=True) on the input itself), "
        "so later passes would read another batch; expected an unchanged input: begin its forward with x = x.clone(). "
        "The given batch now holds the changed values."
    )


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a tree that may be written to."""
    return [t for t in leaves_of(tree) if isinstance(t, Tensor) and not t.is_inference()]


_LEAF = re.compile(r"leaf Variable that requires grad (is being|has been) used in an in-place operation")


# A table of hooks, and where they are.
Hooks = tuple[str, dict[Any, Any]]
_OF_ALL: tuple[dict[int, Any], ...] = (modules._global_backward_hooks, modules._global_backward_pre_hooks)


def hooks_of(parameters: Mapping[str, nn.Parameter], parts: Sequence[tuple[str, nn.Module]]) -> list[Hooks]:
    """The hooks on gradients of a student's parameters and parts, which come with the prefixes of their names."""
    tables: list[tuple[str, Any]] = [(f"its parameter {name}", p._backward_hooks) for name, p in parameters.items()]
    for prefix, part in parts:
        where = f"its module {prefix.rstrip('.') or type(part).__name__}"
        tables += [(where, part._backward_hooks), (where, part._backward_pre_hooks)]
    return [(where, table) for where, table in tables if table]


@contextmanager
def changes_noted(hooks: Sequence[Hooks], changed: list[str], *, forward: bool = False) -> Iterator[None]:
    """Note in ``changed`` where hooks change the gradients that they are given in this block: these, those on all
    modules, and in a ``forward`` pass those that it puts on tensors."""

    def noting(where: str, hook: Any) -> Any:
        def called(*given: Any) -> Any:
            tensors = [t for g in given for t in (g if isinstance(g, tuple) else (g,)) if isinstance(t, Tensor)]
            versions = [t._version for t in tensors]
            result = hook(*given)
            new = result if isinstance(result, tuple) else (result,)
            returned = any(t is not None and not any(t is old for old in tensors) for t in new)
            if returned or versions != [t._version for t in tensors]:
                changed.append(where)
            return result

        return called

    with ExitStack() as stack:
        for where, table in (*hooks, *(("all modules", table) for table in _OF_ALL if table)):
            stack.callback(table.update, dict(table))
            table.update({key: noting(where, hook) for key, hook in table.items()})
        if forward:
            register: Any = Tensor.register_hook
            stack.callback(setattr, Tensor, "register_hook", register)
            Tensor.register_hook = lambda t, hook: register(t, noting("a tensor of its forward", hook))  # type: ignore[method-assign]
        yield


def hook_changes(where: str) -> MetaplError:
    """The error about a pass that is to be run again, or differentiated twice, and had a hook change its gradient."""
    return MetaplError(
        f"the student has a hook on {where} that changes gradients (register_hook, register_full_backward_hook), which "
        "a pass that is run again does not have, so the feedback would be wrong. Remove the hook: clip by clip_norm=, "
        'and scale a gradient in forward. Or look one step ahead with mode="unrolled", or "reinforce", which take the '
        "gradient as the hook leaves it."
    )


def refuse_hooks(parameters: Mapping[str, nn.Parameter], *, late: bool = False) -> None:
    """Refuse hooks of parameters in whose places other tensors stand; ``late``: those that wait for ``.grad``, which
    no pass here fills."""
    for name, p in parameters.items():
        if late and p._post_accumulate_grad_hooks:
            raise MetaplError(
                f"the student's parameter {name} has a hook of register_post_accumulate_grad_hook, which would never "
                "be called: metapl takes the student's gradient without filling .grad. Remove the hook, or use "
                "register_hook, which is called with the gradient."
            )
        if not late and p._backward_hooks:
            raise MetaplError(
                f"the student's parameter {name} has a hook of register_hook, which is not called where other tensors "
                "stand in for the parameters: from the second student step on, and in a step that is taken again on a "
                "revised signal. Remove the hook, or look one step ahead with a problem that revises no signal."
            )


class Made(TorchFunctionMode):
    """Notes the memory that the functions of a block make, or are given as ``inputs``: a leaf there, such as
    ``x.clone().requires_grad_()``, which a network differentiates in, is its own."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.memory = _memory(inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = {memory_of(result)} if isinstance(result, Tensor) else _memory(result)
        if not made <= self.memory:
            self.memory |= made - _memory((args, kwargs))  # a view of a weight is not made here
        return result


def _memory(tree: Any) -> set[int | None]:
    return {memory_of(t) for t in leaves_of(tree) if isinstance(t, Tensor)}


def stranger(
    values: Iterable[Tensor],
    known: Iterable[Tensor],
    leaves: Collection[int] = (),
    made: Made | None = None,
    *,
    parameters_alone: bool = False,
    operations: list[type] | None = None,
) -> Tensor | None:
    """A tensor that requires a gradient and that the values depend on, on a walk over their graph that ends at known
    tensors and ``leaves``, by their ids; None where there is none. Leaves may be ``made`` on the way; where that is not
    known, ``parameters_alone`` are looked for. ``operations`` gets those on the way."""
    stops = list(known)
    ends = {(t.grad_fn, t.output_nr) for t in stops if t.grad_fn is not None}
    allowed = {*leaves, *(id(t) for t in stops if t.grad_fn is None)}
    seen: set[Any] = {None}
    edges: list[tuple[Any, int]] = []
    for value in values:
        if value.grad_fn is not None:
            edges.append((value.grad_fn, value.output_nr))
        elif value.requires_grad and id(value) not in allowed:
            return value
    while edges:
        edge = edges.pop()
        node = edge[0]
        if node in seen or edge in ends:
            continue
        seen.add(node)
        following = node.next_functions
        if following:
            edges += following
            if operations is not None:
                operations.append(type(node))
            continue
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is None or id(leaf) in allowed or (made is not None and memory_of(leaf) in made.memory):
            continue
        if not parameters_alone or isinstance(leaf, nn.Parameter):
            return leaf
    return None


def refuse_stranger(who: str, found: Tensor | None, remedy: str) -> None:
    """Refuse what depends on a tensor that the feedback knows nothing of: ``who`` reads it, as the subject of a
    sentence."""
    if found is not None:
        raise MetaplError(
            f"{who} reads {described(found)}, that requires a gradient and is no weight of the student, such as a "
            "weight of the teacher or a parameter of the problem. The feedback is on the signal alone, so this "
            f"gradient would be lost; {remedy} Where it is meant as a constant, write .detach()."
        )
