"""Where runs that have ended are looked at."""

from __future__ import annotations

import torch

from metapl.errors import MetaplError
from metapl.recipes import Recipe


def place(recipe: Recipe) -> torch.device:
    """Where the run was trained; the CPU, which every machine has, where that is not to be had here."""
    try:
        return recipe.torch_device()
    except MetaplError:
        return torch.device("cpu")
