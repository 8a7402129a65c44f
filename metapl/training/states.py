"""Whether a state is one that a trainer can go on from, found before any of it is loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.shards import is_sharded, local

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


# -------------------------------------------------------------------------------------------------------- optimizers

OF_SPEED = {"foreach", "fused", "capturable", "differentiable"}
"""Settings that do not decide what a state has in it, and that not every device takes."""

OF_VERSIONS = OF_SPEED | {"params", "maximize", "decoupled_weight_decay", "initial_lr", "param_names"}
"""Settings that an optimizer of the same class has in some versions of torch, or beside a schedule of torch's own."""

AS_WEIGHTS = ("momentum_buffer", "exp_", "max_exp_")
"""What the names of those entries of a state begin with that have a parameter's shape, in whatever optimizer."""

NEVER_NEGATIVE = ("step", "_sq", "square_avg", "sum", "_inf")
"""What the names of those entries of a state end with that count, or are means of squares and such."""


def optimizer_faults(where: str, given: Any, optimizer: Any, is_of: str | None, any_class: bool) -> Iterator[str]:
    """What keeps an optimizer from going on from a state, in words.

    Args:
        where: the name of the state.
        given: the state.
        optimizer: as it is; nothing of it is changed.
        is_of: the class of the optimizer that the state is of, where that is known.
        any_class: the state may have other settings than the optimizer.

    Cost: a step of the optimizer's class on zeros of each parameter's shape, on the host, one parameter at a time.
    """
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
    for number, (group, own_group) in enumerate(zip(groups, own, strict=True)):
        other = (group.keys() ^ own_group.keys()) - OF_VERSIONS
        if other and not any_class:
            yield f"its {where} is of another optimizer than {kind}: {few(sorted(other))} is in one of them alone"
        yield from _setting_faults(f"{where}['param_groups'][{number}]", group, own_group, optimizer)
    of_number = {
        i: (p, group)
        for group, own_group in zip(groups, own, strict=True)
        for i, p in zip(group["params"], own_group["params"], strict=True)
    }
    if len(of_number) != sum(sizes):
        yield f"its {where} has a number of a parameter twice"
    for i, values in given["state"].items():
        if i not in of_number or not isinstance(values, Mapping):
            yield f"its {where}.state has {i!r:.60}, which is no number of one of its parameters"
            return
    for i, (p, group) in of_number.items():
        values = given["state"].get(i, {})
        if not values and given["state"] and optimizer.state.get(p):
            yield f"its {where}.state has no {i}, of which the trainer's has one"
        if values:
            yield from _entry_faults(f"{where}.state.{i}", values, p, group, optimizer)


def is_like(given: Any, own: Tensor) -> bool:
    """Whether it is a tensor of the same shape and layout, with values, and numbers of the same kind."""
    return (
        isinstance(given, Tensor)
        and (given.shape, given.layout, given.is_meta) == (own.shape, own.layout, own.is_meta)
        and (given.is_complex(), given.is_floating_point()) == (own.is_complex(), own.is_floating_point())
    )


def _are_groups(state: Mapping[str, Any]) -> bool:
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return False
    numbers = [group.get("params") for group in groups]
    return all(isinstance(of, list) and all(type(i) is int for i in of) for of in numbers)


def _setting_faults(where: str, group: Mapping[str, Any], own: Mapping[str, Any], optimizer: Any) -> Iterator[str]:
    for name in sorted(group.keys() & own.keys() - {"params", "param_names"}):
        if not _same_kind(group[name], own[name]):
            yield f"its {where}['{name}'] is {group[name]!r:.60}; expected one such as {own[name]!r:.60}"
    if "lr" not in group:
        yield f"its {where} has no lr"
    like = torch.zeros(1)
    try:
        _rebuilt(optimizer, own, like)
    except Exception:  # of a class that is not built from its settings, they say nothing
        return
    try:
        _rebuilt(optimizer, group, like)
    except Exception as error:
        yield f"its {where} is refused by {type(optimizer).__name__}: {error}"


def _same_kind(given: Any, own: Any) -> bool:
    if isinstance(own, tuple | list):
        fits = isinstance(given, tuple | list) and len(given) == len(own)
        return fits and all(map(_same_kind, given, own))
    if isinstance(own, bool | None):
        return isinstance(given, bool | None) or (own is None and _number(given) is not None)
    had, has = _number(own), _number(given)
    if had is None:
        return isinstance(given, type(own))
    return has is not None and (math.isfinite(has) or has == had)


def _number(value: Any) -> float | None:
    """A number, which may be a tensor without dimensions; None for anything else."""
    if isinstance(value, Tensor):
        plain = value.dim() == 0 and not value.is_meta and not value.is_complex() and value.dtype != torch.bool
        return float(value) if plain else None
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def _entry_faults(
    where: str, values: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any], optimizer: Any
) -> Iterator[str]:
    """What is missing in the state of a parameter, is of another kind than the optimizer makes it, or out of range."""
    in_parts = is_sharded(parameter) and any(map(is_sharded, values.values()))
    shape = local(parameter).shape if in_parts else parameter.shape
    made = _made(optimizer, group, torch.zeros(shape, dtype=parameter.dtype))
    for name in [*made, *(name for name in values if name not in made)]:
        value, own = local(values.get(name)), made.get(name)
        if value is None and own is None:
            continue  # some versions of torch keep what is not there as None
        if isinstance(own, Tensor) and own.dim():
            fits = is_like(value, own)
        elif own is not None:
            fits = _number(value) is not None
        else:
            fits = not str(name).startswith(AS_WEIGHTS) or is_like(value, torch.empty(shape, dtype=parameter.dtype))
        if not fits:
            expected = f"the shape {tuple(own.shape)}" if isinstance(own, Tensor) and own.dim() else "a number"
            if own is None:
                expected = f"the shape {tuple(shape)}"
            yield f"its {where}.{name} is {checks.described(value)}; expected {expected}"
        elif isinstance(value, Tensor | float | int):
            yield from _range_faults(f"{where}.{name}", torch.as_tensor(value), parameter.dtype)


def _range_faults(where: str, value: Tensor, dtype: torch.dtype) -> Iterator[str]:
    held = value.to(dtype) if value.dim() and value.is_floating_point() else value  # as it is loaded
    if not bool(torch.isfinite(held).all()):
        yield f"its {where} has numbers that are NaN or infinite"
    elif not value.is_complex() and where.endswith(NEVER_NEGATIVE) and bool((value < 0).any()):
        yield f"its {where} has numbers below 0"


def _rebuilt(optimizer: Any, group: Mapping[str, Any], parameter: Tensor) -> Any:
    """An optimizer of the same class and with a group's settings, over one parameter."""
    taken = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in group.items() if name in taken and name not in OF_SPEED | {"params"}}
    return type(optimizer)([parameter.requires_grad_()], **settings)


def _made(optimizer: Any, group: Mapping[str, Any], parameter: Tensor) -> Mapping[str, Any]:
    """The state that a step on a gradient of zeros leaves; empty where that cannot be told."""
    try:
        fresh = _rebuilt(optimizer, group, parameter)
        parameter.grad = torch.zeros_like(parameter)
        fresh.step()
    except Exception:  # it wants a closure, or other gradients, or is not built from its settings
        return {}
    return {name: value for name, value in fresh.state[parameter].items() if value is not None}
