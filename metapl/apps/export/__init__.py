"""A trained network as files for others: weights, a model card, and programs that run without metapl."""

from metapl.apps.export.card import CARD, WEIGHTS
from metapl.apps.export.network import Exported, export, read_metadata

__all__ = ["CARD", "WEIGHTS", "Exported", "export", "read_metadata"]
