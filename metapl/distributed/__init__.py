"""Training in several processes: how networks are laid out over them."""

from metapl.distributed.mesh import Mesh

__all__ = ["Mesh"]
