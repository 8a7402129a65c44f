"""Networks of pictures by their names, their weights, and their export.

Small networks, which need no other package, are in :mod:`metapl.models`.
"""

from metapl.errors import needed_for

with needed_for("metapl.networks"):
    from metapl.networks.airbench import whiten
    from metapl.networks.architectures import Architecture, create
    from metapl.networks.card import Input, NetworkCard
    from metapl.networks.exports import export
    from metapl.networks.tuned import Normalized
    from metapl.networks.weights import load_weights, parameter_groups

__all__ = [
    "Architecture",
    "Input",
    "NetworkCard",
    "Normalized",
    "create",
    "export",
    "load_weights",
    "parameter_groups",
    "whiten",
]
