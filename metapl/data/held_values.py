"""The values that a network, a problem or a loss holds, and that a checkpoint holds too.

These are numbers, texts, tensors, arrays, generators and members of enumerations, also in dicts,
lists, tuples, deques and sets: a running mean, a queue of features, a counter. So are modules that
are no part of a network, such as a mean teacher, objects that have their state in a
``state_dict()``, and objects of a user's own with nothing but such values in their attributes.
Functions, classes and the like stand in words, which are compared and not put back, as are numbers
of other objects, of classes and in closures: :func:`unsaved` names those that a resumed program has
otherwise.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl.data.feed import read_state, write_state
from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.execution.compare import same_to_rounding
from metapl.execution.shards import is_sharded
from metapl.runs.checkpoint import plain_states

Values = Mapping[str, Any]

GENERATORS = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)

# Values that stand in words: a resumed program makes them again.
CODE = (type, FunctionType, BuiltinFunctionType, MethodType)
CONSTANTS = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.Size,
    slice,
    range,
    Path,
    bytes,
    complex,
)

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

# The keys of what is compared, and of what is lost, among the attributes that a checkpoint holds.
BEYOND = "beyond the attributes"
LOST = "in no checkpoint"

# The longest text of a container that is compared.
LONGEST = 200

# PyTorch's own attributes of a module: its tables and hooks. Which modules are in training is
# saved.
OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
# Not the hooks of state_dict(), which no pass calls: sharding adds its own with the first saving.
HOOKS_OF_PASSES = frozenset(
    name for name in OF_TORCH if "hooks" in name and "state_dict" not in name
)

# Packages whose objects are not looked into, but for two that are made of attributes alone.
FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
NAMESPACES = (SimpleNamespace, argparse.Namespace)


class NotPlain(MetaplError):
    """A value that a checkpoint does not hold."""


class Walk:
    """A walk through what owners hold.

    Args:
        registered: the ids of tensors and modules that the checkpoint holds elsewhere, as those of
            the networks.

    Attributes:
        seen: the objects that the walk has come to, by their ids, the latest last.
    """

    def __init__(self, registered: Container[int] = ()) -> None:
        self.registered = registered
        self.seen: dict[int, object] = {}

    def knows(self, value: object) -> bool:
        """Return whether a value stands elsewhere in the checkpoint."""
        return id(value) in self.registered or id(value) in self.seen

    def forget(self, number: int) -> None:
        """Forget the objects beyond the first ones, which are not held after all."""
        while len(self.seen) > number:
            self.seen.popitem()


def held_values(owner: object, walk: Walk) -> dict[str, Any]:
    """Return the attributes of a module, a problem or a loss that a checkpoint holds.

    What it does not hold is there in words: what is compared where a program resumes, and what is
    lost, which are tensors with a graph, or of kinds that no file has, containers of these, and
    containers that hold themselves.
    """
    walk.seen[id(owner)] = owner
    values: dict[str, Any] = {}
    others: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for attribute, value in attributes_of(owner).items():
        if walk.knows(value):
            continue
        number_seen = len(walk.seen)
        try:
            values[attribute] = plain(value, walk)
        except (NotPlain, RecursionError) as error:
            walk.forget(number_seen)
            if isinstance(error, RecursionError):
                # A container that holds itself has no end.
                lost[attribute] = "it holds itself"
            elif has_arrays(value) and not is_of(owner, "torch"):
                lost[attribute] = str(error)
            else:
                others[attribute] = value
    values[BEYOND] = numbers_beyond(owner, others)
    if lost:
        values[LOST] = lost
    return values


def has_arrays(value: object) -> bool:
    """Return whether a value is a tensor, an array or a module, or has one in it."""
    leaves = [*pytree.tree_leaves(value), *getattr(value, "__dict__", {}).values()]
    return any(isinstance(leaf, Tensor | numpy.ndarray | nn.Module) for leaf in leaves)


def is_of(value: object, *packages: str) -> bool:
    """Return whether the class of an object is from one of some packages."""
    return type(value).__module__.partition(".")[0] in packages


def numbers_beyond(owner: object, others: Mapping[str, object]) -> dict[str, Any]:
    """Return the numbers and texts that an owner reads and that no checkpoint puts back.

    They are those of other objects in its attributes, of its classes, and in the closures of its
    functions, by their places, and the names of hooks on a module. Containers are in words.

    Args:
        owner: the module, the problem or the loss.
        others: its attributes that are not plain.
    """
    values: dict[str, Any] = {}
    functions: dict[str, FunctionType] = {}
    for attribute, value in others.items():
        values.update({attribute: described(value), **entries_of(attribute, value)})
    for attribute, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, FunctionType):
            functions[attribute] = value
        elif isinstance(owner, nn.Module) and attribute in HOOKS_OF_PASSES:
            # One of them says whether hooks are of all gradients, and is no table.
            names = [*map(name_of, value.values())] if isinstance(value, Mapping) else []
            # A network may be sharded when it is saved, and whole in the program that resumes.
            names = [name for name in names if not name.startswith("torch.distributed.")]
            if names:
                values[attribute.lstrip("_")] = ", ".join(names)
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


def name_of(code: Any) -> str:
    """Return the full name of a function or a class."""
    name = getattr(code, "__qualname__", None) or type(code).__qualname__
    return f"{getattr(code, '__module__', None)}.{name}"


def unsaved(saved: Values, current: Values, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield what a checkpoint does not hold and may decide how a run goes on, by places, in words.

    Args:
        saved: the values of an owner in the checkpoint.
        current: those that it has after they were put back.
        place: of the owner.
    """
    lost = current.get(LOST, {})
    for name, reason in lost.items():
        yield f"{place}.{name}".lstrip("."), reason
    for name, saved_value in saved.items():
        if name == LOST or name in lost:
            continue
        inner_place = place if name == BEYOND else f"{place}.{name}".lstrip(".")
        current_value = current.get(name)
        saved_entries = entries_in(saved_value)
        entries = entries_in(current_value)
        if saved_entries is not None and entries is not None:
            yield from unsaved(saved_entries, entries, inner_place)
        elif not same(saved_value, current_value):
            before = in_words(saved_value)
            yield inner_place, f"{before} when it was saved, now {in_words(current_value)}"


def entries_in(value: Any) -> dict[str, Any] | None:
    """Return the entries of a dict, or of an object as :func:`plain` returns it; None: no such."""
    if not isinstance(value, dict):
        return None
    if KIND not in value:
        return value
    return {value["class"]: value["value"]} if "class" in value else None


def in_words(value: Any) -> str:
    """Return a value of :func:`plain` in words."""
    if isinstance(value, dict) and KIND in value:
        return str(value.get("class") or value["value"])[:LONGEST]
    if isinstance(value, Tensor | dict | list | tuple):
        return described(value)
    return repr(value)[:LONGEST]


def numbers_in(values: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors and numbers in values of :func:`held_values`, by their places."""
    if isinstance(values, Tensor | int | float):
        yield place, values
    elif isinstance(values, list | tuple):
        for number, entry in enumerate(values):
            yield from numbers_in(entry, f"{place}.{number}".lstrip("."))
    elif isinstance(values, dict) and KIND in values:
        yield from numbers_in(values.get("value"), place)
    elif isinstance(values, dict):
        for name, entry in values.items():
            inner_place = place if name == BEYOND else f"{place}.{name}".lstrip(".")
            yield from numbers_in(entry, inner_place)


def numbers_of(owner: object, teacher: nn.Module | None = None) -> dict[str, Tensor]:
    """Return copies of the tensors and numbers that an object holds, by their places in it.

    They are those that a checkpoint has, and those of classes and closures that it names.

    Args:
        owner: what is looked at, such as a problem.
        teacher: whose tensors are left out, where the object has it too.
    """
    held_by_teacher: set[int] = set()
    if teacher is not None:
        held_by_teacher = {id(part) for part in teacher.modules()}
        held_by_teacher |= {id(t) for t in teacher.state_dict(keep_vars=True).values()}
    numbers = numbers_in(held_values(owner, Walk(held_by_teacher)))
    return {place: torch.as_tensor(number).clone() for place, number in numbers}


def names_written(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the names of numbers (:func:`numbers_of`) that a call has written."""
    written = []
    for name, t in after.items():
        if name not in before or not same_to_rounding(t, before[name]):
            written.append(name)
    return written


def attributes_of(owner: object) -> dict[str, Any]:
    """Return the attributes of an object without those that are PyTorch's own.

    Of a module they are its weights, its buffers and its parts too.
    """
    attributes: dict[str, Any] = {}
    is_torch_class = is_of(owner, "torch")
    for attribute, value in getattr(owner, "__dict__", {}).items():
        is_private = attribute.startswith("_")
        if attribute not in OF_TORCH and not (is_private and is_torch_class):
            attributes[attribute] = value
    if isinstance(owner, nn.Module):
        attributes.update(owner.named_parameters(recurse=False, remove_duplicate=False))
        attributes.update(owner.named_buffers(recurse=False, remove_duplicate=False))
        attributes.update(owner.named_children())
    for cls in type(owner).__mro__:
        # Those of a dataclass with slots, say.
        for attribute in vars(cls).get("__slots__", ()):
            if hasattr(owner, attribute) and not attribute.startswith("__"):
                attributes[attribute] = getattr(owner, attribute)
    return attributes


def plain(value: Any, walk: Walk) -> Any:
    """Return a value as a checkpoint holds it; its tensors share their memory with it.

    Raises: :class:`NotPlain`.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if walk.knows(value):
        return {KIND: "elsewhere"}
    if isinstance(value, Tensor):
        is_whole = value.layout == torch.strided and not is_sharded(value)
        has_values = not (value.is_quantized or value.is_meta)
        if is_whole and has_values and value.is_leaf:
            if value.dtype == torch.complex128:
                # safetensors has no such type.
                parts = torch.view_as_real(value.detach().resolve_conj())
                return {KIND: "complex", "value": parts}
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
            return {key: plain(entry, walk) for key, entry in value.items()}
        pairs = []
        for key, entry in value.items():
            if isinstance(key, Tensor):
                raise NotPlain(f"a key in it is {described(key)}")
            pairs.append((plain(key, walk), plain(entry, walk)))
        return {KIND: "dict", "value": pairs}
    elif isinstance(value, deque):
        plain_entries = [plain(entry, walk) for entry in value]
        return {KIND: "deque", "value": plain_entries, "length": value.maxlen}
    elif type(value) is set:
        return {KIND: "set", "value": [plain(entry, walk) for entry in sorted(value, key=repr)]}
    elif type(value) in (list, tuple):
        plain_entries = [plain(entry, walk) for entry in value]
        return plain_entries if isinstance(value, list) else tuple(plain_entries)
    elif isinstance(value, Enum):
        return {KIND: "member", "value": value.name}
    elif isinstance(value, CODE):
        return {KIND: "words", "value": name_of(value)}
    elif isinstance(value, CONSTANTS):
        return {KIND: "words", "value": repr(value)}
    elif isinstance(value, nn.Module):
        return {KIND: "module", "class": name_of(type(value)), "value": held_values(value, walk)}
    elif not is_trainer(value):
        return plain_object(value, walk)
    raise NotPlain(f"a value in it is {described(value)}")


def is_trainer(value: object) -> bool:
    """Return whether an object is a trainer of this package, whose state is what is being saved."""
    return any(cls.__module__.startswith("metapl.training") for cls in type(value).__mro__)


def plain_object(value: Any, walk: Walk) -> dict[str, Any]:
    """Return the state of an object, or its attributes where these are all plain.

    Raises: :class:`NotPlain`.
    """
    kind = "object"
    walk.seen[id(value)] = value
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        kind = "state"
        entries = value.state_dict()
    elif is_of(value, *FOREIGN) and not isinstance(value, NAMESPACES):
        raise NotPlain(f"a value in it is {described(value)}")
    else:
        entries = attributes_of(value)
    plain_entries = {name: plain(entry, walk) for name, entry in entries.items()}
    return {KIND: kind, "class": name_of(type(value)), "value": plain_entries}


def native(array: Any) -> numpy.dtype[Any]:
    """Return the type of an array in the machine's order of bytes."""
    dtype: numpy.dtype[Any] = array.dtype.newbyteorder("=")
    return dtype


# What stands in the place of a value that a resumed program does not have.
MISSING = object()


def put_values(owner: object, values: Values, *, device: torch.device) -> None:
    """Give a module, a problem or a loss the attributes that :func:`held_values` has returned.

    Containers, generators, modules and objects stay the same ones, which others may hold too. Where
    a program does not have the object any more, or not yet, nothing is put.

    Args:
        device: of the networks, for tensors that are held where there is none now.
    """
    attributes = attributes_of(owner)
    # Frozen dataclasses have a __setattr__ of their own.
    put: Any = nn.Module.__setattr__ if isinstance(owner, nn.Module) else object.__setattr__
    # Before anything is put: two attributes may be the same memory.
    changed = []
    for attribute, value in values.items():
        if attribute not in (BEYOND, LOST) and not is_held(attributes, attribute, value):
            changed.append((attribute, value))
    for attribute, value in changed:
        current = attributes.get(attribute, MISSING)
        try:
            new_value = put_value(current, value, device)
        except MetaplError as error:
            raise MetaplError(f"its {attribute}: {error}") from error
        if new_value is not current:
            put(owner, attribute, new_value)


def is_held(attributes: Values, attribute: str, saved: Any) -> bool:
    """Return whether an attribute has a saved value."""
    try:
        return attribute in attributes and same(plain(attributes[attribute], Walk()), saved)
    except (NotPlain, RecursionError):
        return False


def put_value(current: Any, saved: Any, device: torch.device) -> Any:
    """Return a saved value, in the container that is held now where that is of the same kind."""
    if isinstance(saved, dict) and KIND in saved:
        return put_kind(current, saved, device)
    if isinstance(saved, dict):
        table: dict[Any, Any] = current if isinstance(current, dict) else {}
        return put_pairs(table, saved.items(), device)
    if isinstance(saved, list | tuple):
        entries_now = [*current] if isinstance(current, list | tuple | deque) else []
        entries_now += [MISSING] * len(saved)
        new = [put_value(t, entry, device) for t, entry in zip(entries_now, saved, strict=False)]
        new = [entry for entry in new if entry is not MISSING]
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
            if isinstance(current, nn.Parameter):
                raise MetaplError(f"{described(saved)} was saved, and it is {described(current)}")
            return saved.detach().to(current.device, copy=True)
        # In place: a view of it, or another attribute, may be the same memory.
        with torch.no_grad():
            current.copy_(saved)
        return current
    return saved


def put_pairs(
    table: dict[Any, Any], pairs: Iterable[tuple[Any, Any]], device: torch.device
) -> dict[Any, Any]:
    """Put saved entries into a dict, in the place of what it has now."""
    entries: dict[Any, Any] = {}
    for key, saved in pairs:
        entry = put_value(table.get(key, MISSING), saved, device)
        if entry is not MISSING:
            entries[key] = entry
    table.clear()
    table.update(entries)
    return table


def is_alike(current: Tensor, saved: Tensor) -> bool:
    """Return whether saved values fit into the memory of a tensor that is held now."""
    is_plain = current.is_leaf and not (current.is_inference() or current.is_meta)
    has_own_entries = 0 not in current.stride() or current.numel() < 2
    is_same_kind = current.dtype == saved.dtype and current.shape == saved.shape
    return is_plain and has_own_entries and is_same_kind


def put_kind(current: Any, saved: Mapping[str, Any], device: torch.device) -> Any:
    """Return a value for which a dict stands; see :func:`put_value`."""
    kind = saved[KIND]
    if kind in ("elsewhere", "words"):
        return current
    value = saved["value"]
    if kind == "complex":
        return put_value(current, torch.view_as_complex(value.contiguous()), device)
    if kind == "member":
        is_member = isinstance(current, Enum) and value in type(current).__members__
        return type(current)[value] if is_member else current
    if "class" in saved:
        if name_of(type(current)) != saved["class"]:
            return current
        if kind == "state":
            current.load_state_dict(put_value(MISSING, value, device))
        else:
            put_values(current, value, device=device)
        return current
    if kind == "generator":
        if not isinstance(current, GENERATORS):
            instead = described(None if current is MISSING else current)
            raise MetaplError(f"a generator was saved, and it is {instead}; expected a generator")
        write_state(current, value)
        return current
    if kind == "set":
        return set(value)
    if kind == "deque":
        entries = put_value([*current] if isinstance(current, deque) else MISSING, value, device)
        if not isinstance(current, deque):
            return deque(entries, saved["length"])
        current.clear()
        current.extend(entries)
        return current
    if kind == "dict":
        table = current if isinstance(current, dict) else {}
        return put_pairs(table, value, device)
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
    if any(isinstance(value, dict) and value.get(KIND) == "elsewhere" for value in (a, b)):
        # It is compared there.
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(entry, b[key]) for key, entry in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)
