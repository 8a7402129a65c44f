"""Which execution a network takes, by its layout."""

from __future__ import annotations

from torch import nn

from metapl.execution.layout import Layout
from metapl.execution.local import LocalStudent
from metapl.execution.sharded import ShardedStudent


def student_of(
    network: nn.Module | Layout,
    parameters: dict[str, nn.Parameter] | None = None,
    *,
    double_backward: bool = False,
    first: bool = False,
) -> LocalStudent:
    """A student as it is laid out, a module of this process alone or any other; for the arguments see
    :class:`metapl.execution.local.LocalStudent`."""
    layout = network if isinstance(network, Layout) else Layout(network)
    if layout.is_sharded:
        return ShardedStudent(layout, parameters)
    return LocalStudent(layout.network, parameters, double_backward=double_backward, first=first, ranks=layout.ranks)
