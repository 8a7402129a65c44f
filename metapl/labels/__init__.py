"""Stored labels: distributions of a teacher in files, and a selection of them."""

from metapl.errors import needed_for

with needed_for("metapl.labels"):
    from metapl.labels.selection import Selection, Statistics, select, statistics
    from metapl.labels.store import LabelStore, LabelWriter

__all__ = ["LabelStore", "LabelWriter", "Selection", "Statistics", "select", "statistics"]
