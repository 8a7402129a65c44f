"""The values that a network or a problem holds in attributes, and that a checkpoint holds too.

These are numbers, texts, tensors, arrays and generators, also in dicts, lists, tuples, deques and
sets: a running mean, a queue of features, a counter. A value that is anything else, or that has
anything else in it, is left to the program that resumes, and :func:`unsaved` names those in which a
run may have left something. So are objects in attributes, classes and closures: their numbers are
saved to be compared, and named where a resumed program has others.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Container, Mapping
from enum import Enum
from types import FunctionType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.data.feed import read_state, write_state
from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.execution.shards import is_sharded
from metapl.runs.checkpoint import plain_states

Values = Mapping[str, Any]

GENERATORS = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)

# The types of arrays that a file of tensors has too.
ARRAY_TYPES = frozenset(
    numpy.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64"),
    )
)

# The key of a dict that stands for a value that the file's format does not have.
KIND = "kind of value"

# The key of what :func:`numbers_beyond` returns, among the attributes that a checkpoint holds.
BEYOND = "beyond the attributes"

# The longest text of a container that is compared.
LONGEST = 200

# PyTorch's own attributes of a module: its tables and hooks, which state_dict() and the program
# that builds it have. Which modules are in training is saved.
OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


class NotPlain(MetaplError):
    """A value that a checkpoint does not hold."""


def held_values(owner: object, registered: Container[int]) -> dict[str, Any]:
    """Return the attributes of a module or a problem that a checkpoint holds.

    Args:
        owner: the module or the problem.
        registered: the ids of tensors that the checkpoint holds elsewhere, as weights and buffers.
    """
    values: dict[str, Any] = {}
    for attribute, value in attributes_of(owner).items():
        try:
            values[attribute] = plain(value, registered)
        except (NotPlain, RecursionError):
            # A container that holds itself has no end.
            continue
    values[BEYOND] = numbers_beyond(owner)
    return values


def numbers_beyond(owner: object) -> dict[str, Any]:
    """Return the numbers, texts and containers that an owner reads and that are not its attributes.

    They are those of objects in attributes, of its classes, and in the closures of its functions,
    by their places. Containers are in words. No checkpoint puts them back.
    """
    values: dict[str, Any] = {}
    functions: dict[str, FunctionType] = {}
    for attribute, value in attributes_of(owner).items():
        if isinstance(value, FunctionType):
            functions[attribute] = value
        else:
            values.update(entries_of(attribute, value))
    for cls in type(owner).__mro__:
        if cls.__module__.partition(".")[0] in ("builtins", "metapl", "torch"):
            continue
        for name, value in vars(cls).items():
            if isinstance(value, FunctionType):
                functions.setdefault(name, value)
            elif not name.startswith("__"):
                place = f"{cls.__name__}.{name}"
                values.update({place: value, **entries_of(place, value)})
    for name, function in functions.items():
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            try:
                value = cell.cell_contents
            except ValueError:
                # The variable is not set yet.
                continue
            place = f"{variable} in {name}"
            values.update({place: value, **entries_of(place, value)})
    numbers: dict[str, Any] = {}
    for place, value in values.items():
        if isinstance(value, bool | int | float | str) and not isinstance(value, Enum):
            numbers[place] = value
        elif type(value) in (dict, list, tuple, deque, set):
            leaves = pytree.tree_leaves(list(value) if isinstance(value, set) else value)
            if all(isinstance(leaf, bool | int | float | str) for leaf in leaves):
                numbers[place] = repr(value)[:LONGEST]
            else:
                numbers[place] = f"{len(value)} entries"
    return numbers


def entries_of(place: str, value: object) -> dict[str, Any]:
    """Return the attributes of an object of a class of one's own, by their places."""
    if isinstance(value, Tensor | nn.Module | type | ModuleType | FunctionType | Enum):
        return {}
    return {f"{place}.{name}": entry for name, entry in getattr(value, "__dict__", {}).items()}


def unsaved(owner: object, registered: Container[int], saved: Values) -> dict[str, str]:
    """Return what a checkpoint does not hold and may decide how a run goes on, in words.

    They are tensors with a graph, containers of these, of modules or of other objects, objects that
    have tensors in their attributes, containers that hold themselves, and those of
    :func:`numbers_beyond` that are others than when the checkpoint was written.

    Args:
        saved: the values of the owner in the checkpoint.
    """
    names: dict[str, str] = {}
    saved_numbers = saved.get(BEYOND, {})
    for place, number in numbers_beyond(owner).items():
        if place in saved_numbers and not same(saved_numbers[place], number):
            names[place] = (
                f"{saved_numbers[place]!r} when it was saved, now {number!r}; numbers in its own "
                "attributes are saved"
            )
    for attribute, value in attributes_of(owner).items():
        is_torch_class = type(owner).__module__.startswith("torch.")
        if is_torch_class or isinstance(value, nn.Module):
            continue
        try:
            leaves = [*pytree.tree_leaves(value), *getattr(value, "__dict__", {}).values()]
            if all(id(leaf) in registered for leaf in leaves):
                continue
            plain(value, registered)
        except NotPlain as error:
            if any(isinstance(leaf, Tensor | numpy.ndarray | nn.Module) for leaf in leaves):
                names[attribute] = str(error)
        except RecursionError:
            names[attribute] = "it holds itself"
    return names


def attributes_of(owner: object) -> dict[str, Any]:
    """Return the attributes of an object without those that are PyTorch's own."""
    is_torch_class = type(owner).__module__.startswith("torch.")
    attributes: dict[str, Any] = {}
    for attribute, value in getattr(owner, "__dict__", {}).items():
        is_private = attribute.startswith("_")
        if attribute not in OF_TORCH and not (is_private and is_torch_class):
            attributes[attribute] = value
    return attributes


def plain(value: Any, registered: Container[int]) -> Any:
    """Return a value as a checkpoint holds it; its tensors share their memory with it.

    Raises: :class:`NotPlain`.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        is_own = id(value) not in registered and not isinstance(value, nn.Parameter)
        is_whole = value.layout == torch.strided and not is_sharded(value)
        has_values = value.dtype != torch.complex128 and not (value.is_quantized or value.is_meta)
        if is_own and is_whole and has_values and not value.requires_grad:
            return value.detach()
    elif isinstance(value, numpy.ndarray | numpy.generic) and native(value) in ARRAY_TYPES:
        kind = "array" if isinstance(value, numpy.ndarray) else "number"
        # In the machine's order of bytes, and in memory that no view of it turns around.
        in_order = numpy.array(value, dtype=native(value), order="C")
        return {KIND: kind, "value": torch.from_numpy(in_order.reshape(value.shape))}
    elif isinstance(value, GENERATORS):
        return {KIND: "generator", "value": plain_states(read_state(value))}
    elif isinstance(value, dict):
        if all(type(key) in (bool, int, float, str) for key in value):
            return {key: plain(entry, registered) for key, entry in value.items()}
        pairs = []
        for key, entry in value.items():
            if isinstance(key, Tensor):
                raise NotPlain(f"a key in it is {described(key)}")
            pairs.append((plain(key, registered), plain(entry, registered)))
        return {KIND: "dict", "value": pairs}
    elif isinstance(value, deque):
        plain_entries = [plain(entry, registered) for entry in value]
        return {KIND: "deque", "value": plain_entries, "length": value.maxlen}
    elif type(value) is set:
        return {KIND: "set", "value": [plain(entry, ()) for entry in sorted(value, key=repr)]}
    elif type(value) in (list, tuple):
        plain_entries = [plain(entry, registered) for entry in value]
        return plain_entries if isinstance(value, list) else tuple(plain_entries)
    raise NotPlain(f"a value in it is {described(value)}")


def native(array: Any) -> numpy.dtype[Any]:
    """Return the type of an array in the machine's order of bytes."""
    dtype: numpy.dtype[Any] = array.dtype.newbyteorder("=")
    return dtype


def put_values(owner: object, values: Values, *, device: torch.device) -> None:
    """Give a module or a problem the attributes that :func:`held_values` has returned.

    Containers and generators stay the same objects, which others may hold too.

    Args:
        device: of the networks, for tensors that are held where there is none now.
    """
    current_values = held_values(owner, registered=())
    attributes = vars(owner)
    for attribute, value in values.items():
        if attribute == BEYOND:
            continue
        if attribute not in current_values or not same(current_values[attribute], value):
            try:
                new_value = put_value(attributes.get(attribute), value, device)
            except MetaplError as error:
                raise MetaplError(f"its {attribute}: {error}") from error
            # Frozen dataclasses have a __setattr__ of their own.
            object.__setattr__(owner, attribute, new_value)


def put_value(current: Any, saved: Any, device: torch.device) -> Any:
    """Return a saved value, in the container that is held now where that is of the same kind."""
    if isinstance(saved, dict) and KIND in saved:
        return put_kind(current, saved, device)
    if isinstance(saved, dict):
        table: dict[Any, Any] = current if isinstance(current, dict) else {}
        entries = {key: put_value(table.get(key), t, device) for key, t in saved.items()}
        table.clear()
        table.update(entries)
        return table
    if isinstance(saved, list | tuple):
        entries_now = [*current] if isinstance(current, list | tuple | deque) else []
        entries_now += [None] * len(saved)
        new = [put_value(t, entry, device) for t, entry in zip(entries_now, saved, strict=False)]
        if isinstance(saved, tuple):
            return tuple(new)
        if isinstance(current, list):
            current[:] = new
            return current
        return new
    if isinstance(saved, Tensor):
        if not isinstance(current, Tensor):
            return saved.detach().to(device, copy=True)
        if not is_alike(current, saved):
            return saved.detach().to(current.device, copy=True)
        # In place: a view of it, or another attribute, may be the same memory.
        with torch.no_grad():
            current.copy_(saved)
        return current
    return saved


def is_alike(current: Tensor, saved: Tensor) -> bool:
    """Return whether saved values fit into the memory of a tensor that is held now."""
    is_plain = not (current.requires_grad or current.is_inference() or current.is_meta)
    has_own_entries = 0 not in current.stride() or current.numel() < 2
    is_same_kind = current.dtype == saved.dtype and current.shape == saved.shape
    return is_plain and has_own_entries and is_same_kind


def put_kind(current: Any, saved: Mapping[str, Any], device: torch.device) -> Any:
    """Return a value for which a dict stands; see :func:`put_value`."""
    kind = saved[KIND]
    value = saved["value"]
    if kind == "generator":
        if not isinstance(current, GENERATORS):
            raise MetaplError(
                f"a generator was saved, and the trainer has {described(current)}; expected one "
                "that is made with the object"
            )
        write_state(current, value)
        return current
    if kind == "set":
        return set(value)
    if kind == "deque":
        entries = put_value([*current] if isinstance(current, deque) else None, value, device)
        if not isinstance(current, deque):
            return deque(entries, saved["length"])
        current.clear()
        current.extend(entries)
        return current
    if kind == "dict":
        table = current if isinstance(current, dict) else {}
        entries = {key: put_value(table.get(key), entry, device) for key, entry in value}
        table.clear()
        table.update(entries)
        return table
    array = value.cpu().numpy().copy()
    if kind == "number":
        return array[()]
    is_array = isinstance(current, numpy.ndarray) and current.flags.writeable
    if is_array and current.shape == array.shape and current.dtype == array.dtype:
        # In place: another attribute may be the same memory.
        current[...] = array
        return current
    return array


def same(a: Any, b: Any) -> bool:
    """Return whether two values of :func:`plain` are equal, of one kind, with all in them."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(entry, b[key]) for key, entry in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)
