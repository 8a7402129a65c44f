"""Settings and data as plain values, so that a run knows whether it goes on with the same ones."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

WHOLE_NUMBERS = 2**24  # of a tensor, that are all read; of larger ones, every second, third and so on


def as_values(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else fingerprint([value])
    if isinstance(value, tuple | list):
        return [as_values(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(name): as_values(entry) for name, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: as_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return type_name(
        value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    )


def settings_of(owner: Any, names: Iterable[str]) -> dict[str, Any]:
    """Attributes as plain values; under ``settings``, what the objects among them were built with."""
    held = {name: getattr(owner, name) for name in names}
    return {**{name: as_values(value) for name, value in held.items()}, "settings": built_with(held)}


def built_with(value: Any, known: set[int] | None = None) -> dict[str, str]:
    """The settings that an object keeps, by their names, in words: its attributes with the names of its constructor's
    arguments (other attributes may be counters), what a function closes over, and the same of these. Of a dataclass
    those fields count that are objects, as :func:`as_values` has the others; ``known`` ones were told of before.

    >>> built_with(nn.MultiheadAttention(4, 2))["num_heads"]
    '2'
    """
    known = set() if known is None else known
    found: dict[str, str] = {}
    for name, entry in _kept(value).items():
        if not dataclasses.is_dataclass(value):
            found[name] = repr(as_values(entry))
        if not isinstance(entry, _PLAIN) and id(entry) not in known:
            known.add(id(entry))
            found |= {f"{name}.{inner}": text for inner, text in built_with(entry, known).items()}
    return found


_PLAIN = (bool, int, float, str, bytes, type, type(None), Tensor, np.ndarray)
_FEW = 100  # entries of a list that are looked into; a longer one holds data
_OF_MODULES = frozenset(vars(nn.Module()))  # such as the mode, of which there are other records


def _kept(value: Any) -> dict[str, Any]:
    if isinstance(value, partial):
        return {"func": value.func, **{str(i): entry for i, entry in enumerate(value.args)}, **value.keywords}
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells if cell != CellType()}
    if isinstance(value, tuple | list | Mapping):
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        few = {str(name): entry for name, entry in named} if len(value) <= _FEW else {}
        return {} if all(isinstance(entry, _PLAIN) for entry in few.values()) else few
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    held = {} if isinstance(value, _PLAIN) else getattr(value, "__dict__", {})
    arguments, others = _arguments(value.__class__)
    if (others and not callable(value)) or isinstance(value, SimpleNamespace):  # a configuration
        return {name: entry for name, entry in held.items() if not name.startswith("_")}
    kept = held.keys() - _OF_MODULES
    return {name: held[key] for name in arguments for key in (name, f"_{name}") if key in kept}


@cache
def _arguments(kind: type[object]) -> tuple[tuple[str, ...], bool]:
    made_by = [vars(base).get("__init__") for base in kind.__mro__]
    written = [init for init in made_by if isinstance(init, FunctionType)]
    parameters = [p for init in written for p in inspect.signature(init).parameters.values()]
    return tuple(dict.fromkeys(p.name for p in parameters)), any(p.kind is p.VAR_KEYWORD for p in parameters)


def network_record(network: nn.Module) -> dict[str, Any]:
    """What a network says of itself: of each module its type, ``extra_repr`` and what it was built with, and the names
    of the parameters that it does not learn; not its mode, how it is laid out over processes, and values of tensors."""
    modules: dict[str, list[str]] = {}
    known: set[int] = set()
    for name, part in network.named_modules():
        kinds = [kind for kind in type(part).__mro__ if not kind.__module__.startswith(("torch.dist", "metapl.dist"))]
        # Of what stands in the place of another for the sake of a layout, nothing is known.
        stands_in = type(part).__module__.startswith("metapl.dist")
        if stands_in or (kinds[0] is nn.Module and type(part) is not nn.Module):
            modules[unwrapped(name)] = []
            continue
        says = _extra_repr(part)
        settings = [f"{key}={text}" for key, text in built_with(part, known).items()]
        modules[unwrapped(name)] = [kinds[0].__name__, says, *(text for text in settings if text not in says)]
    frozen = [unwrapped(name) for name, p in network.named_parameters() if not p.requires_grad]
    return {"modules": modules, "frozen": frozen}


def _extra_repr(part: nn.Module) -> str:
    try:
        twin = object.__new__(type(part))
        vars(twin).update(vars(part))
        for kind in ("_parameters", "_buffers"):
            held = vars(part)[kind].items()
            vars(twin)[kind] = {
                name: None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in held
            }
        return re.sub(r" at 0x[0-9a-f]+", "", str(twin.extra_repr()))
    except Exception:  # it needs values, or is not written for this
        return ""


def unwrapped(name: str) -> str:
    """A name without those of torch's wrappers for activation checkpoints."""
    return re.sub(r"(^|\.)_checkpoint_wrapped_module(?=\.|$)", "", name).removeprefix(".")


def fingerprint(tree: Any) -> str | None:
    """SHA-256 over the tensors, arrays, numbers and texts in a tree; None where it holds anything else."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor | np.ndarray):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + _numbers(leaf))
        elif leaf is None or isinstance(leaf, bool | int | float | str | bytes):
            digest.update(repr(leaf).encode("utf-8", "surrogateescape"))
        else:
            return None
    return digest.hexdigest()


def _numbers(values: Tensor | np.ndarray[Any, Any]) -> bytes:
    if isinstance(values, np.ndarray) and values.dtype.hasobject:
        return repr(values.tolist()).encode("utf-8", "surrogateescape")
    flat = values.detach().reshape(-1) if isinstance(values, Tensor) else values.reshape(-1)
    taken = flat[:: max(1, -(-len(flat) // WHOLE_NUMBERS))]
    if isinstance(taken, np.ndarray):
        return taken.tobytes()
    return taken.cpu().contiguous().view(torch.uint8).numpy().tobytes() if taken.numel() else b""


def type_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
