"""Training in several processes: how networks are laid out over them, and what has to be exchanged.

ranks         the processes that share a batch: means, sums and agreement over them
shards        weights of which this process holds a part: norms and products over all parts
sharded_copy  a copy of a sharded network's weights, such as their moving average
layout        how a network that was handed over is laid out, found by looking at it
tensor        products of layers that several processes compute together
spatial       images cut along their width; its exchanges are in ``exchange``, who holds which columns in ``columns``
dropout       masks that do not depend on the layout
mesh          :class:`Mesh` and :func:`shard`, which lay a network out
launch        processes that ``torchrun`` has started
"""

from metapl.distributed.dropout import keyed_dropout
from metapl.distributed.mesh import Mesh, shard

__all__ = ["Mesh", "keyed_dropout", "shard"]
