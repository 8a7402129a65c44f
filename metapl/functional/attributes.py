"""What a function reads besides its arguments, of objects and variables: its graph keeps it."""

from __future__ import annotations

import argparse
import dis
import sys
import types
from array import array
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from functools import cached_property, partial
from itertools import chain
from operator import is_
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from metapl.execution.state import hooks_of
from metapl.functional.comparison import is_unchanged

# Whose entries are read.
COLLECTIONS = (list, tuple, deque, set, frozenset, bytearray, array)

# The types of attributes and of parts of a batch that are constants of a graph.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

# What outlives a trainer: constants, and what stands in files and in classes.
FOR_ALL = (
    *PLAIN,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    property,
    staticmethod,
    classmethod,
)


class Attributes:
    """What a function reads of objects and of variables, besides its arguments.

    Of objects that these hold, and that are no modules, the attributes count too, to some depth,
    and so do those of their classes, the entries of dicts, lists and other collections, arrays, and
    the variables that methods and functions outside of PyTorch read around them: globals and
    closures. Of modules, what every module has is left out: tables of tensors, parts and hooks, and
    the mode; what a hook reads is not. :func:`modes_of` has these for stacks and recorded
    functions, and ``Slots`` for a trainer's steps.

    Args:
        sources: the objects: networks, losses, a problem.
    """

    def __init__(self, sources: Sequence[Any]) -> None:
        self._sources = sources
        self.read_again()

    def read_again(self) -> None:
        """Look into all objects anew: others may be in their places."""
        self._tables: list[Mapping[Any, Any]] = []
        self._dicts: list[Mapping[Any, Any]] = []
        self._globals: list[tuple[Mapping[Any, Any], Any]] = []
        self._cells: list[types.CellType] = []
        self._collections: list[Collection[Any]] = []
        self._arrays: list[numpy.ndarray[Any, Any]] = []
        self._slots: list[tuple[Any, str]] = []
        self._modules: list[nn.Module] = []
        self._met: set[int] = set()
        self._met_globals: set[tuple[int, str]] = set()
        for source in self._sources:
            self._look_into(source, depth=0)
        self._shape: tuple[Any, ...] | None = None
        self._places: list[tuple[Mapping[Any, Any], Any]] = []

    def values(self) -> list[Any]:
        """Return the values of all attributes and variables, as they are now."""
        # Of dicts the names too: one that takes the place of another may have its value. Those of
        # all attributes would be thousands in each call.
        sizes = chain(map(len, self._tables), map(len, self._collections))
        shape = (*sizes, *chain.from_iterable(self._dicts))
        if shape != self._shape:
            self._shape = shape
            self._places = [
                (table, name)
                for table in self._tables
                for name in table
                if name not in ATTRIBUTES_LEFT_OUT
            ]
            self._places += self._globals
        try:
            values = [table[name] for table, name in self._places]
        except KeyError:
            # As many attributes, of other names; or a variable that was deleted.
            self.read_again()
            return self.values()
        # The same object as long as it is equal.
        values.append(self._shape)
        values += chain.from_iterable(self._collections)
        if self._cells or self._slots or self._arrays:
            values += [cell.cell_contents for cell in self._cells]
            values += [getattr(owner, name, None) for owner, name in self._slots]
            values += [array.tobytes() for array in self._arrays]
        return values

    def modules(self) -> list[nn.Module]:
        """Return the modules among the objects, and those that these hold or read."""
        return self._modules

    def difference_from(self, values: list[Any]) -> str:
        """Return which value is another one than among these, in words."""
        names = [name for _, name in self._places]
        for name, one, two in zip(names, values, self.values(), strict=False):
            if constants_of([one]) != constants_of([two]):
                return f"{name} was {one!r:.40} and is {two!r:.40}"
        return "an attribute or a variable that it reads has changed"

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put back what passes in this block leave in attributes, collections and buffers.

        Where a function is recorded, they leave tensors without values. And a function that was
        refused has changed nothing.
        """
        tables = [table for table in self._tables if isinstance(table, dict)]
        tables_before = [dict(table) for table in tables]
        growing: list[Any] = [c for c in self._collections if isinstance(c, list | deque | set)]
        growing_before = [[*entries] for entries in growing]
        in_tables = [t for part in self._modules for t in part._buffers.values()]
        # Those of a bare copy have no values.
        buffers = [t for t in in_tables if t is not None and not t.is_meta]
        buffers_before = [t.clone() for t in buffers]
        try:
            yield
        finally:
            for entries, entries_before in zip(growing, growing_before, strict=True):
                is_as_before = len(entries) == len(entries_before)
                if not is_as_before or not all(map(is_, entries, entries_before)):
                    entries.clear()
                    add = entries.update if isinstance(entries, set) else entries.extend
                    add(entries_before)
            for t, values in zip(buffers, buffers_before, strict=True):
                if not is_unchanged(t, values):
                    t.copy_(values)
            for table, before in zip(tables, tables_before, strict=True):
                if len(table) != len(before) or not all(map(is_, table.values(), before.values())):
                    table.clear()
                    table.update(before)

    def _look_into(self, value: Any, *, depth: int) -> None:
        if id(value) in self._met or isinstance(value, PLAIN):
            return
        if isinstance(value, type):
            self._look_at_class(value, value, depth=depth)
            return
        self._met.add(id(value))
        if isinstance(value, nn.Module):
            for part in value.modules():
                if part is value or id(part) not in self._met:
                    self._met.add(id(part))
                    self._modules.append(part)
                    self._look_at_class(type(part), part, depth=depth)
                    self._look_through(vars(part), depth=depth)
                    for table in hooks_of(part):
                        for hook in table.values():
                            self._look_into(hook, depth=depth + 1)
        elif isinstance(value, partial):
            self._look_into((value.func, value.args, value.keywords), depth=depth)
        elif isinstance(value, torch.optim.Optimizer):
            self._look_into((value.param_groups, value.defaults), depth=depth)
        elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            self._slots.append((value, "_last_lr"))
            self._look_into((getattr(value, "_last_lr", None), value.optimizer), depth=depth)
        elif isinstance(value, types.MethodType):
            self._look_into(value.__self__, depth=depth)
            self._look_into(value.__func__, depth=depth)
        elif isinstance(value, types.FunctionType):
            self._look_into(getattr(value, "__wrapped__", None), depth=depth)
            self._look_around(value, depth=depth)
        elif isinstance(value, numpy.ndarray):
            self._arrays += [value] if value.size <= MOST_ENTRIES else []
        elif isinstance(value, Mapping):
            if len(value) <= MOST_ENTRIES:
                self._dicts.append(value)
                self._look_through(value, depth=depth)
        elif isinstance(value, COLLECTIONS):
            if len(value) <= MOST_ENTRIES:
                self._collections.append(value)
                for entry in value:
                    self._look_into(entry, depth=depth + 1)
        elif depth == 0 or (depth <= DEPTH and is_read_deeper(value)):
            self._look_at_class(type(value), value, depth=depth)
            if hasattr(value, "__dict__"):
                self._look_through(vars(value), depth=depth)

    def _look_at_class(self, kind: type, value: Any, *, depth: int) -> None:
        """Note what an object has of its classes, but for those of PyTorch and metapl."""
        for base in kind.__mro__:
            if not is_of_user(base):
                continue
            if id(base) not in self._met:
                self._met.add(id(base))
                self._tables.append(vars(base))
                for name, part in vars(base).items():
                    for function in functions_of(part) or [part]:
                        if not name.startswith("__") or isinstance(function, types.FunctionType):
                            self._look_into(function, depth=depth + 1)
            slots = vars(base).get("__slots__", ())
            for name in [slots] if isinstance(slots, str) else slots:
                if name.startswith("__") and not name.endswith("__"):
                    name = f"_{base.__name__.lstrip('_')}{name}"
                self._slots.append((value, name))
                self._look_into(getattr(value, name, None), depth=depth + 1)

    def _look_through(self, table: Mapping[Any, Any], *, depth: int) -> None:
        """Note the entries of a table, and look into them."""
        self._tables.append(table)
        if depth < DEPTH:
            for name, part in table.items():
                if name not in ATTRIBUTES_LEFT_OUT:
                    self._look_into(part, depth=depth + 1)

    def _look_around(self, function: types.FunctionType, *, depth: int) -> None:
        """Note the variables that a function reads of its file and of functions around it."""
        if not is_of_user(function):
            return
        # What it says after a dot, or in brackets: parts of variables by their names.
        names: list[str] = []
        codes = [function.__code__]
        for code in codes:
            names += [*code.co_names, *(part for part in code.co_consts if isinstance(part, str))]
            codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        names = [*dict.fromkeys(names)]
        for cell in function.__closure__ or ():
            # A cell is empty until its name is bound.
            with suppress(ValueError):
                self._look_into(cell.cell_contents, depth=1)
                self._look_at_parts(cell.cell_contents, names, met=set())
                self._cells.append(cell)
        defaults = (function.__defaults__, function.__kwdefaults__)
        # Notebooks put the code of an edited file into the function that there is.
        self._slots += [(function, "__defaults__"), (function, "__code__")]
        self._look_into(defaults, depth=0)
        self._look_at_parts(function, names, met=set())
        package = function.__globals__.get("__package__") or ""
        read = frozenset().union(*map(globals_read_by, codes))
        for name in names:
            if name in read and name in function.__globals__:
                self._look_at_variable(function.__globals__, name, names, met=set())
                continue
            # It is imported inside of the function.
            for file in {name, f"{package}.{name}"} & sys.modules.keys():
                if is_of_user(sys.modules[file]):
                    self._look_at_parts(sys.modules[file], names, met=set())

    def _look_at_variable(
        self, table: Mapping[str, Any], name: str, names: list[str], *, met: set[int]
    ) -> None:
        """Note a variable that a function reads, and what the function may read of it.

        Args:
            table: the variables of a file, or the attributes of an object or a class.
            names: those of parts that the function reads of its variables.
            met: the objects whose parts were looked at for this function.
        """
        value = table[name]
        if isinstance(value, types.ModuleType):
            if is_of_user(value):
                self._look_at_parts(value, names, met=met)
            return
        if (id(table), name) not in self._met_globals:
            self._met_globals.add((id(table), name))
            self._globals.append((table, name))
        self._look_into(value, depth=1)
        self._look_at_parts(value, names, met=met)

    def _look_at_parts(self, value: Any, names: list[str], *, met: set[int]) -> None:
        """Note what of a file, a class, an object or a dict has one of these names."""
        if isinstance(value, (*PLAIN, Tensor)) or id(value) in met:
            return
        met.add(id(value))
        tables = [value if isinstance(value, Mapping) else getattr(value, "__dict__", {})]
        tables += [vars(base) for base in type(value).__mro__ if is_of_user(base)]
        for name in names:
            for table in tables:
                if name in table and name not in ATTRIBUTES_LEFT_OUT:
                    self._look_at_variable(table, name, names, met=met)


def functions_of(method: Any) -> list[Any]:
    """Return the functions of what a class holds: a method, a property, a static method."""
    if isinstance(method, property):
        return [method.fget] if method.fget else []
    if isinstance(method, staticmethod | classmethod):
        return [method.__func__]
    if isinstance(method, cached_property):
        return [method.func]
    return [method] if isinstance(method, types.FunctionType) else []


def modes_of(module: nn.Module) -> list[Any]:
    """Return what a forward may branch on, of a part of a network: class, mode, hooks, parts.

    They are the objects themselves, so that no other object gets their addresses.
    """
    hooks = [hook for table in hooks_of(module) for hook in table.values()]
    tensors = [
        name
        for table in (module._parameters, module._buffers)
        for name, t in table.items()
        if t is not None
    ]
    return [type(module), module.training, hooks, [*module._modules.values()], tensors]


def globals_read_by(code: types.CodeType) -> frozenset[str]:
    """Return the names of the global variables that a code reads, and not what stands after a dot.

    Those of functions inside of it have a code of their own.
    """
    return frozenset(
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


def cause_in_checkpoints(modules: Iterable[nn.Module]) -> str:
    """Return what may be the cause where a graph comes out otherwise; "" without a checkpoint.

    A checkpoint puts back the state of the generators before it runs again, which is no operation
    of a graph. So what runs again there has other masks of dropout.
    """
    for part in modules:
        names = {
            name
            for base in type(part).__mro__
            for method in vars(base).values()
            for function in functions_of(method)
            if base is not nn.Module
            for name in function.__code__.co_names
        }
        is_checkpoint = getattr(part, "gradient_checkpointing", False)
        if is_checkpoint or names & {"checkpoint", "checkpoint_sequential"}:
            return (
                f" ({type(part).__name__} has a checkpoint: dropout in it draws other masks when "
                "a graph runs it again)"
            )
    return ""


def is_read_deeper(value: Any) -> bool:
    """Return whether the attributes of an object that another one holds are read too."""
    if isinstance(value, Tensor):
        return False
    is_namespace = isinstance(value, types.SimpleNamespace | argparse.Namespace)
    return is_namespace or is_dataclass(value) or is_of_user(type(value))


# How deep attributes of attributes are looked at, and how long dicts and lists of them are.
DEPTH = 3

MOST_ENTRIES = 1_000

# Those of every module, and the weights as a recurrent network holds them a second time.
ATTRIBUTES_LEFT_OUT = frozenset([*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"])

STANDARD_LIBRARY = types.__file__.rpartition("types.py")[0]


def is_of_user(value: Any) -> bool:
    """Return whether a class, function or file was written outside of Python, metapl and packages.

    What an installed package reads of itself is not looked at.
    """
    is_file = isinstance(value, types.ModuleType)
    name = value.__name__ if is_file else getattr(value, "__module__", None) or "builtins"
    module = value if is_file else sys.modules.get(name)
    package = name.split(".")[0]
    file = getattr(module, "__file__", None) or ""
    if package in ("torch", "metapl"):
        return False
    if package in sys.stdlib_module_names and (not file or file.startswith(STANDARD_LIBRARY)):
        return False
    return "site-packages" not in file and "dist-packages" not in file


def constant(value: Any) -> tuple[type, Any]:
    """Return what tells a plain value from others: 2, 2.0 and True are equal, and 0.0 and -0.0."""
    return type(value), repr(value) if isinstance(value, float | complex) else value


def are_for_all(attributes: Sequence[Any]) -> bool:
    """Return whether the values of attributes are such as outlive a trainer.

    A graph that trainers share would keep another object alive, and no other trainer has it.
    """
    for value in attributes:
        if isinstance(value, tuple | list):
            if not are_for_all(value):
                return False
        elif not isinstance(value, FOR_ALL):
            return False
    return True


def constants_of(attributes: Sequence[Any]) -> list[Any]:
    """Return what of the values of attributes is a constant of a graph.

    That is numbers and texts, also in tuples and lists, and which objects the others are.
    """
    constants: list[Any] = []
    for value in attributes:
        if isinstance(value, PLAIN):
            constants.append(constant(value))
        elif isinstance(value, tuple | list) and len(value) <= MOST_ENTRIES:
            constants.append((type(value), constants_of(value)))
        else:
            constants.append(id(value))
    return constants
