"""Stored labels: distributions of a teacher in files, and a selection of them.

They live in the application (:mod:`metapl.apps.label_store`, :mod:`metapl.apps.label_selection`).
"""

from metapl.errors import needed_for

with needed_for("metapl.labels"):
    from metapl.apps.label_selection import Selection, Statistics, select, statistics
    from metapl.apps.label_store import LabelStore, LabelWriter

__all__ = ["LabelStore", "LabelWriter", "Selection", "Statistics", "select", "statistics"]
