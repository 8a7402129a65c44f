"""Stored class distributions of many examples: written once by a teacher, read in any order by whoever learns them."""

from metapl.labels.store import LabelStore
from metapl.labels.writer import LabelWriter

__all__ = ["LabelStore", "LabelWriter"]
