"""What the passes of a module move besides its weights: its state, copied, replaced for a block, and restored.

State is the buffers, the hooks, the attributes of the modules (numbers, texts and tensors, alone and in lists, tuples,
dicts, sets and deques) and the frozen parameters that a pass writes to (:mod:`metapl.execution.writes`).
What an attribute refers to otherwise, such as a generator of random numbers, is not looked into.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import FrozenInstanceError
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, called
from metapl.execution import checks
from metapl.execution.batch import digest, inputs_of
from metapl.execution.layout import is_block
from metapl.execution.modules import named_parts
from metapl.execution.numerics import wide
from metapl.execution.rng import RandomState
from metapl.execution.shards import is_sharded
from metapl.execution.writes import Journal, Parameters, Slot, Weights, journal, memory_of, tensors_in

SMALL = 1 << 20  # weights, up to which comparing them all costs less than looking at the operators of a pass


class Slots:
    """Every place where a module holds a parameter; one may be held in several."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.looked_at = module, False  # whether the operators of a pass have been looked at
        self.weights: Weights | None = None  # what they are compared with at the end of the step, if not in each pass
        self.state: State | None = None  # at the beginning of the step, until a pass moves it
        self.named_parts = named_parts(module)
        self.parts = [part for _, part in self.named_parts]
        self.parameters: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self.by_part: Parameters = []
        first: dict[int, tuple[str, nn.Parameter]] = {}
        for prefix, part in self.named_parts:
            table = part._parameters
            held = {n: p for n, p in table.items() if p is not None}
            learned = {n: p for n, p in held.items() if p.requires_grad}
            self.parameters += [(table, n, p) for n, p in held.items()]
            self.by_part.append((prefix, table, frozenset(learned)))
            for n, p in learned.items():
                first.setdefault(id(p), (prefix + n, p))
        self.learned = dict(first.values())
        own = [p for _, _, p in self.parameters]
        self.has_frozen = not all(p.requires_grad for p in own)
        self.spread = any(map(is_sharded, own)) or any(map(is_block, self.parts))
        # Whether to compare all weights is as good as to look at the operators of a pass, and costs less: where frozen
        # parameters are state, it is not.
        plain = all(type(p) is nn.Parameter and p.layout is torch.strided for p in own)
        cheap = plain and (sum(p.numel() for p in own) <= SMALL or any(map(checks.waits, own[:1])))
        self.comparable = cheap and not (self.has_frozen or self.spread)
        self.hooked = any(p._backward_hooks for p in own)
        self.hooked |= any(part._backward_hooks or part._backward_pre_hooks for part in self.parts)
        self._seen: list[Any] = []
        self.hold()

    def hold(self) -> bool:
        """Whether the module is as it was found: the same parts, in the same modes, with the same parameters, of the
        same types, and with the same forward methods and hooks."""
        # Identities of objects that are held here, so that no other has theirs; hooks have numbers of their own.
        found: list[Any] = []
        for _, _, p in self.parameters:
            found += [p.requires_grad, p.dtype, not p._backward_hooks, not p._post_accumulate_grad_hooks]
        for part in self.parts:
            held = part.__dict__
            parts, parameters = held["_modules"], held["_parameters"]
            found += [type(part), held["training"], held.get("forward"), *parts, *map(id, parts.values()), *parameters]
            found += [*map(id, parameters.values()), *held["_forward_hooks"], *held["_forward_pre_hooks"]]
            found += [*held["_backward_hooks"], *held["_backward_pre_hooks"]]
        self._seen = self._seen or found
        return self._seen == found

    def compared(self, role: str, waits: bool) -> Weights | None:
        """The weights, to be compared at the end of the step; None where passes are watched one by one."""
        return Weights(self.by_part, role, values=not waits) if self.looked_at and self.comparable else None


def stand_in(t: Tensor, own: Tensor) -> Tensor:
    """A tensor to stand in for a network's own: of its type, with its attributes, and as a leaf, which needs a gradient
    if that does. A forward that asks, such as ``isinstance(weight, nn.Parameter)``, goes the same way."""
    if issubclass(type(own), nn.Parameter):  # not that of a sharded one, whose type tells how it is held
        t = t if isinstance(t, type(own)) else t.as_subclass(type(own))
        vars(t).update(vars(own))
    return t.requires_grad_(own.requires_grad) if t.is_leaf else t


@contextmanager
def swapped(held: Sequence[Slot]) -> Iterator[None]:
    """Put these tensors into their slots in this block; afterwards the slots hold the same tensors as before."""
    # torch.func.functional_call does so for a forward pass only, and a checkpoint runs the module in the backward pass
    # too. (It also restores a submodule that is registered twice wrongly, pytorch/pytorch#164759.)
    before = [(tensors, name, tensors[name]) for tensors, name, _ in held]
    for tensors, name, t in held:
        tensors[name] = t
    try:
        yield
    finally:
        for tensors, name, t in before:
            tensors[name] = t


def own_code(function: Any) -> bool:
    """Whether a function is one of the library's own, which write to nothing that they are given and read nothing
    else; a problem of the user's stands behind some methods of :mod:`metapl.problems.base`."""
    module = None if hasattr(function, "__wrapped__") else getattr(function, "__module__", None)
    if module in ("metapl.problems.pseudo_labels", "metapl.problems.losses"):
        return True
    return module == "metapl.problems.base" and function.__name__ not in ("signal", "inner_loss", "outer_loss")


def unchanged(who: str, given: Mapping[str, Any], function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What a function of the user's, ``who`` in a sentence, returns; refuse one that writes to what it is ``given``:
    trees by name."""
    if own_code(function):
        return function(*args, **named)
    before = [(name, t, t._version) for name, tree in given.items() for t in tensors_in(tree)]
    try:
        result = function(*args, **named)
    except RuntimeError as error:  # autograd's own refusal, where a signal is the leaf that a gradient is taken in
        leaves = dict.fromkeys(name for name, t, _ in before if t.requires_grad and t.is_leaf)
        if leaves and "leaf Variable that requires grad" in str(error):
            raise changed_in_place(who, list(leaves)) from None
        raise
    except FrozenInstanceError as error:
        raise MetaplError(
            f"{who} assigns to a field of what it is given ({error}), which other passes read too; expected it "
            "unchanged: keep the new value in a variable, or in a copy by dataclasses.replace(signal, value=...)."
        ) from error
    changed = dict.fromkeys([name for name, t, version in before if t._version != version])
    after = [t for tree in given.values() for t in tensors_in(tree)]  # others, where one was put into a dict or a list
    if [id(t) for t in after] != [id(t) for _, t, _ in before]:
        now = {id(t) for t in after}
        changed |= dict.fromkeys([name for name, t, _ in before if id(t) not in now] or given)
    if changed:
        raise changed_in_place(who, list(changed))
    return result


def changed_in_place(who: str, changed: Sequence[str]) -> MetaplError:
    return MetaplError(
        f"{who} changed {' and '.join(changed)} in place (an operation such as x.mul_(), x[0] = 0 or x += 1 on what it "
        "is given), and other passes read the same tensors and would be wrong; expected them unchanged: "
        "write x = x * 2 for x.mul_(2), or begin with x = x.clone(). A batch that was given keeps the changed values."
    )


_OTHERS = vars(nn.Module())  # what every module has: hooks, parameters, buffers, parts
_TABLES = [name for name, value in _OTHERS.items() if isinstance(value, dict) and name != "_parameters"]
_PLAIN = frozenset((int, float, bool, str, type(None), complex, torch.dtype, torch.device, torch.Size))
_JSON = frozenset((int, float, bool, str, type(None)))
_NOT_ON_DISK = (
    "and a path that is kept in a folder could not be gone on with; expected the state of a network in buffers, by "
    'register_buffer, or keep_on="cpu" in place of the folder.'
)
_CONTAINERS = frozenset((list, dict, set, deque, OrderedDict, defaultdict, Counter))

# Of each part: its attributes, and what is in its tables (buffers, submodules, hooks), where that is something.
Contents = list[tuple[dict[str, Any], dict[str, dict[Any, Any]]]]


class State:
    """A snapshot of the state of some parts of a network, with copies of what a pass can write to."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parameters = Journal()  # the frozen ones that the pass after it moves
        self._parts = parts
        self._contents = self._now()
        self._copies: dict[int, tuple[Any, Any]] = {}  # of containers without their elements
        self._tensors: dict[int, Tensor] = {}
        self._deep: list[list[str]] = []  # of each part, the attributes that are more than a plain value
        for attributes, tables in self._contents:
            deep = [n for n in attributes.keys() - _OTHERS.keys() if type(attributes[n]) not in _PLAIN]
            self._deep.append(deep)
            self._tensors |= {id(t): t for t in tables.get("_buffers", {}).values() if t is not None}
            for name in deep:
                self._keep(attributes[name])
        self._before = _copies(self._tensors) if self._tensors else {}

    def restore(self) -> None:
        """Put everything back: which objects the modules hold, and what these hold."""
        self._put(self._contents)
        for key, t in self._tensors.items():
            before = self._before[key]
            # Past the version counter: a graph that has saved a tensor finds what it has saved.
            if t.shape != before.shape:
                t.data = before
            elif t.layout is not torch.strided or all(n < 2 or by for n, by in zip(t.shape, t.stride(), strict=True)):
                t.data.copy_(before)  # but not into an expanded tensor, which nothing can write to
        for value, before in self._copies.values():
            value.clear()
            (value.extend if hasattr(value, "extend") else value.update)(before)

    def values(self, base: State) -> list[Any]:
        """The buffers of each part, and its plain attributes that are others than in ``base``, for :meth:`having`.

        Raises: :class:`metapl.MetaplError` where something else has changed since, such as a list or an object.
        """
        if self.parameters.written:
            raise MetaplError(f"the forward writes to a frozen parameter, {_NOT_ON_DISK}")
        found = []
        for (mine, tables), (others, before), deep in zip(self._contents, base._contents, self._deep, strict=True):
            plain = {n: v for n, v in mine.items() if type(v) in _JSON and not (n in others and others[n] == v)}
            buffers = {n: self._before[id(t)] for n, t in tables.get("_buffers", {}).items() if t is not None}
            known = {n for n, t in before.get("_buffers", {}).items() if t is not None}
            told = [n for n in deep if not getattr(mine[n], "requires_grad", False)]
            changed = [n for n in told if n not in others or self._told(mine[n]) != base._told(others[n])]
            changed += [*(buffers.keys() ^ known), *(others.keys() - mine.keys())]
            if changed:
                raise MetaplError(
                    f"the forward changes {changed[0]}, neither a buffer nor a number or a text, {_NOT_ON_DISK}"
                )
            found.append((buffers, plain))
        return found

    def having(self, values: Sequence[Any]) -> State:
        """This snapshot with the :meth:`values` of another one of the same network."""
        found = copy.copy(self)
        found.parameters, found._before, found._contents = Journal(), dict(self._before), []
        for (attributes, tables), (buffers, plain) in zip(self._contents, values, strict=True):
            found._contents.append(({**attributes, **plain}, tables))
            found._before |= {id(tables["_buffers"][name]): t for name, t in buffers.items()}
        return found

    def _told(self, value: Any) -> Tensor:
        # Not the weights in a list, such as that of nn.GRU, which reads them anew from its parameters.
        return digest(pytree.tree_map_only(nn.Parameter, lambda _: None, self._fresh(value, dict(self._before))))

    @contextmanager
    def again(self, slots: Slots, *, once: bool = False, upcast: bool = False) -> Iterator[None]:
        """Hold copies of the snapshot of a network with these slots in this block; afterwards the modules hold what
        they held before; ``once``: the snapshot was just made, and is not needed afterwards."""
        now = self._contents if once else self._now()
        if self._tensors or self._copies:
            memo: dict[int, Any] = dict(self._before if once else _copies(self._before, upcast))
            fresh = []
            for (attributes, tables), deep in zip(self._contents, self._deep, strict=True):
                buffers = {name: self._fresh(t, memo) for name, t in tables.get("_buffers", {}).items()}
                own = {name: self._fresh(attributes[name], memo) for name in deep}
                fresh.append(({**attributes, **own}, {**tables, "_buffers": buffers}))
            self._put(fresh)
        elif not once:
            self._put(self._contents)
        try:
            if not slots.has_frozen:
                yield
                return
            frozen = self.parameters.slots(slots.parameters)
            copies = [(table, name, stand_in(wide(t.clone()) if upcast else t.clone(), t)) for table, name, t in frozen]
            with journal() as moved, swapped(copies):
                try:
                    yield
                finally:
                    moved.put_back(but={id(t) for _, _, t in copies})  # copies, which a graph may have saved
        finally:
            self._put(now)

    def refuse_other_parts(self, role: str) -> None:
        """Refuse a network that has made or exchanged submodules since, which the snapshot has no copies of."""
        for part, (_, tables) in zip(self._parts, self._contents, strict=True):
            if part._modules != (parts := tables.get("_modules", {})):
                names = [n for n in {**parts, **part._modules} if part._modules.get(n) is not parts.get(n)]
                raise MetaplError(
                    f"the {role} makes its submodule {names[0]} (of {type(part).__name__}) in its forward, which no "
                    "optimizer knows and whose state is not held. Expected the same submodules in every pass: make it "
                    "in __init__, or run the network once before."
                )

    def _now(self) -> Contents:
        held = [part.__dict__ for part in self._parts]
        return [(dict(one), {name: dict(one[name]) for name in _TABLES if one[name]}) for one in held]

    def _put(self, contents: Contents) -> None:
        for part, (attributes, tables) in zip(self._parts, contents, strict=True):
            held = part.__dict__
            held.update(attributes)
            for name in held.keys() - attributes.keys() if len(held) > len(attributes) else ():
                del held[name]
            for name in _TABLES:
                table, values = held[name], tables.get(name, {})
                if not (table or values) or (name == "_modules" and table == values):
                    continue
                if name == "_buffers":
                    part._non_persistent_buffers_set -= table.keys() - values.keys()
                table.clear()
                table.update(values)

    def _keep(self, value: Any) -> None:
        """Copy what can be written to; tensors of a graph, parameters and objects of other kinds stay what they are."""
        if isinstance(value, Tensor):
            if not value.requires_grad and not isinstance(value, nn.Parameter):
                self._tensors.setdefault(id(value), value)
        elif id(value) not in self._copies and (type(value) in _CONTAINERS or _is_tuple(value)):
            if type(value) in _CONTAINERS:
                self._copies[id(value)] = value, copy.copy(value)
            for element in value.values() if isinstance(value, dict) else value:
                if type(element) not in _PLAIN:
                    self._keep(element)

    def _fresh(self, value: Any, memo: dict[int, Any]) -> Any:
        if id(value) in memo:
            return memo[id(value)]
        if id(value) in self._copies:
            before = self._copies[id(value)][1]
            new = memo[id(value)] = copy.copy(before)
            if not isinstance(new, set):
                for key, element in before.items() if isinstance(new, dict) else enumerate(before):
                    if type(element) not in _PLAIN:
                        new[key] = self._fresh(element, memo)
            return new
        if _is_tuple(value):
            elements = [self._fresh(element, memo) for element in value]
            return type(value)(*elements) if hasattr(value, "_fields") else tuple(elements)
        return value


def _copies(tensors: Mapping[int, Tensor], upcast: bool = False) -> dict[int, Tensor]:
    """Copies, by the same keys, which share memory where these do; ``upcast``: in float32 or wider."""
    users = Counter(map(memory_of, tensors.values()))
    shared: dict[Any, Tensor] = {}

    def copied(t: Tensor) -> Tensor:
        memory = memory_of(t)
        if memory is None or users[memory] == 1:
            return wide(t.clone()) if upcast else t.clone()
        if (memory, t.dtype) not in shared:
            whole = t.new_empty(0).set_(t.untyped_storage()).clone()
            shared[memory, t.dtype] = wide(whole) if upcast else whole
        like = shared[memory, t.dtype]
        return like.new_empty(0).set_(like.untyped_storage(), t.storage_offset(), t.shape, t.stride())

    return {key: copied(t.detach()) for key, t in tensors.items()}


def _is_tuple(value: Any) -> bool:
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields"))


# Held while a step runs: replays set PyTorch's default generators and global switches, so other threads wait.
step_lock = RLock()


@contextmanager
def step_guard(
    *networks: nn.Module | Slots,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    moves: bool = True,
    explain: Callable[[BaseException], None] | None = None,
) -> Iterator[checks.Fault]:
    """Run a step in this block; if it fails, restore buffers, gradients and generators.

    The gradients of the parameters of an ``optimizer`` are cleared before and after. Without ``moves``, state is
    restored in any case, and the host waits for what is to be checked. ``explain`` raises a better error than the one
    that it is given, if it knows one. Yields the fault of the step's report.
    """
    checks.no_inference_mode()
    fault, parameters = checks.Fault(), Journal()
    slots = [network if isinstance(network, Slots) else Slots(network) for network in networks]
    noted: Any = journal(parameters) if any(one.has_frozen for one in slots) else nullcontext()
    with step_lock, torch.enable_grad(), noted:
        saved = [State(one.parts) for one in slots]
        for one, state in zip(slots, saved, strict=True):
            one.state = state
        random, drawn = RandomState.now(device), None if generator is None else generator.get_state()
        # Parametrized weights are computed anew: those of ``parametrize.cached()`` are of other weights.
        enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
        filled = [p for group in ([] if optimizer is None else optimizer.param_groups) for p in group["params"]]
        grads = [p.grad for p in filled]
        deferred = checks.deferred.set(fault) if moves else None
        failed = True
        try:
            for p in filled:
                p.grad = None
            yield fault
            failed, grads = False, [None] * len(filled)
        except BaseException as error:
            for one in slots:
                if one.weights is not None:
                    one.weights.check(error)
            if explain is not None:
                explain(error)
            raise
        finally:
            for p, grad in zip(filled, grads, strict=True):
                p.grad = grad
            for one in slots:
                one.state = None
            if deferred is not None:
                checks.deferred.reset(deferred)
            parametrize._cache_enabled, parametrize._cache = enabled, {}
            torch.clear_autocast_cache()  # it may hold casts of weights from before the step
            if failed or not moves:
                parameters.put_back()
                for state in saved:
                    state.restore()
            if failed:
                random.restore()
            if failed and generator is not None and drawn is not None:
                generator.set_state(drawn)


def explain_types(
    labeled: Any, unlabeled: Sequence[Any], networks: Mapping[str, nn.Module | None], error: BaseException
) -> None:
    """Turn a step's error about inputs of another type than the weights of the ``networks``, by role, or in one
    argument for several, into one that names batch and network."""
    cause = error.__cause__ if isinstance(error, MetaplError) else error
    outer, inner = (f"{called(name)} " for name in ("labeled", "unlabeled"))
    batches = [(outer, inputs_of(labeled)), *((inner, inputs_of(batch)) for batch in unlabeled)]
    if cause is not error:
        # Of a feedback pass: the student's own pass has taken the unlabeled batch, and inputs like it.
        taken = [checks.types(inputs) for _, inputs in batches[1:]]
        batches = [] if checks.types(batches[0][1]) in taken else batches[:1]
    if isinstance(cause, RuntimeError if cause is not error else checks.WRONG_INPUTS):
        checks.explain(cause, networks, batches, widths=cause is error)
