"""The layout of ranks: :class:`Mesh`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from metapl.errors import MetaplError


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ranks there are, and what each of them holds.

    Args:
        replicate: copies of the sharded networks, each on a share of the batch.
        shard: ranks over which every weight, gradient and optimizer state is cut, each on a share of the batch too.
        tensor: ranks over which the products within a layer are cut.
        spatial: ranks over which pictures are cut along their width.

    Raises:
        MetaplError: a size below 1.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    spatial: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or size < 1:
                raise MetaplError(f"Mesh({field.name}={size!r}): expected a number of ranks, 1 or more.")

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.replicate * self.shard * self.tensor * self.spatial
