"""Stored class distributions of many examples: written once by a teacher, read in any order by whoever learns them.

writer    `LabelWriter`: a store, written part by part
store     `LabelStore`: a store, read by ids or rows
queries   `select` and `statistics`: some of a store, and what is in it
files     the files of a store, and what they are refused for
drawing   statistics as a picture
"""

from metapl.apps.labels.queries import Selection, Statistics, select, statistics
from metapl.apps.labels.store import LabelStore
from metapl.apps.labels.writer import LabelWriter

__all__ = ["LabelStore", "LabelWriter", "Selection", "Statistics", "select", "statistics"]
