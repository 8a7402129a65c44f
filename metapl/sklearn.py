"""Classifiers for tables, as scikit-learn has them; they live in the application (:mod:`metapl.apps.sklearn`)."""

from metapl.apps.sklearn import MetaPseudoLabelsClassifier, MetaReweightedClassifier

__all__ = ["MetaPseudoLabelsClassifier", "MetaReweightedClassifier"]
