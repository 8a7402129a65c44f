"""Whether a state is one that a trainer can go on from, found before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl import checks
from metapl.distributed.shards import local
from metapl.errors import MetaplError, few

SINCE = ("lookahead", "optimizers")
"""Entries that states of earlier versions do not have."""

OF_VERSIONS = {
    "params", "foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay", "initial_lr",
    "param_names",
}  # fmt: skip
"""Settings that an optimizer of the same class has in some versions of torch, or beside a schedule of torch's own."""

AS_WEIGHTS = ("momentum_buffer", "exp_", "max_exp_")
"""What the names of those entries of an optimizer's state begin with that have a parameter's shape."""


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
    names = state.get("optimizers", {})
    for name, value in own.items():
        given = state.get(name)
        if name in optimizers:
            is_of = None if names is None else names.get(name)
            yield from _optimizer_faults(name, given, optimizers[name], is_of, any_class=names is None)
        elif name == "steps_done":
            if type(given) is not int or given < 0:
                yield f"its steps_done is {given!r:.60}, and no number of steps"
        elif name == "generator":
            if given is not None and value is not None:
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
        if not isinstance(given, Tensor) or given.shape != own.shape or given.is_complex() != own.is_complex():
            yield f"its {where} is {checks.described(given)}; expected {checks.described(own)}"
        elif not _finite(given) and _finite(own):
            yield f"its {where} has numbers that are NaN or infinite"


def _optimizer_faults(where: str, given: Any, optimizer: Any, is_of: str | None, any_class: bool) -> Iterator[str]:
    kind = type(optimizer).__name__
    if not isinstance(given, Mapping) or not isinstance(given.get("state"), Mapping) or not _are_groups(given):
        yield f"its {where} is {checks.described(given)}, and no state of an optimizer of torch.optim"
        return
    if is_of not in (None, kind):
        yield f"its {where} is of an optimizer {is_of}, and the trainer's is {kind}"
    groups, own = given["param_groups"], optimizer.param_groups
    sizes, own_sizes = ([len(group["params"]) for group in of] for of in (groups, own))
    if sizes != own_sizes:
        yield f"its {where} is of an optimizer over groups of {sizes} parameters, and the trainer's are {own_sizes}"
        return
    for group, own_group in () if any_class else zip(groups, own, strict=True):
        other = (group.keys() ^ own_group.keys()) - OF_VERSIONS
        if other:
            yield f"its {where} is of another optimizer than {kind}: {few(sorted(other))} is in one of them alone"
    numbers = [i for group in groups for i in group["params"]]
    parameters = dict(zip(numbers, [p for group in own for p in group["params"]], strict=True))
    for i, values in given["state"].items():
        if i not in parameters or not isinstance(values, Mapping):
            yield f"its {where}.state has {i!r:.60}, which is no number of one of its parameters"
            return
        for name, value in values.items():
            as_weight = isinstance(value, Tensor) and str(name).startswith(AS_WEIGHTS)
            if as_weight and value.shape != parameters[i].shape:
                shape = tuple(parameters[i].shape)
                yield f"its {where}.state.{i}.{name} is {checks.described(value)}; expected the shape {shape}"
    yield from _nan(where, given)


def _are_groups(state: Mapping[str, Any]) -> bool:
    groups = state.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
    )


def _nan(where: str, tree: Any) -> Iterator[str]:
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if (isinstance(leaf, Tensor) and bool(local(leaf).isnan().any())) or (isinstance(leaf, float) and leaf != leaf):
            yield f"its {where}{pytree.keystr(path)} has NaN"


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(local(t)).all())
