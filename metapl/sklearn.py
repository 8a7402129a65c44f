"""Classifiers for tables, as scikit-learn has them.

They live in the application (:mod:`metapl.apps.sklearn`).
"""

from metapl.errors import needed_for

with needed_for("metapl.sklearn"):
    from metapl.apps.sklearn import MetaPseudoLabelsClassifier, MetaReweightedClassifier

__all__ = ["MetaPseudoLabelsClassifier", "MetaReweightedClassifier"]
