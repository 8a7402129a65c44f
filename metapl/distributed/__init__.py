"""Training in several processes: how networks are laid out over them, and what has to be exchanged.

ranks     the processes that share a batch: means, sums and agreement over them
shards    weights of which this process holds a part: norms and products over all parts
layout    how a network that was handed over is laid out, found by looking at it
mesh      :class:`Mesh` and :func:`shard`, which lay a network out
"""

from __future__ import annotations

from typing import Any

__all__ = ["Mesh", "shard"]


def __getattr__(name: str) -> Any:
    """PyTorch's sharding takes seconds to import, and one process needs none of it."""
    if name in __all__:
        from metapl.distributed import mesh

        return getattr(mesh, name)
    raise AttributeError(f"module 'metapl.distributed' has no attribute {name!r}")
