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
from metapl.execution.checks import described
from metapl.execution.shards import is_sharded, local
from metapl.runs.fields import AtLeastZero, misfit

# Settings of optimizers that do not decide what a state has in it, and that not every device takes; and those that an
# optimizer of the same class has in some versions of torch, or beside a schedule of torch's own.
OF_SPEED = {"foreach", "fused", "capturable", "differentiable"}
OF_VERSIONS = OF_SPEED | {"params", "maximize", "decoupled_weight_decay", "initial_lr", "param_names"}

# What the names of entries of a state begin with that have a parameter's shape, in whatever optimizer; and what those
# end with that count, or are means of squares and such.
AS_WEIGHTS = ("momentum_buffer", "exp_", "max_exp_")
NEVER_NEGATIVE = ("step", "_sq", "square_avg", "sum", "_inf")


def check_state(trainer: str, state: Any, own: Mapping[str, Any], optimizers: Mapping[str, Any]) -> None:
    """Refuse what is no state of such a trainer, or has NaN.

    Args:
        trainer: the name of its class.
        state: that was given.
        own: the trainer's own state, as it is.
        optimizers: those of ``torch.optim``, by the names of their entries.
    """
    fault = next(_state_faults(state, own, optimizers), None)
    if fault is not None:
        raise MetaplError(
            f"this is no state for this {trainer}: {fault}. Expected what state_dict() of a trainer with the same "
            "networks and optimizers gave; nothing was loaded."
        )


def names_of(optimizers: Mapping[str, Any]) -> dict[str, str]:
    return {name: type(optimizer).__name__ for name, optimizer in optimizers.items()}


def _state_faults(state: Any, own: Mapping[str, Any], optimizers: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(state, Mapping):
        yield f"it is {described(state)}, and no dict with {', '.join(own)}"
        return
    yield from _other_names("it", state, own)
    kinds = state["optimizers"]  # None where a resumed fit may have others
    if not isinstance(kinds, Mapping | None):
        yield f"its optimizers are {described(kinds)}, and no dict of the names of classes"
    for name, value in own.items():
        given, where = state[name], f"its {name}"
        if name in ("mode", "lookahead"):
            if given != value:
                yield f"{where} is {given!r:.60}, and the trainer's is {value!r}"
        elif name in optimizers:
            yield from _optimizer_faults(where, given, optimizers[name], kinds)
        elif name == "steps_done":
            yield from filter(None, [misfit(given, AtLeastZero, where)])
        elif (given is None) != (value is None) and name != "optimizers":
            yield f"{where} is {described(given)}, and the trainer's is {described(value)}"
        elif name == "mode_state":
            if not isinstance(given, Mapping):
                yield f"{where} is {described(given)}, and no dict"
            for path, leaf in pytree.tree_flatten_with_path(given)[0]:
                if isinstance(leaf, Tensor | float) and bool(local(torch.as_tensor(leaf)).isnan().any()):
                    yield f"{where}{pytree.keystr(path)} has NaN"
            recent = given.get("recent", {})  # which states of earlier versions do not have
            if not isinstance(recent, Mapping) or (recent and not _are_means(recent)):
                yield f"{where}['recent'] is {described(recent)}, and no means of steps"
        elif name != "optimizers":
            yield from _faults(where, given, value)


def _are_means(recent: Mapping[Any, Any]) -> bool:
    spread, tensors = recent.get("spread"), {name: t for name, t in recent.items() if name != "spread"}
    pairs = ("feedback" in recent) == ("feedback_square" in recent)
    return isinstance(spread, float) and pairs and all(isinstance(t, Tensor) for t in tensors.values())


def _other_names(where: str, given: Mapping[Any, Any], own: Mapping[Any, Any]) -> Iterator[str]:
    missing, other = ([name for name in one if name not in two] for one, two in ((own, given), (given, own)))
    has = [f"{where} has no {few(missing)}"] * bool(missing)
    has += [f"{where} has {few(other)}, which the trainer's has not"] * bool(other)
    if has:
        yield " and ".join(has)


def _faults(where: str, given: Any, own: Any) -> Iterator[str]:
    """Where a tree has other names, lengths or shapes, or numbers that are not finite where the trainer's are."""
    if isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            yield f"{where} is {described(given)}, and no dict"
        yield from _other_names(where, given, own)
        for name, value in own.items():
            yield from _faults(f"{where}.{name}", given[name], value)
    elif isinstance(own, tuple | list):
        if not isinstance(given, tuple | list) or len(given) != len(own):
            yield f"{where} is {described(given)}, and no list of {len(own)}"
        for i, value in enumerate(own):
            yield from _faults(f"{where}.{i}", given[i], value)
    elif isinstance(own, Tensor):
        if not _is_like(given, own):
            yield f"{where} is {described(given)}; expected {described(own)}"
        if not _finite(local(given).to(own.dtype)) and _finite(own):
            yield f"{where} has numbers that are NaN or infinite"


def _finite(t: Tensor) -> bool:
    return bool(torch.isfinite(local(t)).all())


def _is_like(given: Any, own: Tensor) -> bool:
    """Whether it is a tensor of the same shape and layout, with values, and numbers of the same kind."""
    return (
        isinstance(given, Tensor)
        and (given.shape, given.layout, given.is_meta) == (own.shape, own.layout, own.is_meta)
        and (given.is_complex(), given.is_floating_point()) == (own.is_complex(), own.is_floating_point())
    )


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        plain = value.dim() == 0 and not value.is_meta and not value.is_complex() and value.dtype != torch.bool
        return float(value) if plain else None
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


# -------------------------------------------------------------------------------------------------------- optimizers


def _optimizer_faults(where: str, given: Any, optimizer: Any, kinds: Mapping[str, Any] | None) -> Iterator[str]:
    """What keeps an optimizer from going on from a state, of an optimizer of the class that ``kinds`` says; of any
    class, with any settings, where that is None.

    Cost: a step of the optimizer's class on zeros of each parameter's shape, on the host, one parameter at a time.
    """
    kind, own = type(optimizer).__name__, optimizer.param_groups
    groups: Any = given.get("param_groups") if isinstance(given, Mapping) else None
    if (
        misfit(groups, list[dict[str, Any]])
        or misfit(given.get("state"), dict[Any, dict[str, Any]])
        or any(misfit(group.get("params"), list[int]) for group in groups)
    ):
        yield f"{where} is {described(given)}, and no state of an optimizer of torch.optim"
    is_of = kind if kinds is None else kinds.get(where.removeprefix("its "))
    if is_of != kind:
        yield f"{where} is of an optimizer {is_of}, and the trainer's is {kind}"
    sizes, own_sizes = ([len(group["params"]) for group in of] for of in (groups, own))
    if sizes != own_sizes:
        yield f"{where} is of an optimizer over groups of {sizes} parameters, and the trainer's are {own_sizes}"
    of_number: dict[int, Any] = {}
    for number, (group, own_group) in enumerate(zip(groups, own, strict=True)):
        other = (group.keys() ^ own_group.keys()) - OF_VERSIONS
        if other and kinds is not None:
            yield f"{where} is of another optimizer than {kind}: {few(sorted(other))} is in one of them alone"
        yield from _setting_faults(f"{where}['param_groups'][{number}]", group, own_group, optimizer)
        of_number |= {i: (p, group) for i, p in zip(group["params"], own_group["params"], strict=True)}
    if len(of_number) != sum(sizes):
        yield f"{where} has a number of a parameter twice"
    foreign = [i for i in given["state"] if i not in of_number]
    if foreign:
        yield f"{where}.state has {foreign[0]!r:.60}, which is no number of one of its parameters"
    for i, (p, group) in of_number.items():
        values = given["state"].get(i)
        if values:
            yield from _entry_faults(f"{where}.state.{i}", values, p, group, optimizer)
        elif given["state"] and optimizer.state.get(p):
            yield f"{where}.state has no {i}, of which the trainer's has one"


def _setting_faults(where: str, group: Mapping[str, Any], own: Mapping[str, Any], optimizer: Any) -> Iterator[str]:
    if "lr" not in group:
        yield f"{where} has no lr"
    for name in group.keys() & own.keys() - {"params", "param_names"}:
        if not _same_kind(group[name], own[name]):
            yield f"{where}['{name}'] is {group[name]!r:.60}; expected one such as {own[name]!r:.60}"
    try:
        _rebuilt(optimizer, own, torch.zeros(1))
    except Exception:  # of a class that is not built from its settings, they say nothing
        return
    try:
        _rebuilt(optimizer, group, torch.zeros(1))
    except Exception as error:
        yield f"{where} is refused by {type(optimizer).__name__}: {error}"


def _same_kind(given: Any, own: Any) -> bool:
    if isinstance(own, tuple | list):
        return isinstance(given, tuple | list) and len(given) == len(own) and all(map(_same_kind, given, own))
    had, has = _number(own), _number(given)
    if had is None and (own is not None or has is None):
        return isinstance(given, bool | None if isinstance(own, bool | None) else type(own))
    return has is not None and (math.isfinite(has) or has == had)


def _entry_faults(
    where: str, values: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any], optimizer: Any
) -> Iterator[str]:
    """What is missing in the state of a parameter, is of another kind than the optimizer makes it, or out of range."""
    in_parts = is_sharded(parameter) and any(map(is_sharded, values.values()))
    like = torch.zeros(local(parameter).shape if in_parts else parameter.shape, dtype=parameter.dtype)
    made: dict[str, Any] = {}
    try:  # the state that a step on a gradient of zeros leaves
        fresh = _rebuilt(optimizer, group, like)
        like.grad = torch.zeros_like(like)
        fresh.step()
        made = {name: value for name, value in fresh.state[like].items() if value is not None}
    except Exception:  # it wants a closure, or other gradients, or is not built from its settings
        pass
    for name in {**made, **values}:
        value, own = local(values.get(name)), made.get(name, like if str(name).startswith(AS_WEIGHTS) else None)
        if value is None and name not in made:
            continue  # some versions of torch keep what is not there as None
        if isinstance(own, Tensor) and own.dim():
            yield from _faults(f"{where}.{name}", value, own)
        elif own is not None and _number(value) is None:
            yield f"{where}.{name} is {described(value)}; expected a number"
        if isinstance(value, Tensor | float | int):
            t = torch.as_tensor(value)
            if not _finite(t):
                yield f"{where}.{name} has numbers that are NaN or infinite"
            elif not t.is_complex() and str(name).endswith(NEVER_NEGATIVE) and bool((t < 0).any()):
                yield f"{where}.{name} has numbers below 0"


def _rebuilt(optimizer: Any, group: Mapping[str, Any], parameter: Tensor) -> Any:
    """An optimizer of the same class and with a group's settings, over one parameter."""
    taken = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in group.items() if name in taken and name not in OF_SPEED | {"params"}}
    return type(optimizer)([parameter.requires_grad_()], **settings)
