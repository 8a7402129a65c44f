"""What the passes of a network move besides the weights that it learns: state and generators, saved and put back.

State is the buffers and the parameters that are not learned, such as the average of a momentum
encoder. What a network keeps elsewhere, in attributes or in Python objects, is not carried
(docs/contract.md).
"""

from __future__ import annotations

import hashlib
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import chain
from operator import attrgetter
from threading import RLock
from typing import Any, NamedTuple, TypeVar, cast

import numpy
import torch
from torch import Tensor, nn

from metapl.execution import checks
from metapl.execution.graphs import nodes_of
from metapl.execution.numerics import HALF, explain, takes_formulas, wide
from metapl.execution.shards import is_sharded
from metapl.execution.weight_norm import formulas_of, weights_made_by_hooks
from metapl.runs.checkpoint import plain_states

Table = dict[str, Any]  # of a module: its parameters, or its buffers
Slot = tuple[Table, Any, Any]  # a place in a table, and a tensor for it, or a part of the module


class RandomState(NamedTuple):
    """A saved state of the default generators that a forward pass on ``device`` may draw from.

    Those of Python and NumPy are read where ``outside`` says so: to read them takes 40
    microseconds, a twentieth of a small network's step, and :attr:`Slots.draws_outside` tells for
    which networks it is needed.
    """

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None = None
    generator: torch.Generator | None = None  # of labels, where they are drawn by one of their own,
    drawn: Tensor | None = None  # and its state
    python: Any = None  # that of Python's random,
    numpy: Any = None  # and that of NumPy's global generator; None: not read

    @staticmethod
    def now(
        device: torch.device, generator: torch.Generator | None = None, *, outside: bool = True
    ) -> RandomState:
        """The current state; it is kept on the host."""
        accelerator = (
            None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        )
        drawn = None if generator is None else generator.get_state()
        cpu = torch.default_generator.get_state()
        if not outside:
            return RandomState(device, cpu, accelerator, generator, drawn)
        python, of_numpy = random.getstate(), numpy.random.get_state(legacy=False)  # noqa: NPY002 - the global one
        return RandomState(device, cpu, accelerator, generator, drawn, python, of_numpy)

    @property
    def is_whole(self) -> bool:
        """Whether the generators of Python and NumPy were read too."""
        return self.python is not None

    def values(self) -> dict[str, Any]:
        """The states by name, as they are stored; with the device they make the whole."""
        found: dict[str, Any] = {"cpu": self.cpu, "accelerator": self.accelerator}
        return (
            {**found, "python": self.python, "numpy": plain_states(self.numpy)}
            if self.is_whole
            else found
        )

    def restore(self) -> None:
        torch.default_generator.set_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        if self.generator is not None and self.drawn is not None:
            self.generator.set_state(self.drawn)
        if self.is_whole:
            random.setstate(self.python)
            numpy.random.set_state(self.numpy)  # noqa: NPY002 - the global one

    def branch(self) -> RandomState:
        """The start of a stream that is independent of the one that continues from here.

        A function of this state.
        """
        if (fixed := _branch.get()) is not None:
            return fixed
        # A feedback pass that drew from the caller's stream would share its numbers with the
        # caller's next draw.
        digest = hashlib.blake2b(self.cpu.numpy().data, digest_size=8)
        if self.accelerator is not None:
            digest.update(self.accelerator.numpy().data)
        branched = _seeded(digest.digest(), self.device, self.accelerator is not None)
        if not self.is_whole:
            return branched
        # Torch's stream is the same where these are not read. Theirs depends on their own states
        # too: torch's does not move where a network draws from them alone.
        digest.update(repr(self._outside()).encode())
        seed = int.from_bytes(digest.digest(), "little")
        kind = getattr(numpy.random, self.numpy["bit_generator"])
        of_numpy = numpy.random.RandomState(kind(seed)).get_state(legacy=False)
        return branched._replace(python=random.Random(seed).getstate(), numpy=of_numpy)

    def is_as(self, other: RandomState) -> bool:
        """Whether two states of the same generators are the same, as far as both were read."""
        if self.is_whole and other.is_whole and self._outside() != other._outside():
            return False
        pairs = (
            (self.cpu, other.cpu),
            (self.accelerator, other.accelerator),
            (self.drawn, other.drawn),
        )
        return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None)

    def has_drawn_outside(self, before: RandomState) -> bool:
        """Whether Python's or NumPy's generator has moved since a state ``before``.

        Both have to be whole.
        """
        return bool(self._outside() != before._outside())

    def _outside(self) -> Any:
        return self.python, plain_states(self.numpy)


@lru_cache(maxsize=4)  # where nothing draws, every step begins in the same state
def _seeded(digest: bytes, device: torch.device, on_device: bool) -> RandomState:
    seed = int.from_bytes(digest, "little") >> 1  # 63 bits: every generator takes them
    start = torch.Generator().manual_seed(seed).get_state()
    return RandomState(
        device, start, torch.Generator(device).manual_seed(seed).get_state() if on_device else None
    )


_branch: ContextVar[RandomState | None] = ContextVar("branch", default=None)


@contextmanager
def branching_to(state: RandomState) -> Iterator[None]:
    """Let every :meth:`RandomState.branch` in this block start at a given state."""
    token = _branch.set(state)
    try:
        yield
    finally:
        _branch.reset(token)


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Draw from ``state`` in this block; afterwards the generators are as they were before."""
    before = RandomState.now(state.device, state.generator, outside=state.is_whole)
    state.restore()
    try:
        yield
    finally:
        before.restore()


class Slots:
    """The places where a module holds its tensors, as they are in one step.

    Attributes:
        parameters: every place of a parameter; one that is held twice has two.
        learned: the parameters that require a gradient, once each, by their first name.
        places: every place of one of these, with that name.
        frozen: the places of the others.
        buffers: the tables of buffers.
        formulas: the places of parts whose kernel has no second derivative, with one that has it
            for each.
        mark: what verification holds for, as one number: modes, numbers of hooks, and which
            parameters are learned.
        state: the snapshot that the step's first pass takes over.
        takes_gradients: whether the forward takes gradients itself, and needs a graph in every
            pass; found by trying.
        findings: what the first step with this network in these modes has found.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: list[Slot] = []
        self.frozen: list[Slot] = []
        self.state: State | None = None  # as a step begins, until its first pass has taken it
        self.takes_gradients = False
        first: dict[int, tuple[str, nn.Parameter]] = {}
        named = named_parts(module)
        for prefix, part in named:
            for name, p in part._parameters.items():
                if p is None:
                    continue
                self.parameters.append((part._parameters, name, p))
                if p.requires_grad:
                    first.setdefault(id(p), (prefix + name, p))
                elif not is_sharded(p):  # a block exchanges those, whatever the table holds
                    self.frozen.append((part._parameters, name, p))
        self.learned = dict(first.values())
        self.places = [
            (table, name, first[id(p)][0]) for table, name, p in self.parameters if id(p) in first
        ]
        self.buffers = [part._buffers for _, part in named]
        self.formulas: list[Slot] = [
            place.slot() for _, part in named for place in formulas_of(part)
        ]
        self._made = [
            place
            for _, part in named
            if part._forward_pre_hooks
            for place in weights_made_by_hooks(part)
        ]
        self._parts = [part for _, part in named]
        self._tables: list[Any] = [
            table for part in self._parts for table in (part._parameters, part._modules)
        ]
        self._hooks = [hooks for part in self._parts for hooks in _HOOKS(part)]
        self._held = [p for _, _, p in self.parameters]
        self._none: State | None = None
        self._contents_when_read = self.contents()
        self.mark = hash(tuple(self._contents_when_read[1]))
        self.findings = _FINDINGS.setdefault(module, {}).setdefault(self.mark, Findings())

    def contents(self) -> tuple[list[Any], list[int]]:
        """What the tables hold, by name and identity, and the modes, numbers of hooks and
        ``requires_grad`` flags, with one more number where a parameter has hooks: the slots hold as
        long as these are what they were."""
        flags = [*map(_TRAINING, self._parts), *map(len, self._hooks), *map(_LEARNS, self._held)]
        if any(map(_HOOKED, self._held)):
            flags.append(-1)
        held = [
            *chain.from_iterable(self._tables),
            *map(id, chain.from_iterable(map(dict.values, self._tables))),
        ]
        return held, flags

    def are_current(self) -> bool:
        """Return whether the module holds what it held when these slots were read."""
        return self.contents() == self._contents_when_read

    def in_formulas(self) -> list[Slot]:
        """What a pass holds beside its weights where it takes formulas for kernels.

        Usually nothing.
        """
        return self.formulas if self.formulas and takes_formulas() else []

    def made(self) -> list[Slot]:
        """The weights that hooks have made in the last pass, in their places.

        A replay puts them back.
        """
        return [(table, name, table[name]) for table, name in self._made if name in table]

    def random_state(
        self, device: torch.device, generator: torch.Generator | None = None
    ) -> RandomState:
        """The state of the generators that a pass of this network may draw from."""
        return RandomState.now(device, generator, outside=self.draws_outside is not False)

    @property
    def draws_outside(self) -> bool | None:
        """Whether passes, or inner losses, draw from Python's or NumPy's generators; None until a
        step has been watched."""
        return self.findings.draws_outside

    def watch_losses_of(self, problem: Any) -> None:
        """Look at the draws again where the losses are those of another problem than before.

        The library's own losses draw from torch alone.
        """
        if type(problem).__module__.startswith("metapl.problems"):
            return
        findings = self.findings
        if findings.problem is None or findings.problem() is not problem:
            findings.problem = weakref.ref(problem)
            findings.draws_outside = findings.draws_outside or None
            findings.draws_in_loss = findings.draws_in_loss or None

    def watch(self, before: RandomState, after: RandomState) -> None:
        """Note whether Python's or NumPy's generators moved between two states, as long as that is open.

        Between them a pass ran, or a loss of its outputs.
        """
        if self.draws_outside is None and after.has_drawn_outside(before):
            self.findings.draws_outside = True

    def half_types(self, outputs: Tensor) -> frozenset[torch.dtype]:
        """Return the types of half precision in which a part of the network computes, found by the
        graph of its first outputs."""
        if self.findings.half_types is None and outputs.grad_fn is not None:
            results = [
                result
                for node in nodes_of([outputs])
                for result in getattr(node, "_input_metadata", ())
            ]
            self.findings.half_types = frozenset(
                HALF.intersection(result.dtype for result in results)
            )
        return self.findings.half_types or frozenset()

    def snapshot(self, *, copies: bool = True) -> State:
        """The network's state; of one that has none, the same each time."""
        if any(self.buffers) or self.frozen:
            return State(self, copies=copies)
        if self._none is None:
            self._none = State(self)
        return self._none


@dataclass
class Findings:
    """What is found of a network in the first step with it, and holds until its modes or hooks change."""

    draws_outside: bool | None = None
    # Whether inner losses draw from any generator; None until a step has been watched.
    draws_in_loss: bool | None = None
    # Whose inner loss drew, or did not.
    problem: weakref.ref[Any] | None = None
    half_types: frozenset[torch.dtype] | None = None


# By networks, and their marks: a call of hypergradient reads the tables anew, and finds nothing
# new.
_FINDINGS: weakref.WeakKeyDictionary[nn.Module, dict[int, Findings]] = weakref.WeakKeyDictionary()
_HOOKS = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_TRAINING, _LEARNS, _HOOKED = (
    attrgetter("training"),
    attrgetter("requires_grad"),
    attrgetter("_backward_hooks"),
)


class State:
    """A snapshot of a network's state.

    The tensors that its tables hold, and their values, copied or not.
    """

    def __init__(self, slots: Slots, *, copies: bool = True) -> None:
        self._all, self._frozen = slots.buffers, slots.frozen
        self._tables = [(table, dict(table)) for table in slots.buffers if table]
        held = [
            *chain.from_iterable(of.values() for _, of in self._tables),
            *(p for _, _, p in slots.frozen),
        ]
        self._held: dict[int, Tensor] = {id(t): t for t in held if t is not None}
        self._values = {
            key: t.detach().clone() if copies else t.detach() for key, t in self._held.items()
        }

    def tables(self) -> list[tuple[Table, Table]]:
        """The tables of buffers, with what they held.

        Of those that a pass has filled since, nothing.
        """
        known = {id(table) for table, _ in self._tables}
        return [
            *self._tables,
            *[(table, {}) for table in self._all if table and id(table) not in known],
        ]

    def restore(self) -> None:
        """Put the tensors back into the tables, and their values into them."""
        for table, held in self.tables():
            table.clear()
            table.update(held)
        for table, name, p in self._frozen:
            table[name] = p
        for key, t in self._held.items():
            before = self._values[key]
            # Past the version counter: a graph that has saved a tensor finds what it has saved.
            if t.shape != before.shape:
                t.data = before
            elif all(
                n < 2 or by for n, by in zip(t.shape, t.stride(), strict=True)
            ):  # nothing writes to expanded ones
                t.data.copy_(before)


@contextmanager
def replay(
    start: RandomState, state: State | Slots, held: Sequence[Slot] = (), *, upcast: bool = False
) -> Iterator[None]:
    """In this block, draws begin at ``start``, and a network holds the tensors ``held`` and fresh
    copies of a ``state``, or of that which it has now (``upcast``: in float32 or wider); afterwards
    all is as it was before."""
    drawn = RandomState.now(start.device, start.generator, outside=start.is_whole)
    start.restore()
    snapshot = state if isinstance(state, State) else state.snapshot(copies=False)
    before = list[tuple[Table, Table]]()
    if snapshot._tables or snapshot._frozen or any(snapshot._all):  # else the network has no state
        tables = snapshot.tables()
        before = [(table, dict(table)) for table, _ in tables]
        fresh: dict[int, Any] = {
            key: wide(t.clone()) if upcast else t.clone() for key, t in snapshot._values.items()
        }
        for table, tensors in tables:
            table.clear()
            table.update(
                (name, fresh.get(id(t))) for name, t in tensors.items()
            )  # None: a buffer without a value yet
        held = [
            *held,
            *[(table, name, stand_in(fresh[id(p)], p)) for table, name, p in snapshot._frozen],
        ]
    own = [table.get(name, _NOTHING) for table, name, _ in held]
    for table, name, t in held:
        table[name] = t
    try:
        yield
    finally:
        put_back(held, own)
        for table, tensors in before:
            table.clear()
            table.update(tensors)
        drawn.restore()


def stand_in(t: Tensor, own: Tensor) -> Tensor:
    """A tensor in the place of a network's own: of its type, with its attributes, and a gradient if
    that needs one, for a forward that asks."""
    if type(t) is type(own) and t.requires_grad == own.requires_grad and not own.__dict__:
        return t
    if issubclass(
        type(own), nn.Parameter
    ):  # not that of a sharded one, whose type tells how it is held
        t = t if isinstance(t, type(own)) else t.as_subclass(type(own))
        if own.__dict__:
            t.__dict__.update(own.__dict__)
    return t.requires_grad_(own.requires_grad) if t.is_leaf else t


@contextmanager
def swapped(held: Sequence[Slot]) -> Iterator[None]:
    """Put these tensors into their places in this block, a backward pass included.

    Checkpoints run the module in it.
    """
    before = [table.get(name, _NOTHING) for table, name, _ in held]
    for table, name, t in held:
        table[name] = t
    try:
        yield
    finally:
        put_back(held, before)


def put_back(held: Sequence[Slot], before: Sequence[Any]) -> None:
    """Put what the places of these slots held ``before`` back into them."""
    for (table, name, _), t in zip(held, before, strict=True):
        if t is _NOTHING:
            del table[name]
        else:
            table[name] = t


_NOTHING = object()  # in the place of what a table did not hold


@contextmanager
def with_contents_of(twin: Any, original: Any) -> Iterator[None]:
    """Let a module, or another object, hold what a copy of it, its ``twin``, holds, in this block.

    Functions are not copied: a loss, a hook or a forward that reads the original by a closure, a
    global or ``self`` then reads what the copy is moved to, and what its passes leave in
    attributes. Both have one ``__dict__`` meanwhile, so that what is exchanged in one is exchanged
    in the other. Parts of a module that are no copies of one another, and objects with slots, are
    left alone.
    """
    pairs = [(twin, original)]
    if isinstance(original, nn.Module):
        pairs = [*zip(twin.modules(), original.modules(), strict=True)]
    contents = [(part, vars(part)) for _, part in pairs if hasattr(part, "__dict__")]
    try:
        for part_of_twin, part in pairs:
            if type(part_of_twin) is type(part) and hasattr(part, "__dict__"):
                # Modules and frozen dataclasses have a __setattr__ of their own.
                object.__setattr__(part, "__dict__", vars(part_of_twin))
        yield
    finally:
        for part, held in contents:
            object.__setattr__(part, "__dict__", held)


@contextmanager
def all_with_contents_of(pairs: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Let each original hold what its copy holds, in this block, for pairs of a copy and its original.

    Pairs without a copy, such as a teacher that a problem does not have, are left out.
    """
    with ExitStack() as stack:
        for twin, original in pairs:
            if original is not None and twin is not original:
                stack.enter_context(with_contents_of(twin, original))
        yield


_LOCK = RLock()
Function = TypeVar("Function", bound=Callable[..., Any])


def one_at_a_time(step: Function) -> Function:
    """A step for which those of other threads wait: replays set PyTorch's default generators."""

    @wraps(step)
    def locked(*args: Any, **options: Any) -> Any:
        with _LOCK:  # a decorator of contextlib would take ten calls
            return step(*args, **options)

    return cast(Function, locked)


@contextmanager
def restored(
    *networks: Slots,
    device: torch.device,
    trained: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
    always: bool = False,
) -> Iterator[checks.Fault]:
    """Run a step in this block. If it fails (or ``always``), buffers, frozen parameters, gradients
    and generators are bit for bit as they were. The gradients of the weights that are ``trained``
    are cleared before and after. Yields the fault of the report, in which checks on a device wait;
    with ``always`` they are read at once."""
    fault, saved, learning = checks.Fault(), list[State](), torch.is_grad_enabled()
    with _LOCK:
        for slots in networks:
            slots.state = slots.snapshot()
            saved.append(slots.state)
        may_draw_outside = any(slots.draws_outside is not False for slots in networks)
        drawn = RandomState.now(device, generator, outside=may_draw_outside)
        grads = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        token = checks.deferred.set(None if always else fault)
        torch._C._set_grad_enabled(True)
        try:
            yield fault
        except BaseException as error:
            always = True
            for p, grad in zip(trained, grads, strict=True):
                p.grad = grad
            drawn.restore()
            explain(error)
            raise
        else:
            for p in trained:
                p.grad = None
            for slots in networks:
                if slots.draws_outside is None:
                    slots.findings.draws_outside = False
                if slots.findings.draws_in_loss is None:
                    slots.findings.draws_in_loss = False
        finally:
            torch._C._set_grad_enabled(learning)
            checks.deferred.reset(token)
            # of a caller's region: it holds casts of weights from before the step
            torch.clear_autocast_cache()
            for state in saved if always else ():
                state.restore()


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """``named_modules`` with prefixes of the names of tensors."""
    return [(f"{name}." if name else "", part) for name, part in module.named_modules()]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module learns, by name.

    One that is held in several places has its first name.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
