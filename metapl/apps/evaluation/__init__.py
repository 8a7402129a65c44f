"""How a classifier does on pictures that are damaged, made to mislead it, or of several classes."""

from metapl.apps.evaluation.multi_label import MultiLabelAccuracy, multi_label_accuracy, read_label_sets

__all__ = ["MultiLabelAccuracy", "multi_label_accuracy", "read_label_sets"]
