"""What a graph is found again by: what was compiled, whoever asks for it.

A network computes a function of its tensors. Which function that is depends on its modules, their
classes and plain attributes, and on which places hold the same tensor: its *description*. Networks
of equal descriptions compute the same function, so the graph of one serves the others. It is
compiled of a *bare copy*, which nobody else can change, and which holds no memory: its tensors are
on the device ``meta``.

A problem may hold modules of its own, as a template for ``functional_call`` or a frozen network,
and so may the closures of networks and problems. These are described as networks are, and their
copies are whole: their tensors, which lie *outside* of the networks, are given the values of the
present ones in each call.

What cannot be described, such as a hook, a tensor in an attribute or a method that reads a module
by its name, raises :class:`Undescribed`; its graph is found by identity.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution.state import HOOKS_EVERYWHERE
from metapl.functional.attributes import globals_read_by

# Tables of hooks that run in a forward or a backward pass, and of those that run where a state is
# saved or loaded.
PASS_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
TABLES = ("_parameters", "_buffers", "_modules")
OF_ALL_MODULES = frozenset((*TABLES, *PASS_HOOKS, *STATE_HOOKS))
# The attributes of an nn.Buffer.
BUFFER_MARKS = {"persistent", "_is_buffer"}
# What torch.compile writes on the tensors and the modules that it meets, and no pass reads.
MARKS_OF_DYNAMO = ("_dynamo_", "_is_torch_compile")
NUMBERS = (type(None), bool, int, float, complex, str, bytes)
OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
# What may be a module, or lead to one.
READABLE = (nn.Module, FunctionType, list, tuple, dict)


class Undescribed(Exception):
    """What a value computes cannot be told from its description.

    Args:
        what: the value, in words.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def description_of(value: Any, describer: Describer | None = None) -> Hashable:
    """Return what tells a plain value from all others.

    Descriptions are equal for values that are equal and of the same types.

    Args:
        describer: of modules and closures; None: they have no description.

    Raises: :class:`Undescribed`.
    """
    kind = type(value)
    if kind in NUMBERS:
        # 1, 1.0 and True are equal, and so are 0.0 and -0.0; their words are not.
        return kind, repr(value)
    of_part = partial(description_of, describer=describer)
    if kind in OF_TORCH or isinstance(value, Enum):
        return kind, value
    if kind in (tuple, list, torch.Size):
        return kind, tuple(map(of_part, value))
    if kind in (set, frozenset):
        return kind, frozenset(map(description_of, value))
    if kind in (dict, OrderedDict):
        return kind, tuple([(of_part(key), of_part(entry)) for key, entry in value.items()])
    if isinstance(value, type):
        return kind, value
    if describer is not None and isinstance(value, nn.Module):
        return describer.module(value)
    if describer is not None and describer.holds(value):
        return describer.tensor(value)
    if kind is weakref.ref:
        return kind, of_part(value())
    if kind is FunctionType and not reads_a_module(value, by_closure=False):
        cells: Hashable = None
        if value.__closure__ is not None:
            if describer is None:
                raise Undescribed("a closure")
            cells = describer.cells(value)
        defaults = of_part((value.__defaults__, value.__kwdefaults__))
        return kind, value.__code__, id(value.__globals__), defaults, cells
    if kind is BuiltinFunctionType and isinstance(value.__self__, ModuleType | None):
        return kind, value
    if kind is partial:
        return kind, of_part((value.func, value.args, value.keywords))
    if dataclasses.is_dataclass(value):
        return description_of_object(value, describer)
    if kind is FunctionType:
        raise Undescribed("a function that reads a network by its name")
    raise Undescribed(f"a value of type {kind.__name__}")


def description_of_object(value: Any, describer: Describer | None = None) -> Hashable:
    """Return the description of an object by its class and its attributes."""
    attributes = description_of(object.__getstate__(value), describer)
    return *description_of_class(type(value)), attributes


def description_of_class(kind: type) -> tuple[Hashable, ...]:
    """Return a class, and what it and its bases hold now.

    Methods and values may have been replaced. A base in torch counts by its forward alone.
    Functions are held, so that no later one has the address of one that was replaced.

    Raises: :class:`Undescribed`.
    """
    contents: list[Hashable] = [kind]
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base.__module__ in ("builtins", "abc"):
            contents.append(vars(base).get("forward"))
            continue
        for name, value in vars(base).items():
            # What a property or a static method calls.
            method = getattr(value, "fget", None) or getattr(value, "__func__", value)
            is_of_user = isinstance(method, FunctionType) and not is_of_libraries(method.__module__)
            if is_of_user and reads_a_module(method):
                raise Undescribed(f"the method {name}, which reads a network by its name,")
            if isinstance(value, NUMBERS) and not name.startswith("__"):
                contents.append((name, description_of(value)))
            # Python writes notes such as __slotnames__ into a class when an instance is copied.
            elif isinstance(value, FunctionType):
                contents.append((name, value))
            elif not name.startswith("__"):
                contents.append((name, id(value)))
    return tuple(contents)


def reads_a_module(function: FunctionType, *, by_closure: bool = True) -> bool:
    """Return whether a function reads a module by a closure or a global.

    Functions that it calls by such names count too. A loss with a penalty on the weights of a
    student reads the student that it names, and not a bare copy.

    Args:
        by_closure: whether its own closure counts.
    """
    to_visit = [function]
    met = {function}
    while to_visit:
        reader = to_visit.pop()
        for value in read_by(reader, by_closure=by_closure or reader is not function):
            if isinstance(value, nn.Module):
                return True
            is_new = isinstance(value, FunctionType) and value not in met
            if is_new and not is_of_libraries(value.__module__):
                met.add(value)
                to_visit.append(value)
    return False


def is_of_libraries(module: str | None) -> bool:
    """Return whether a module of Python was written before any network of the user's."""
    return module is not None and module.split(".")[0] in ("torch", "metapl", "builtins", "abc")


def read_by(function: FunctionType, *, by_closure: bool) -> list[Any]:
    """Return what a function, and code inside of it, reads from its closure and from globals.

    Of globals what may be a module, or lead to one (``READABLE``).
    """
    values: list[Any] = []
    for cell in (by_closure and function.__closure__) or ():
        # A cell is empty until its name is bound.
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    variables = function.__globals__
    codes = [function.__code__]
    for code in codes:
        named = [name for name in code.co_names if isinstance(variables.get(name), READABLE)]
        if named:
            # Some may stand after a dot alone, which takes longer to tell.
            read = globals_read_by(code)
            values += [variables[name] for name in named if name in read]
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for value in [*values]:
        if isinstance(value, list | tuple | dict):
            values += value.values() if isinstance(value, dict) else value
    return values


class Describer:
    """Descriptions in which the same part, or the same tensor, has the same number.

    Args:
        networks: that are trained.

    Attributes:
        networks: their description.
        outside: the tensors of other modules, in the order in which they are met.
    """

    def __init__(self, networks: Sequence[nn.Module | None]) -> None:
        if any(HOOKS_EVERYWHERE):
            raise Undescribed("hooks on all modules")
        # By the addresses of modules, functions and tensors, in the order in which they are met.
        self._numbers: dict[int, int] = {}
        self._inside = tensors_inside(networks)
        self.outside: list[Tensor] = []
        self.networks = tuple(self.module(network) for network in networks)

    def problem(self, problem: Any) -> Hashable:
        """Return the description of a problem, which may hold modules, also of the networks."""
        return description_of_object(problem, self)

    def module(self, part: nn.Module | None) -> Hashable:
        """Return the description of a module; of one that was met before, its number alone."""
        if part is None:
            return None
        is_new = id(part) not in self._numbers
        number = self._number_of(part)
        if not is_new:
            return number
        attributes = object.__getstate__(part)
        if not isinstance(attributes, dict) or any(attributes.get(name) for name in PASS_HOOKS):
            raise Undescribed(f"a {type(part).__name__} with hooks, or a state of its own")
        named_tensors = (*part._parameters.items(), *part._buffers.items())
        tensors = [(name, self.tensor(t)) for name, t in named_tensors]
        modules = [(name, self.module(inner)) for name, inner in part._modules.items()]
        plain = []
        # Attributes may have been set in any order.
        for name, value in sorted(attributes.items()):
            if name not in OF_ALL_MODULES and not name.startswith(MARKS_OF_DYNAMO):
                plain.append((name, description_of(value, self)))
        return (
            number,
            description_of_class(type(part)),
            tuple(tensors),
            tuple(modules),
            tuple(plain),
        )

    def cells(self, function: FunctionType) -> Hashable:
        """Return the description of a closure; of a function that was met before, its number."""
        is_new = id(function) not in self._numbers
        number = self._number_of(function)
        if not is_new:
            return number
        try:
            contents = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:
            raise Undescribed("a closure without a value yet") from None
        return tuple(description_of(value, self) for value in contents)

    def holds(self, value: Any) -> bool:
        """Return whether a value is a tensor of the networks, as in the lists of an nn.GRU."""
        return isinstance(value, Tensor) and id(value) in self._inside

    def tensor(self, t: Tensor | None) -> Hashable:
        """Return the description of a tensor."""
        if t is None:
            return None
        is_plain = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
        marks = {name for name in vars(t) if not name.startswith(MARKS_OF_DYNAMO)}
        if not is_plain or not marks <= BUFFER_MARKS:
            raise Undescribed(f"a tensor of type {type(t).__name__}")
        if id(t) not in self._numbers and id(t) not in self._inside:
            self.outside.append(t)
        return self._number_of(t), type(t), tuple(t.shape), t.dtype, t.device, t.requires_grad

    def _number_of(self, part: nn.Module | FunctionType | Tensor) -> int:
        return self._numbers.setdefault(id(part), len(self._numbers))


def tensors_inside(networks: Sequence[nn.Module | None]) -> set[int]:
    """Return the addresses of the tensors of networks."""
    inside = set[int]()
    for network in networks:
        if network is not None:
            inside |= {id(t) for t in (*network.parameters(), *network.buffers())}
    return inside


class BareCopier:
    """Copies in which what was one part, or one tensor, is one again.

    The tensors of networks are copied without memory, those of other modules as they are.

    Args:
        networks: that are trained.
    """

    def __init__(self, networks: Sequence[nn.Module | None]) -> None:
        # The copies of modules, functions and tensors, by the addresses of the originals.
        self._copies: dict[int, Any] = {}
        self._inside = tensors_inside(networks)

    def module(self, part: nn.Module | None) -> Any:
        """Return a copy of a module; of one that was met before, the same."""
        if part is None:
            return None
        if id(part) in self._copies:
            return self._copies[id(part)]
        bare = object.__new__(type(part))
        self._copies[id(part)] = bare
        attributes = vars(bare)
        for name, value in vars(part).items():
            if name not in OF_ALL_MODULES:
                attributes[name] = self.value(value)
            elif name not in TABLES:
                attributes[name] = OrderedDict()
        attributes["_parameters"] = {n: self.tensor(t) for n, t in part._parameters.items()}
        attributes["_buffers"] = {n: self.tensor(t) for n, t in part._buffers.items()}
        attributes["_modules"] = {n: self.module(inner) for n, inner in part._modules.items()}
        return bare

    def value(self, value: Any) -> Any:
        """Return a copy of a value that has a description."""
        kind = type(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if kind is weakref.ref:
            referent = value()
            return value if referent is None else weakref.ref(self.value(referent))
        if kind in (tuple, list, set, frozenset):
            return kind(map(self.value, value))
        if kind in (dict, OrderedDict):
            return kind([(self.value(key), self.value(entry)) for key, entry in value.items()])
        if kind is partial:
            options = self.value(value.keywords)
            return partial(self.value(value.func), *self.value(value.args), **options)
        if kind is FunctionType and value.__closure__:
            return self._function(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self.object(value)
        return copy.deepcopy(value)

    def object(self, value: Any) -> Any:
        """Return a copy of an object that has a description."""
        copied = object.__new__(type(value))
        state = object.__getstate__(value)
        # Of a class with slots, the attributes, if there are any, and what is in the slots.
        for attributes in state if isinstance(state, tuple) else (state,):
            for name, entry in (attributes or {}).items():
                object.__setattr__(copied, name, self.value(entry))
        return copied

    def tensor(self, t: Tensor | None) -> Any:
        """Return a copy of a tensor; of one that was met before, the same."""
        if t is None:
            return None
        if id(t) not in self._copies:
            copied: Tensor = t.detach().clone()
            if id(t) in self._inside:
                copied = torch.empty_like(t.detach(), device="meta")
            if isinstance(t, nn.Parameter):
                copied = nn.Parameter(copied, t.requires_grad)
            self._copies[id(t)] = copied
        return self._copies[id(t)]

    def _function(self, function: FunctionType) -> FunctionType:
        if id(function) in self._copies:
            met: FunctionType = self._copies[id(function)]
            return met
        cells = [CellType() for _ in function.__closure__ or ()]
        copied = FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        self._copies[id(function)] = copied
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            cell.cell_contents = self.value(original.cell_contents)
        return copied
