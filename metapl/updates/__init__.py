"""The student's update as a function; :func:`update_of` selects the one for an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from metapl.errors import MetaplError
from metapl.execution.shards import is_sharded
from metapl.updates.adam import Adam
from metapl.updates.base import Clipped, Cotangents, OptimizerState, Options, Parameters, Update
from metapl.updates.muon import Muon, rounded_options
from metapl.updates.optimizers import (
    load_copy_of_state,
    options_of,
    parameters_of,
    parts_of,
    refuse_missing,
    refuse_unfit,
    torch_parts_of,
)
from metapl.updates.schedules import Settings, options_by_step, scheduled_settings
from metapl.updates.several import InnerOptimizer, Several, SeveralRules, as_one_optimizer
from metapl.updates.sgd import SGD
from metapl.updates.torch_optim import TorchUpdate
from metapl.updates.torchopt import TransformUpdate, is_transform

__all__ = [
    "Clipped",
    "Cotangents",
    "InnerOptimizer",
    "Options",
    "Parameters",
    "Settings",
    "TorchUpdate",
    "Update",
    "as_one_optimizer",
    "load_copy_of_state",
    "rounded_options",
    "options_by_step",
    "options_of",
    "parameters_of",
    "parts_of",
    "refuse_missing",
    "refuse_unfit",
    "scheduled_settings",
    "torch_parts_of",
    "update_of",
]

_UPDATES: dict[type, type[TorchUpdate]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.Muon: Muon,
}


def update_of(
    optimizer: Any,
    parameters: Parameters,
    state: OptimizerState = None,
    name: str = "inner_optimizer",
    alternative: str = "or on one device a TorchOpt transform",
) -> Update:
    """Return the update of an optimizer over exactly these ``parameters``; an update as it is.

    Args:
        optimizer: of ``torch.optim``, several of them, or a TorchOpt transform.
        state: of the transform, from an earlier step; None: its initial one.
        name: of the argument, for errors.
        alternative: what else is expected, for errors.

    Raises: :class:`metapl.MetaplError` for an optimizer without a rule here, such as RMSprop.
    """
    if isinstance(optimizer, Update):
        return optimizer

    optimizer = as_one_optimizer(optimizer, name)
    has_sharded_weights = any(is_sharded(p) for p in parameters.values())
    if is_transform(optimizer) and not has_sharded_weights:
        return TransformUpdate(optimizer, parameters, state=state)

    kinds = [type(part) for part in parts_of(optimizer)]
    has_rules = all(kind in _UPDATES for kind in kinds)
    if state is not None or not has_rules:
        with_state = "" if state is None else ", with a state"
        raise MetaplError(
            f"{name} is {' and '.join(kind.__name__ for kind in kinds)}{with_state}; expected "
            f"torch.optim's SGD, Adam, AdamW, Muon or a tuple of them, {alternative}."
        )
    if has_sharded_weights and torch.optim.Muon in kinds:
        raise MetaplError(f"{name} has Muon, and the network is sharded; expected AdamW, say.")
    if isinstance(optimizer, Several):
        return SeveralRules(optimizer, parameters)
    return _UPDATES[kinds[0]](optimizer, parameters)
