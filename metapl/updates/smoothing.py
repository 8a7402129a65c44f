"""Optimizers whose steps have smoother adjoints: see :class:`metapl.updates.adam.Adam`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metapl.errors import MetaplError
from metapl.updates.adam import SMOOTHING
from metapl.updates.groups import with_options_of_groups
from metapl.updates.optimizers import parts_of

# The derivative of steps by Adam in scores of examples (docs/studies/smoothing.md).
DEFAULT_SMOOTHING = 0.1


def is_adams(group: Mapping[str, Any]) -> bool:
    """Return whether a param group is that of an Adam or an AdamW."""
    return "amsgrad" in group


def smoothed_groups(
    groups: Sequence[Mapping[str, Any]], smoothing: float
) -> Sequence[Mapping[str, Any]]:
    """Return param groups with smoothed adjoints of Adam's steps; at 0 as they are."""
    if smoothing == 0:
        return groups
    smoothed: list[Mapping[str, Any]] = []
    for group in groups:
        smoothed.append({**group, SMOOTHING: smoothing} if is_adams(group) else group)
    return smoothed


def smoothed_optimizer(optimizer: Any, smoothing: float) -> Any:
    """Return an optimizer over the same weights and state, with smoothed adjoints.

    At 0 it is the optimizer itself.
    """
    if smoothing == 0:
        return optimizer
    groups = [group for part in parts_of(optimizer) for group in part.param_groups]
    return with_options_of_groups(optimizer, smoothed_groups(groups, smoothing))


def adams_groups(optimizer: Any) -> list[Mapping[str, Any]]:
    """Return the param groups of an optimizer's parts of Adam's kind."""
    groups: list[Mapping[str, Any]] = []
    for part in parts_of(optimizer):
        # A transform of TorchOpt has none.
        groups += filter(is_adams, getattr(part, "param_groups", []))
    return groups


def smoothing_for(optimizer: Any, smoothing: float | None, *, is_sharded: bool = False) -> float:
    """Return the smoothing c of an adjoint, of an optimizer's parts of Adam's kind.

    Args:
        smoothing: what was asked for; None: :data:`DEFAULT_SMOOTHING`, and 0 where nothing can be
            smoothed.
        is_sharded: whether tensors are parts, which have not the root mean square of the whole.

    Raises: :class:`metapl.MetaplError` for a number above 0 where nothing can be smoothed.
    """
    has_adam = bool(adams_groups(optimizer))
    if smoothing is None:
        return DEFAULT_SMOOTHING if has_adam and not is_sharded else 0.0
    if smoothing and not has_adam:
        kinds = " and ".join(type(part).__name__ for part in parts_of(optimizer))
        raise MetaplError(
            f"smoothing={smoothing:g} was given with {kinds}, whose steps divide by no second "
            "moments; expected Adam or AdamW, or smoothing=0."
        )
    if smoothing and is_sharded:
        raise MetaplError(
            f"smoothing={smoothing:g} was given with a sharded student, whose parts have not the "
            "root mean square of the whole; expected DistributedDataParallel, or smoothing=0."
        )
    return smoothing
