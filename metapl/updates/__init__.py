"""The student's update as a function; :func:`update_of` selects the one for an optimizer."""

from __future__ import annotations

from typing import Any

import torch

from metapl.errors import MetaplError
from metapl.execution.shards import is_sharded
from metapl.updates.adam import Adam
from metapl.updates.base import Clipped, Cotangents, Options, Parameters, Update
from metapl.updates.muon import Muon, as_taken
from metapl.updates.several import Several, SeveralRules, as_one
from metapl.updates.torch_optim import (
    SGD,
    Schedule,
    TorchUpdate,
    options_by_step,
    options_of,
    parameters_of,
    parts_of,
    refuse_missing,
)
from metapl.updates.torchopt import TransformUpdate, is_transform

__all__ = ["Clipped", "Cotangents", "Options", "Parameters", "Schedule", "TorchUpdate", "Update", "as_one", "as_taken"]
__all__ += ["options_by_step", "options_of", "parameters_of", "parts_of", "refuse_missing", "update_of"]

_UPDATES: dict[type, type[TorchUpdate]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.Muon: Muon,
}


def update_of(optimizer: Any, parameters: Parameters, state: Any = None, name: str = "inner_optimizer") -> Update:
    """The update of an optimizer over exactly these ``parameters``; of a TorchOpt transform with its ``state`` from an
    earlier step (None: its initial one); an update as it is."""
    if isinstance(optimizer, Update):
        return optimizer
    optimizer, sharded = as_one(optimizer, name), any(is_sharded(p) for p in parameters.values())
    if is_transform(optimizer) and not sharded:
        return TransformUpdate(optimizer, parameters, state)
    kinds = [*map(type, parts_of(optimizer))]
    if state is not None or not all(kind in _UPDATES for kind in kinds):
        given = f"{' and '.join(kind.__name__ for kind in kinds)}{'' if state is None else ', with a state'}"
        expected = "torch.optim's SGD, Adam, AdamW, Muon or a tuple of them, or on one device a TorchOpt transform"
        raise MetaplError(f"{name} is {given}; expected {expected}.")
    if sharded and torch.optim.Muon in kinds:
        raise MetaplError(f"{name} has Muon, whose products are of whole matrices; the network is sharded.")
    return (SeveralRules if isinstance(optimizer, Several) else _UPDATES[kinds[0]])(optimizer, parameters)
