"""Draws from Python's and NumPy's global generators, which no pass of torch rewinds.

A pass that runs again would draw other numbers, and a graph would keep those that it was made with.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

from metapl.errors import MetaplError
from metapl.runs.checkpoint import plain_states


class DrawsOutside(MetaplError):
    """A network or a loss draws from a generator that no pass rewinds."""


def generators_outside_torch() -> tuple[Any, Any]:
    """Return the states of Python's and NumPy's global generators, which no step rewinds.

    To read them takes 0.1 milliseconds.
    """
    # The global generator of NumPy is what a network draws from that calls numpy.random.
    of_numpy = numpy.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), plain_states(of_numpy)


def refuse_draws_outside(before: tuple[Any, Any], cause: BaseException | None = None) -> None:
    """Refuse that Python's or NumPy's generator has moved since their states were read.

    Args:
        before: these states.
        cause: the error that the draws have led to, if there is one.
    """
    if generators_outside_torch() != before:
        reader = "a network or a loss draws from Python's or NumPy's global generator"
        raise DrawsOutside(f"{reader}; expected draws by torch.") from cause


@contextmanager
def refusing_draws_outside() -> Iterator[None]:
    """Refuse draws from Python's and NumPy's global generators in this block."""
    before = generators_outside_torch()
    try:
        yield
    except MetaplError as error:
        # Passes that draw other numbers are refused in many words; this is the cause of them.
        refuse_draws_outside(before, cause=error)
        raise
    refuse_draws_outside(before)
