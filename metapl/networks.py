"""Networks of images by their names, their weights, and their export.

They live in the application (:mod:`metapl.apps.networks` and its neighbors). Small networks, which
need no other package, are in :mod:`metapl.models`.
"""

from metapl.errors import needed_for

with needed_for("metapl.networks"):
    from metapl.apps.export import export
    from metapl.apps.network_weights import load_weights, parameter_groups
    from metapl.apps.networks import Architecture, create
    from metapl.apps.tuned_networks import Normalized

__all__ = ["Architecture", "Normalized", "create", "export", "load_weights", "parameter_groups"]
