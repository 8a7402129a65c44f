"""Trainers of toy problems, and calls that are refused."""

from __future__ import annotations

from typing import Any

from problems_zoo import Toy
from torch import Tensor, nn

import metapl


def trainer_for(case: Toy, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    networks = {name: options.pop(name, network) for name, network in case.networks().items()}
    return metapl.BilevelTrainer(**networks, mode=mode, **{"verify": False, **options})


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}
