"""The student's update as a function; :func:`update_of` selects the one for an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from metapl.errors import MetaplError, called
from metapl.execution.shards import is_sharded
from metapl.updates.base import Clipped, Cotangents, Parameters, Update
from metapl.updates.torch_optim import (
    SGD,
    Adam,
    TorchUpdate,
    described,
    options_by_step,
    parameters_of,
    refuse_missing,
    runs_others_code,
    unwrapped,
)
from metapl.updates.torchopt import TransformUpdate, is_transform

__all__ = [
    "Clipped",
    "Cotangents",
    "Parameters",
    "Update",
    "options_by_step",
    "parameters_of",
    "refuse_missing",
    "runs_others_code",
    "unwrapped",
    "update_of",
]

_UPDATES: dict[type, type[TorchUpdate]] = {torch.optim.SGD: SGD, torch.optim.Adam: Adam, torch.optim.AdamW: Adam}


def update_of(optimizer: Any, parameters: Parameters, state: Any = None) -> Update:
    """The update of ``torch.optim`` SGD, Adam or AdamW over exactly these ``parameters`` of the student, or of a
    TorchOpt transform with its ``state`` from an earlier step (None: its initial one); an update as it is."""
    if isinstance(optimizer, Update):
        return optimizer
    optimizer = unwrapped(optimizer)
    kind = _UPDATES.get(type(optimizer))
    if kind is None and is_transform(optimizer):
        if any(is_sharded(p) for p in parameters.values()):
            raise MetaplError(
                "inner_optimizer is a TorchOpt transform, whose update may mix weights of which this process holds a "
                "part only; for a sharded student expected torch.optim.SGD, Adam or AdamW."
            )
        return TransformUpdate(optimizer, parameters, state)
    if isinstance(optimizer, type | str):
        given = described(optimizer) if isinstance(optimizer, type) else repr(optimizer)
        raise MetaplError(
            f"{called('inner_optimizer')} is {given}; expected an optimizer of the student's parameters, such as "
            "torch.optim.AdamW(student.parameters(), lr=1e-3)."
        )
    if kind is None:
        inside = getattr(optimizer, "optimizer", None)
        wraps = f", a wrapper around {described(inside)}: give {called('inner_optimizer')}=optimizer.optimizer"
        raise MetaplError(
            f"{called('inner_optimizer')} is {described(optimizer)}{wraps if type(inside) in _UPDATES else ''}; its "
            "update cannot be differentiated; expected torch.optim.SGD, Adam or AdamW (these classes themselves), or a "
            "TorchOpt transform such as torchopt.sgd(0.1, momentum=0.9)."
        )
    if state is not None:
        raise MetaplError(
            f"inner_state was given with torch.optim.{type(optimizer).__name__}, which holds its own state; "
            "leave inner_state=None, or use a TorchOpt transform."
        )
    return kind(optimizer, parameters)
