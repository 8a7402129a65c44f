"""Which processes hold parts of the same images, from left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from torch import nn

_NAME = "_metapl_columns"


@dataclass(frozen=True)
class Columns:
    """The processes that hold parts of the same images; a copy of a network shares them."""

    group: dist.ProcessGroup

    @property
    def count(self) -> int:
        """The number of parts."""
        return self.group.size()

    @property
    def number(self) -> int:
        """The part that this process holds, from the left."""
        return self.group.rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> Columns:
        return self  # a process group cannot be copied


def columns_of(network: nn.Module) -> Columns | None:
    """How the images of a network are split, if they are."""
    return network.__dict__.get(_NAME)


def set_columns(network: nn.Module, columns: Columns) -> None:
    """Note how the images of a network are split."""
    network.__dict__[_NAME] = columns
