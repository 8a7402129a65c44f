"""What a graph is known again by: what was compiled, whoever asks for it.

A network computes a function of its tensors. Which function that is depends on its modules, their
classes and plain attributes, and on which places hold the same tensor: its *description*. Networks
of equal descriptions compute the same function, so the graph of one serves the others. It is
compiled of a *bare copy*, which nobody else can change, and which holds no memory: its tensors are
on the device ``meta``.

What cannot be described, such as a hook, a closure, a tensor in an attribute or a method that reads
a module by its name, raises :class:`Undescribed`; its graph is known by identity.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

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
# Hooks on all modules of the process.
EVERYWHERE = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)
BUFFER_MARKS = {"persistent", "_is_buffer"}  # the attributes of an nn.Buffer
NUMBERS = (type(None), bool, int, float, complex, str, bytes)
OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class Undescribed(Exception):
    """What a value computes cannot be told from its description."""


def description_of(value: Any) -> Hashable:
    """Return what tells a plain value from all others; equal for values that are equal and of the same types.

    Raises: :class:`Undescribed`.
    """
    kind = type(value)
    if kind in NUMBERS:
        return kind, repr(value)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0
    if kind in OF_TORCH or isinstance(value, Enum):
        return kind, value
    if kind in (tuple, list, torch.Size):
        return kind, tuple(description_of(each) for each in value)
    if kind in (set, frozenset):
        return kind, frozenset(description_of(each) for each in value)
    if kind in (dict, OrderedDict):
        return kind, tuple(
            (description_of(key), description_of(each)) for key, each in value.items()
        )
    if isinstance(value, type):
        return kind, value
    if kind is FunctionType and value.__closure__ is None and not reads_a_module(value):
        defaults = description_of((value.__defaults__, value.__kwdefaults__))
        return kind, value.__code__, id(value.__globals__), defaults
    if kind is BuiltinFunctionType and isinstance(value.__self__, ModuleType | None):
        return kind, value
    if kind is partial:
        return kind, description_of((value.func, value.args, value.keywords))
    if dataclasses.is_dataclass(value):
        return description_of_object(value)
    raise Undescribed


def description_of_object(value: Any) -> Hashable:
    """Return the description of an object by its class and its attributes."""
    return *description_of_class(type(value)), description_of(object.__getstate__(value))


def description_of_class(kind: type) -> tuple[Hashable, ...]:
    """Return a class, and what it and its bases outside of torch hold now.

    Methods and values may be replaced.
    """
    found: list[Hashable] = [kind]
    for base in kind.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins", "abc"):
            continue
        for name, value in vars(base).items():
            # What a property or a static method calls.
            method = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(method, FunctionType) and reads_a_module(method):
                raise Undescribed
            if isinstance(value, NUMBERS) and not name.startswith("__"):
                found.append((name, description_of(value)))
            # Python writes notes such as __slotnames__ into a class when an instance is copied.
            elif isinstance(value, FunctionType) or not name.startswith("__"):
                found.append((name, id(value)))
    return tuple(found)


def reads_a_module(function: FunctionType) -> bool:
    """Whether a function reads a module by a closure or a global, itself or in functions that it calls by such names.

    A loss with a penalty on the weights of a student reads the student that it names, and not a
    bare copy.
    """
    waiting, known = [function], {function}
    while waiting:
        reader = waiting.pop()
        for value in read_by(reader):
            if isinstance(value, nn.Module):
                return True
            is_new = isinstance(value, FunctionType) and value not in known
            if is_new and not is_of_libraries(value.__module__):
                known.add(value)
                waiting.append(value)
    return False


def is_of_libraries(module: str | None) -> bool:
    """Whether a module, by its name, was written before any network of the user's."""
    return module is not None and module.split(".")[0] in ("torch", "metapl", "builtins", "abc")


def read_by(function: FunctionType) -> list[Any]:
    """Return what a function, and the code inside of it, reads from its closure and from globals."""
    values: list[Any] = []
    for cell in function.__closure__ or ():
        # A cell is empty until the name that it is of is bound.
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    codes = [function.__code__]
    for code in codes:
        values += [
            function.__globals__[name] for name in code.co_names if name in function.__globals__
        ]
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for value in [*values]:
        if isinstance(value, list | tuple | dict):
            values += value.values() if isinstance(value, dict) else value
    return values


def description_of_networks(networks: Sequence[nn.Module | None]) -> Hashable:
    """Return the description of networks, which may share parts, tensors or nothing.

    Raises: :class:`Undescribed`.
    """
    if any(EVERYWHERE):
        raise Undescribed
    numbers: dict[
        int, int
    ] = {}  # of modules and tensors, by identity, in the order in which they are met

    def number_of(part: Any) -> tuple[int, bool]:
        is_new = id(part) not in numbers
        return numbers.setdefault(id(part), len(numbers)), is_new

    def description_of_tensor(t: Tensor | None) -> Hashable:
        if t is None:
            return None
        if (
            type(t) not in (Tensor, nn.Parameter)
            or t.layout != torch.strided
            or not vars(t).keys() <= BUFFER_MARKS
        ):
            raise Undescribed
        return number_of(t)[0], type(t), tuple(t.shape), t.dtype, t.device, t.requires_grad

    def description_of_module(part: nn.Module | None) -> Hashable:
        if part is None:
            return None
        number, is_new = number_of(part)
        if not is_new:
            return number
        attributes = object.__getstate__(part)
        if not isinstance(attributes, dict) or any(attributes.get(name) for name in PASS_HOOKS):
            raise Undescribed
        tensors = [
            (name, description_of_tensor(t))
            for name, t in (*part._parameters.items(), *part._buffers.items())
        ]
        parts = [(name, description_of_module(inner)) for name, inner in part._modules.items()]
        others = {
            name: t
            for name, t in attributes.items()
            if name not in (*TABLES, *PASS_HOOKS, *STATE_HOOKS)
        }
        # Attributes may have been set in any order.
        plain = frozenset((name, description_of(value)) for name, value in others.items())
        return number, description_of_class(type(part)), tuple(tensors), tuple(parts), plain

    return tuple(description_of_module(network) for network in networks)


def bare_copies(networks: Sequence[nn.Module | None]) -> list[Any]:
    """Return copies of networks that have a description, with tensors that hold no memory."""
    made: dict[
        int, Any
    ] = {}  # the copies of modules and tensors, by the identity of what was copied

    def copy_of_tensor(t: Tensor | None) -> Any:
        if t is None:
            return None
        if id(t) not in made:
            bare: Tensor = torch.empty_like(t.detach(), device="meta")
            made[id(t)] = (
                nn.Parameter(bare, t.requires_grad) if isinstance(t, nn.Parameter) else bare
            )
        return made[id(t)]

    def copy_of_module(part: nn.Module | None) -> Any:
        if part is None:
            return None
        if id(part) in made:
            return made[id(part)]
        bare = made[id(part)] = object.__new__(type(part))
        for name, value in vars(part).items():
            if name in (*PASS_HOOKS, *STATE_HOOKS):
                vars(bare)[name] = OrderedDict()
            elif name not in TABLES:
                vars(bare)[name] = copy.deepcopy(value)
        vars(bare)["_parameters"] = {
            name: copy_of_tensor(t) for name, t in part._parameters.items()
        }
        vars(bare)["_buffers"] = {name: copy_of_tensor(t) for name, t in part._buffers.items()}
        vars(bare)["_modules"] = {
            name: copy_of_module(inner) for name, inner in part._modules.items()
        }
        return bare

    return [copy_of_module(network) for network in networks]
