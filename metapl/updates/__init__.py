"""The student's update as a function; :func:`update_of` selects the one for an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from metapl.errors import MetaplError
from metapl.execution.shards import is_sharded
from metapl.updates.base import Clipped, Cotangents, Options, Parameters, Update
from metapl.updates.torch_optim import (
    SGD,
    Adam,
    TorchUpdate,
    options_by_step,
    options_of,
    parameters_of,
    refuse_missing,
)
from metapl.updates.torchopt import TransformUpdate, is_transform

__all__ = [
    "Clipped",
    "Cotangents",
    "Options",
    "Parameters",
    "TorchUpdate",
    "Update",
    "options_by_step",
    "options_of",
    "parameters_of",
    "refuse_missing",
    "update_of",
]

_UPDATES: dict[type, type[TorchUpdate]] = {torch.optim.SGD: SGD, torch.optim.Adam: Adam, torch.optim.AdamW: Adam}


def update_of(optimizer: Any, parameters: Parameters, state: Any = None, name: str = "inner_optimizer") -> Update:
    """The update of ``torch.optim`` SGD, Adam or AdamW over exactly these ``parameters`` of the student, or of a
    TorchOpt transform with its ``state`` from an earlier step (None: its initial one); an update as it is."""
    if isinstance(optimizer, Update):
        return optimizer
    if is_transform(optimizer) and not any(is_sharded(p) for p in parameters.values()):
        return TransformUpdate(optimizer, parameters, state)
    kind = _UPDATES.get(type(optimizer))
    if kind is None or state is not None:
        raise MetaplError(
            f"{name} is {type(optimizer).__name__}{'' if state is None else ', with a state'}; expected "
            "torch.optim.SGD, Adam or AdamW themselves, without inner_state, or, for a student on one device, a "
            "TorchOpt transform."
        )
    return kind(optimizer, parameters)
