"""Networks laid out over several processes, and what these exchange.

tensor    products of layers that several processes compute together
spatial   images cut along their width, and exchanges that autograd knows of
dropout   masks that do not depend on the layout
mesh      :class:`Mesh` and :func:`shard`, which lay a network out
"""

from metapl.distributed.dropout import keyed_dropout
from metapl.distributed.mesh import Mesh, shard

__all__ = ["Mesh", "keyed_dropout", "shard"]
__dir__ = __all__.copy
