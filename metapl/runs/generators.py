"""The default random number generators, as a checkpoint keeps them."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

_LOG = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's default random number generators, as a checkpoint takes it."""
    return {
        "python": random.getstate(),
        "numpy": plain_states(numpy.random.get_state(legacy=False)),  # noqa: NPY002 - the global one is meant
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` returned; a warning says where the number of CUDA devices has changed."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])  # noqa: NPY002 - the global one is meant
    torch.set_rng_state(state["torch"])
    saved, present = state["cuda"], torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) != present:
        text = "the generators of %d CUDA devices were saved and %d are present: what runs on CUDA draws other numbers"
        _LOG.warning(text, len(saved), present)
    for device, generator in enumerate(saved[:present]):
        torch.cuda.set_rng_state(generator, device)


def plain_states(value: Any) -> Any:
    """The same with lists and numbers in the place of NumPy's arrays, which a checkpoint does not take."""
    return pytree.tree_map_only((numpy.ndarray, numpy.generic), lambda array: array.tolist(), value)
