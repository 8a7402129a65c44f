"""The default random number generators, as a checkpoint keeps them."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from metapl.errors import MetaplError, reason_of

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
    """Restore what :func:`rng_state` returned; a warning says where the number of CUDA devices has changed.

    Raises: :class:`metapl.MetaplError` where it is not such a state; all generators are then as they were.
    """
    before = rng_state()
    try:
        _set(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        _set(before)
        raise MetaplError(
            f"this is not a state of the random number generators ({type(error).__name__}: {reason_of(error)}); give "
            "what metapl.runs.generators.rng_state() returned"
        ) from error
    saved, present = len(state["cuda"]), len(before["cuda"])
    if saved != present:
        text = "the random number generators of %d CUDA device(s) were saved and %d are present; "
        _LOG.warning(f"{text}what runs on CUDA will draw other numbers than before", saved, present)


def _set(state: Mapping[str, Any]) -> None:
    python, saved_cuda = state["python"], state["cuda"]
    random.setstate((python["version"], tuple(python["words"]), python["next_gauss"]))
    numpy.random.set_state(state["numpy"])  # noqa: NPY002 - the global one is meant
    torch.set_rng_state(state["torch"])
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, generator in enumerate(saved_cuda[:present]):
        torch.cuda.set_rng_state(generator, device)


def plain_states(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain_states(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_states(inner) for inner in value]
    return value.tolist() if isinstance(value, numpy.ndarray | numpy.generic) else value
