"""Whether a state is one that a trainer can go on from, found before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.shards import local
from metapl.training.optimizer_states import is_like, optimizer_faults

SINCE = ("lookahead", "optimizers")
"""Entries that states of earlier versions do not have."""


def check_state(trainer: str, state: Any, own: Mapping[str, Any], optimizers: Mapping[str, Any]) -> None:
    """Refuse what is no state of such a trainer, or has NaN.

    Args:
        trainer: the name of its class.
        state: that was given.
        own: the trainer's own state, as it is.
        optimizers: those of ``torch.optim``, by the names of their entries.
    """
    fault = next(_faults(state, own, optimizers), None)
    if fault is not None:
        raise MetaplError(
            f"this is no state for this {trainer}: {fault}. Expected what state_dict() of a trainer with the same "
            "networks and optimizers gave; nothing was loaded."
        )


def names_of(optimizers: Mapping[str, Any]) -> dict[str, str]:
    """The classes of optimizers, as a state keeps them."""
    return {name: type(optimizer).__name__ for name, optimizer in optimizers.items()}


def _faults(state: Any, own: Mapping[str, Any], optimizers: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(state, Mapping):
        yield f"it is {checks.described(state)}, and no dict with {', '.join(own)}"
        return
    yield from _other_names("it", state, [name for name in own if name not in SINCE], own)
    names = state.get("optimizers")
    if not isinstance(names, Mapping | None):
        yield f"its optimizers are {checks.described(names)}, and no dict of the names of classes"
        return
    for name, value in own.items():
        given = state.get(name)
        if name in optimizers:
            is_of = None if names is None else names.get(name)
            yield from optimizer_faults(name, given, optimizers[name], is_of, any_class=names is None)
        elif name == "steps_done":
            if type(given) is not int or given < 0:
                yield f"its steps_done is {given!r:.60}, and no number of steps"
        elif name == "generator":
            if (given is None) != (value is None):
                yield f"its generator is {checks.described(given)}, and the trainer's is {checks.described(value)}"
            elif value is not None:
                yield from _tree_faults(name, given, value)
        elif name == "mode_state":
            if not isinstance(given, Mapping):
                yield f"its mode_state is {checks.described(given)}, and no dict"
            else:
                yield from _nan(name, given)
        elif name not in SINCE:
            yield from _tree_faults(name, given, value)


def _other_names(where: str, given: Mapping[Any, Any], needed: Any, known: Any) -> Iterator[str]:
    missing = [name for name in needed if name not in given]
    other = [name for name in given if name not in known]
    if missing or other:
        has = [f"{where} has no {few(missing)}"] if missing else []
        yield " and ".join([*has, *([f"{where} has {few(other)}, which the trainer's has not"] if other else [])])


def _tree_faults(where: str, given: Any, own: Any) -> Iterator[str]:
    """Where a tree has other names, lengths or shapes, or numbers that are not finite where the trainer's are."""
    if isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            yield f"its {where} is {checks.described(given)}, and no dict"
            return
        yield from _other_names(f"its {where}", given, own, own)
        for name, value in own.items():
            yield from _tree_faults(f"{where}.{name}", given[name], value)
    elif isinstance(own, tuple | list):
        if not isinstance(given, tuple | list) or len(given) != len(own):
            yield f"its {where} is {checks.described(given)}, and no list of {len(own)}"
            return
        for i, (one, value) in enumerate(zip(given, own, strict=True)):
            yield from _tree_faults(f"{where}.{i}", one, value)
    elif isinstance(own, Tensor):
        if not is_like(given, own):
            yield f"its {where} is {checks.described(given)}; expected {checks.described(own)}"
        elif not _finite(local(given).to(own.dtype)) and _finite(own):
            yield f"its {where} has numbers that are NaN or infinite"


def _nan(where: str, tree: Any) -> Iterator[str]:
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if (isinstance(leaf, Tensor) and bool(local(leaf).isnan().any())) or (isinstance(leaf, float) and leaf != leaf):
            yield f"its {where}{pytree.keystr(path)} has NaN"


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(local(t)).all())
