"""Stored class distributions of many examples: written once by a teacher, read in any order by whoever learns them."""

from metapl.apps.labels.queries import Selection, Statistics, select, statistics
from metapl.apps.labels.store import LabelStore, LabelWriter

__all__ = ["LabelStore", "LabelWriter", "Selection", "Statistics", "select", "statistics"]
