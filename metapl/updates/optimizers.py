"""What is read from an optimizer of ``torch.optim`` and its param groups, and what is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from metapl.errors import MetaplError, few
from metapl.execution.checks import unexpected
from metapl.execution.shards import laid_out_for
from metapl.updates.base import OptimizerState, Parameters

# Entries of a param group that are no settings of an optimizer. Schedulers add the first.
_NO_SETTINGS = {"initial_lr", "params", "param_names"}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of all param groups, in their order."""
    return [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of :class:`metapl.updates.several.Several`; any other one alone."""
    parts: tuple[torch.optim.Optimizer, ...] = getattr(optimizer, "optimizers", (optimizer,))
    return parts


def torch_parts_of(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers of ``torch.optim`` that :func:`parts_of` has; of a transform none."""
    return [part for part in parts_of(optimizer) if isinstance(part, torch.optim.Optimizer)]


def summary_of(optimizer: Any) -> str:
    """Return an optimizer in a few words: its kind, and its learning rates by param group.

    >>> weight, bias = torch.nn.Linear(2, 2).parameters()
    >>> groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5}]
    >>> summary_of(torch.optim.Adam(groups, lr=0.01))
    'Adam with lr=0.01, 0.5'
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"a transform {type(optimizer).__name__}"
    summaries = []
    for part in parts_of(optimizer):
        rates: dict[str, None] = {}
        for group in part.param_groups:
            rate = f"{float(group['lr']):g}"
            # Each rate once, in the order of the groups.
            rates[rate] = None
        summaries.append(f"{type(part).__name__} with lr={', '.join(rates)}")
    return " and ".join(summaries)


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return copies of the options of the param groups.

    They are copied since a scheduler writes into a learning rate that is a tensor. One with a graph
    is copied without it.
    """
    options: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        copied: dict[str, Any] = {}
        for name, value in group.items():
            if name != "params":
                has_graph = isinstance(value, Tensor) and not value.is_leaf
                copied[name] = copy.deepcopy(value.detach() if has_graph else value)
        options.append(copied)
    return options


def refuse_unfit(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse an optimizer that no trainer steps: by a closure, such as LBFGS, or by no numbers.

    Args:
        name: of the argument that the optimizer was given as, for errors.
    """
    for part in parts_of(optimizer):
        closure = inspect.signature(type(part).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise MetaplError(
                f"{name} is {type(part).__name__}, which steps by a closure; expected one that "
                "steps on a gradient, or metapl.hypergradient (docs/meta-learning.md) around it."
            )
    refuse_tensors(optimizer, name)


def refuse_tensors(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Refuse settings in tensors with dimensions, which torch reads as one number, or not at all.

    Args:
        name: as of :func:`refuse_unfit`.
    """
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, Tensor) and value.ndim:
                raise unexpected(f"{name} has {key!r} that is", value, "a number")


def refuse_missing(
    name: str, optimizer: torch.optim.Optimizer, parameters: Parameters, network: str
) -> None:
    """Refuse an optimizer that does not hold all trainable parameters of a network.

    Args:
        name: of the argument that the optimizer was given as, for errors.
        parameters: the trainable ones, by name.
        network: its role, ``"student"`` or ``"teacher"``.
    """
    optimized = {id(p) for p in parameters_of(optimizer)}
    missing = [path for path, p in parameters.items() if id(p) not in optimized]
    if missing or not parameters:
        raise MetaplError(
            f"{name} lacks {few(missing, 3) or 'a weight'} of the {network}; expected {network}."
            "parameters(), new ones by add_param_group, and what is not to move with lr=0."
        )
    for group in optimizer.param_groups:
        # torch may see such a tensor in a step only.
        is_of_muon = "ns_steps" in group
        if is_of_muon and any(p.ndim != 2 or p.is_complex() for p in group["params"]):
            raise MetaplError(f"{name} has Muon over other tensors; expected real matrices alone.")


def load_copy_of_state(optimizer: torch.optim.Optimizer, state: OptimizerState, name: str) -> None:
    """Load a copy of a whole ``state_dict()``, laid out as the parameters are; refuse another's.

    An optimizer keeps and modifies the tensors that it loads, and these belong to the caller.
    """
    refuse_state_of_another(state, optimizer, name)
    optimizer.load_state_dict(laid_out_for(copy.deepcopy(state), optimizer))


def refuse_state_of_another(
    state: OptimizerState, optimizer: torch.optim.Optimizer, name: str
) -> None:
    """Refuse the state of an optimizer of another kind.

    torch would take over its settings in part, or miss them. A state of another version of torch
    may lack settings, or have more; one of another kind does both.
    """
    if not isinstance(state, Mapping) or "param_groups" not in state:
        raise MetaplError(f"its {name} has no param_groups: it is no state of torch.optim")
    groups = len(state["param_groups"])
    if groups != len(optimizer.param_groups):
        raise MetaplError(f"its {name} has {groups} param groups; add_param_group adds new ones")
    own_settings = {key for group in optimizer.param_groups for key in group}
    saved_settings = {key for group in state["param_groups"] for key in group}
    only_saved = sorted(saved_settings - own_settings - _NO_SETTINGS)
    only_own = sorted(own_settings - saved_settings - _NO_SETTINGS)
    if only_saved and only_own:
        raise MetaplError(f"its {name} has {few(only_saved)}, the trainer's has {few(only_own)}")
