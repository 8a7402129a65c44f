"""Sizes of networks, checked."""

from __future__ import annotations

from metapl.errors import MetaplError


def check_numbers(name: str, dropout: float, example: str, **sizes: int) -> None:
    """Refuse sizes below 1 and a dropout that is not a probability."""
    if min(sizes.values()) < 1:
        *given, last = (f"{field} {size}" for field, size in sizes.items())
        raise MetaplError(f"{name} got {', '.join(given)} and {last}; expected each to be 1 or more: {example}")
    if not 0.0 <= dropout < 1.0:
        raise MetaplError(f"{name} got dropout {dropout}; expected a probability in [0, 1): dropout=0.3, say")
