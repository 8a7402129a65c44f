"""Networks laid out over several processes: :class:`Mesh` and :func:`shard`."""

from metapl.distributed.mesh import Mesh, shard

__all__ = ["Mesh", "shard"]
__dir__ = __all__.copy
