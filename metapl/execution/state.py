"""What passes of a network move besides the weights that it learns: its state and the generators.

The state of a network is its buffers and its parameters that are not learned, such as the average
of a momentum encoder. What a network keeps elsewhere, in attributes or in Python objects, is not
carried (docs/contract.md).

From top to bottom: :class:`RandomState` is a saved state of the generators. :class:`Slots` are the
places where a module holds its tensors, and :class:`State` a snapshot of what it holds there.
:func:`replay` runs a network again from both. :func:`restored` guards a whole step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from itertools import chain
from operator import attrgetter, is_, methodcaller
from threading import RLock
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from metapl.execution import checks
from metapl.execution.numerics import explain, takes_formulas, wide
from metapl.execution.shards import is_sharded
from metapl.execution.weight_norm import formulas_of

# A table of a module: its parameters, its buffers or its parts, by name.
Table = dict[str, Any]

# A place in a table, as the table and a name, and what is to be held there: a tensor or a part.
Slot = tuple[Table, Any, Any]

# The tables of hooks on all modules of the process.
HOOKS_EVERYWHERE = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)

# In the place of what a table did not hold.
_ABSENT = object()


# -------------------------------------------------------------------------------------- generators


class RandomState(NamedTuple):
    """A saved state of torch's default generators that a forward pass on ``device`` may draw from.

    Attributes:
        cpu: the state of the default generator of the host.
        accelerator: that of the device's default generator; None on a CPU.
        generator: the generator of labels, where they are drawn by one of their own.
        generator_state: its state.
    """

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None = None
    generator: torch.Generator | None = None
    generator_state: Tensor | None = None

    @staticmethod
    def now(device: torch.device, generator: torch.Generator | None = None) -> RandomState:
        """Return the current state; it is kept on the host.

        Args:
            generator: that of labels.
        """
        if not checks.has_values.get():
            return OneStream(device, torch.empty(0))
        on_host = torch.default_generator.get_state()
        if device.type == "cpu" and generator is None:
            return RandomState(device, on_host)
        accelerator = None
        if device.type != "cpu":
            accelerator = torch.get_device_module(device).get_rng_state(device)
        generator_state = None if generator is None else generator.get_state()
        return RandomState(device, on_host, accelerator, generator, generator_state)

    def values(self) -> dict[str, Any]:
        """Return the states by name, as they are stored; the device is not among them."""
        return {"cpu": self.cpu, "accelerator": self.accelerator}

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.default_generator.set_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        if self.generator is not None and self.generator_state is not None:
            self.generator.set_state(self.generator_state)

    def branch(self) -> RandomState:
        """Return the start of a stream that is independent of the one that continues from here.

        It is a function of this state. A feedback pass that drew from the caller's stream would
        share its numbers with the caller's next draw.
        """
        fixed = _branch.get()
        if fixed is not None:
            return fixed
        states = [self.cpu.numpy().tobytes()]
        if self.accelerator is not None:
            states.append(self.accelerator.numpy().tobytes())
        return _seeded(self.device, *states)

    def equals(self, other: RandomState) -> bool:
        """Return whether two states of the same generators are equal."""
        pairs: Any = zip(self, other, strict=True)
        # The states are on the host, also those of a device's generator.
        states = [(a, b) for a, b in pairs if isinstance(a, Tensor) and b is not None]
        return all(bytes(a.numpy()) == bytes(b.numpy()) for a, b in states)


class OneStream(RandomState):
    """A state of generators that no pass restores, since no graph of operations can.

    So all passes draw from one stream, one after the other.
    """

    def restore(self) -> None:
        """Do nothing."""

    def branch(self) -> RandomState:
        """Return the same stream."""
        return self

    def equals(self, other: RandomState) -> bool:
        """Return True: what has been drawn is not known."""
        return True


# Where nothing draws, every step begins in the same state, and branches to the same stream.
@lru_cache(maxsize=4)
def _seeded(device: torch.device, *states: bytes) -> RandomState:
    """Return the state of torch's generators that are seeded by a digest of these states.

    The first is the host's, the second the accelerator's where the device is one.
    """
    digest = hashlib.blake2b(b"".join(states), digest_size=8).digest()
    # Every generator takes a seed of 63 bits.
    seed = int.from_bytes(digest, "little") >> 1
    cpu = torch.Generator().manual_seed(seed).get_state()
    accelerator = None
    if len(states) > 1:
        accelerator = torch.Generator(device).manual_seed(seed).get_state()
    return RandomState(device, cpu, accelerator=accelerator)


_branch: ContextVar[RandomState | None] = ContextVar("branch", default=None)


def branching_to(state: RandomState) -> AbstractContextManager[None]:
    """Let every :meth:`RandomState.branch` in this block return this state."""
    return checks.having(_branch, state)


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Draw from ``state`` in this block; afterwards the generators are as they were before."""
    caller_state = RandomState.now(state.device, state.generator)
    state.restore()
    try:
        yield
    finally:
        caller_state.restore()


# ------------------------------------------------------------------------------ tables and tensors


class Slots:
    """The places where a module holds its tensors, as they are in one step.

    Args:
        module: whose places they are.
        optimizers: of ``torch.optim`` that step on its weights, whose hooks count as the module's.

    Attributes:
        parameters: every place of a parameter; one that is held twice has two.
        learned: the parameters that require a gradient, once each, by their first name.
        places: every place of one of these, with that name.
        frozen: the places of the others.
        buffers: the tables of buffers.
        formulas: the places of parts whose kernel has no second derivative, with one that has it
            for each.
        mark: what verification holds for, as one number: modes, numbers of hooks, which parameters
            are learned, and whether a ``step()`` of the optimizers was replaced on the object.
        hooks: those of all parts, and on the steps of the optimizers.
        state: the snapshot with which a step begins; None when its first pass has taken it over.
        takes_gradients: whether the forward takes gradients itself, and needs a graph in every
            pass; found by trying.
        half_types: the types of half precision in which a part of the network computes, from the
            graph of its first outputs; None before.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        self.module = module
        self.optimizers = optimizers
        self.parameters: list[Slot] = []
        self.frozen: list[Slot] = []
        self.state: State | None = None
        self.takes_gradients = False
        self.half_types: set[torch.dtype] | None = None

        named = named_parts(module)
        # By identity: a parameter that several parts hold has the name of the first of them.
        first_names: dict[int, str] = {}
        self.learned: dict[str, nn.Parameter] = {}
        for prefix, part in named:
            for name, p in part._parameters.items():
                if p is None:
                    continue
                slot = (part._parameters, name, p)
                self.parameters.append(slot)
                if p.requires_grad:
                    if id(p) not in first_names:
                        first_names[id(p)] = prefix + name
                        self.learned[prefix + name] = p
                elif not is_sharded(p):
                    # A block exchanges sharded ones, whatever the table holds.
                    self.frozen.append(slot)
        self.places = [
            (table, name, first_names[id(p)])
            for table, name, p in self.parameters
            if id(p) in first_names
        ]

        parts = [part for _, part in named]
        self.buffers = [part._buffers for part in parts]
        self.formulas: list[Slot] = []
        for part in parts:
            self.formulas += formulas_of(part)

        # What :meth:`are_current` compares, gathered once, as it is asked in every step.
        self._is_copy = False
        self._parts = parts
        tables: list[Any] = []
        self._hooks: list[Any] = []
        for part in parts:
            tables += [part._parameters, part._modules]
            self._hooks += hooks_of(part)
        for optimizer in optimizers:
            self._hooks += _hooks_of_step(optimizer)
        self._tables = [table for table in tables if table]
        self._empty_tables = [table for table in (*tables, *self._hooks) if not table]
        self._table_names = [*chain.from_iterable(self._tables)]
        self._table_values = [*chain.from_iterable(map(dict.values, self._tables))]
        self._tensors = [p for _, _, p in self.parameters]

        self._empty_state: State | None = None
        hook_counts = [*map(len, self._hooks)]
        self._modes = [*map(_is_training, parts)]
        self._hooks = [table for table in self._hooks if table]
        self.hooks = [*chain.from_iterable(map(dict.values, self._hooks))]
        self._are_learned = [*map(_requires_grad, self._tensors)]
        self._parameters_have_hooks = any(map(_hooks_of_parameter, self._tensors))
        self._are_replaced = [*map(_has_own_step, map(vars, optimizers))]
        marks = [*self._modes, *hook_counts, *self._are_learned, *self._are_replaced]
        self.mark = hash((*marks, -1) if self._parameters_have_hooks else tuple(marks))

    def __setstate__(self, values: dict[str, Any]) -> None:
        # A copy of a module may hold its parts in other tables than the copies of these.
        vars(self).update(values)
        self._is_copy = True

    def are_current(self) -> bool:
        """Return whether the module holds what it held when these slots were read, and as then.

        That is the same objects under the same names, in the same modes, with the same hooks, and
        with optimizers whose ``step()`` is on the object, or is not, as it was then. Every
        step asks this of hundreds of places, so all loops run in C. Copies never are current.
        """
        if self._is_copy:
            return False
        if any(self._empty_tables) or [*chain.from_iterable(self._tables)] != self._table_names:
            return False
        values = chain.from_iterable(map(dict.values, self._tables))
        if not all(map(is_, values, self._table_values)):
            return False
        hooks = [*chain.from_iterable(map(dict.values, self._hooks))]
        if len(hooks) != len(self.hooks) or not all(map(is_, hooks, self.hooks)):
            return False
        return (
            any(map(_hooks_of_parameter, self._tensors)) == self._parameters_have_hooks
            and [*map(_is_training, self._parts)] == self._modes
            and [*map(_requires_grad, self._tensors)] == self._are_learned
            and [*map(_has_own_step, map(vars, self.optimizers))] == self._are_replaced
        )

    def anew(self) -> Slots:
        """Return the places as they are now."""
        return Slots(self.module, self.optimizers)

    def in_formulas(self) -> list[Slot]:
        """Return what a pass holds beside its weights where it takes formulas for kernels.

        Usually nothing.
        """
        if self.formulas and takes_formulas():
            return self.formulas
        return []

    def snapshot(self, *, copies: bool = True) -> State:
        """Return the network's state as it is now.

        A network that has none gets the same one each time.

        Args:
            copies: whether the values are copied, so that they outlast the next pass.
        """
        if any(self.buffers) or self.frozen:
            return State(self, copies=copies)
        if self._empty_state is None:
            self._empty_state = State(self)
        return self._empty_state


# Readers of attributes that map() calls without a frame of Python for each part.
hooks_of = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_is_training = attrgetter("training")
_requires_grad = attrgetter("requires_grad")
_hooks_of_parameter = attrgetter("_backward_hooks")
_hooks_of_step = attrgetter("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_has_own_step = methodcaller("__contains__", "step")


class State:
    """A snapshot of a network's state.

    It has the tensors that the network's tables hold, and their values, copied or not.
    """

    def __init__(self, slots: Slots, *, copies: bool = True) -> None:
        self._buffer_tables = slots.buffers
        self._frozen = slots.frozen
        # What the tables hold, of those that hold anything.
        self._contents = [(table, dict(table)) for table in slots.buffers if table]
        buffers = chain.from_iterable(contents.values() for _, contents in self._contents)
        frozen = (p for _, _, p in slots.frozen)
        # Tensors and their values by identity: one that is held in several places has one value.
        self._tensors: dict[int, Tensor] = {
            id(t): t for t in chain(buffers, frozen) if t is not None
        }
        self._table_values: dict[int, Tensor] = {}
        for key, t in self._tensors.items():
            self._table_values[key] = t.detach().clone() if copies else t.detach()

    def tables(self) -> list[tuple[Table, Table]]:
        """Return the tables of buffers, each with a dict of what it held.

        A table that a pass has filled since then held nothing.
        """
        held_something = {id(table) for table, _ in self._contents}
        tables = [*self._contents]
        for table in self._buffer_tables:
            if table and id(table) not in held_something:
                tables.append((table, {}))
        return tables

    def put_copies(self, *, upcast: bool) -> tuple[list[tuple[Table, Table]], list[Slot]]:
        """Put copies of the buffers into their tables.

        Args:
            upcast: have the copies in float32 or wider.

        Returns:
            What the tables held before, and slots with copies of the frozen parameters.
        """
        tables = self.tables()
        contents_before = [(table, dict(table)) for table, _ in tables]
        copies: dict[int, Any] = {}
        for key, value in self._table_values.items():
            copies[key] = wide(value.clone()) if upcast else value.clone()
        for table, contents in tables:
            table.clear()
            for name, t in contents.items():
                # A buffer without a value yet has no copy either.
                table[name] = copies.get(id(t))
        # One for all places of a tensor, which is one of the network's parameters.
        stand_ins = {id(p): stand_in(copies[id(p)], p) for _, _, p in self._frozen}
        frozen = [(table, name, stand_ins[id(p)]) for table, name, p in self._frozen]
        return contents_before, frozen

    def restore(self) -> None:
        """Put the tensors back into the tables, and their values into them."""
        put_contents(self.tables())
        for table, name, p in self._frozen:
            table[name] = p
        for key, t in self._tensors.items():
            value = self._table_values[key]
            # Past the version counter: a graph that has saved a tensor finds what it has saved.
            if t.shape != value.shape:
                t.data = value
            elif not _is_expanded(t):
                t.data.copy_(value)


def _is_expanded(t: Tensor) -> bool:
    """Return whether several entries of a tensor share memory, so that nothing writes to it."""
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))


# ------------------------------------------------------------ blocks in which a module holds others


@contextmanager
def replay(
    start: RandomState, state: State | Slots, slots: Sequence[Slot] = (), *, upcast: bool = False
) -> Iterator[None]:
    """Run a network in this block as if from a saved state; afterwards all is as it was before.

    Args:
        start: where draws begin.
        state: a snapshot of which the network holds fresh copies; :class:`Slots`: of the state
            that it has now.
        slots: what else it holds, such as other weights.
        upcast: have the copies in float32 or wider.
    """
    caller_state = RandomState.now(start.device, start.generator)
    start.restore()
    contents_before: list[tuple[Table, Table]] = []
    if isinstance(state, State) or any(state.buffers) or state.frozen:
        snapshot = state if isinstance(state, State) else state.snapshot(copies=False)
        contents_before, frozen = snapshot.put_copies(upcast=upcast)
        slots = [*slots, *frozen]
    held_before = put(slots)
    try:
        yield
    finally:
        put_back(slots, held_before)
        if contents_before:
            put_contents(contents_before)
        caller_state.restore()


def stand_in(t: Tensor, original: Tensor) -> Tensor:
    """Return a tensor for the place of a network's own one, the ``original``.

    It is of the original's type, with its attributes, and requires a gradient if that does, for a
    forward that asks.
    """
    is_alike = type(t) is type(original) and t.requires_grad == original.requires_grad
    if is_alike and not original.__dict__:
        return t
    # The type of a sharded tensor tells how it is held, and is not taken over.
    if issubclass(type(original), nn.Parameter):
        if not isinstance(t, type(original)):
            t = t.as_subclass(type(original))
        if original.__dict__:
            t.__dict__.update(original.__dict__)
    if t.is_leaf:
        t.requires_grad_(original.requires_grad)
    return t


@contextmanager
def swapped(slots: Sequence[Slot]) -> Iterator[None]:
    """Hold these tensors in their places in this block.

    A backward pass belongs into the block, since checkpoints run the module in it.
    """
    held_before = put(slots)
    try:
        yield
    finally:
        put_back(slots, held_before)


def put(slots: Sequence[Slot]) -> list[Any]:
    """Put tensors into their places, and return what the places held."""
    held_before = [table.get(name, _ABSENT) for table, name, _ in slots]
    for table, name, t in slots:
        table[name] = t
    return held_before


def put_back(slots: Sequence[Slot], held_before: Sequence[Any]) -> None:
    """Put back what the places of these slots held, as :func:`put` returned it."""
    for (table, name, _), t in zip(slots, held_before, strict=True):
        if t is _ABSENT:
            del table[name]
        else:
            table[name] = t


def put_contents(tables: Iterable[tuple[Table, Table]]) -> None:
    """Let each table hold these contents, and nothing else."""
    for table, contents in tables:
        table.clear()
        table.update(contents)


def copies_of_results(network: nn.Module) -> dict[int, Tensor]:
    """Return copies of tensors with a graph that lie in attributes, by the id of each.

    A forward may leave such, as an auxiliary loss; deepcopy refuses them.
    """
    copies = {}
    for part in network.modules():
        for t in vars(part).values():
            if isinstance(t, Tensor) and t.grad_fn is not None:
                copies[id(t)] = t.detach().clone()
    return copies


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
        for part, attributes in contents:
            object.__setattr__(part, "__dict__", attributes)


@contextmanager
def all_with_contents_of(pairs: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Let each original hold what its copy holds, in this block.

    Args:
        pairs: of a copy and its original. Pairs without a copy, such as a teacher that a problem
            does not have, are left out.
    """
    with ExitStack() as stack:
        for twin, original in pairs:
            if original is not None and twin is not original:
                stack.enter_context(with_contents_of(twin, original))
        yield


@contextmanager
def in_modes(model: nn.Module, training_parts: frozenset[str]) -> Iterator[None]:
    """Let these parts of a network train in this block, and the others evaluate."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        for name, part in model.named_modules():
            part.training = name in training_parts
        yield
    finally:
        for part, mode in modes:
            part.training = mode


# ------------------------------------------------------------------------------------- whole steps


_LOCK = RLock()
Function = TypeVar("Function", bound=Callable[..., Any])


def one_at_a_time(step: Function) -> Function:
    """Return a step for which those of other threads wait, and whose errors name its batches.

    Replays set PyTorch's default generators, which all threads share.
    """

    @wraps(step)
    def locked(*args: Any, **options: Any) -> Any:
        # A decorator of contextlib would take ten calls.
        with _LOCK:
            try:
                return step(*args, **options)
            except Exception as error:
                from metapl.execution.failed_steps import explain_step

                names_and_values = zip(step.__code__.co_varnames, args, strict=False)
                arguments = {**dict(names_and_values), **options}
                explain_step(error, arguments.get("outer"), arguments.get("inner"))
                raise

    return cast(Function, locked)


@contextmanager
def restored(
    *networks: Slots,
    device: torch.device,
    trained: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
    always: bool = False,
) -> Iterator[checks.Fault]:
    """Run a step in this block, and undo it if it fails.

    Then buffers, frozen parameters, gradients and generators are bit for bit as they were.

    Args:
        trained: weights whose gradients are cleared before and after.
        generator: that of labels.
        always: put buffers and frozen parameters back after a success too, and read checks on a
            device at once.

    Yields:
        The fault of the report, in which checks on a device wait.
    """
    fault = checks.Fault()
    saved: list[State] = []
    had_grad_enabled = torch.is_grad_enabled()
    restores_state = always
    with _LOCK:
        for slots in networks:
            slots.state = slots.snapshot()
            saved.append(slots.state)
        random_state = RandomState.now(device, generator)
        grads = [p.grad for p in trained]
        for p in trained:
            p.grad = None
        token = checks.deferred.set(None if always and checks.has_values.get() else fault)
        torch._C._set_grad_enabled(enabled=True)
        try:
            yield fault
        except BaseException as error:
            restores_state = True
            for p, grad in zip(trained, grads, strict=True):
                p.grad = grad
            random_state.restore()
            explain(error)
            raise
        else:
            for p in trained:
                p.grad = None
        finally:
            torch._C._set_grad_enabled(had_grad_enabled)
            checks.deferred.reset(token)
            # The caller's region of autocast holds casts of weights from before the step.
            torch.clear_autocast_cache()
            if restores_state:
                for state in saved:
                    state.restore()


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return ``named_modules()`` with the prefixes that names of their tensors have."""
    return [(f"{name}." if name else "", part) for name, part in module.named_modules()]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module learns, by name.

    One that is held in several places has its first name.
    """
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
