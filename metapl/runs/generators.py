"""The default random number generators, as a checkpoint keeps them."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

_LOG = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's default random number generators, as a checkpoint takes it."""
    version, words, next_gauss = random.getstate()
    return {
        "python": {"version": version, "words": list(words), "next_gauss": next_gauss},
        "numpy": plain_states(numpy.random.get_state(legacy=False)),  # noqa: NPY002 - the global one is meant
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned; a warning says where the number of CUDA devices has changed."""
    python, saved = state["python"], state["cuda"]
    random.setstate((python["version"], tuple(python["words"]), python["next_gauss"]))
    numpy.random.set_state(state["numpy"])  # noqa: NPY002 - the global one is meant
    torch.set_rng_state(state["torch"])
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) != present:
        text = "the generators of %d CUDA devices were saved and %d are present: what runs on CUDA draws other numbers"
        _LOG.warning(text, len(saved), present)
    for device, generator in enumerate(saved[:present]):
        torch.cuda.set_rng_state(generator, device)


def plain_states(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain_states(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_states(inner) for inner in value]
    return value.tolist() if isinstance(value, numpy.ndarray | numpy.generic) else value
