"""How a classifier does on pictures that are damaged, made to mislead it, or of several classes.

corruptions  fifteen kinds of damage in five severities each, as in ImageNet-C
attacks      pictures that are moved against the network: FGSM and PGD
errors       corruption errors, and rates of flipped predictions
measure      accuracies on damaged and on attacked pictures
imagenet     ImageNet-A, ImageNet-C and ImageNet-P, from their files
multi_label  accuracy where a picture has several right labels
"""

from metapl.apps.evaluation.multi_label import MultiLabelAccuracy, multi_label_accuracy, read_label_sets

__all__ = [
    "MultiLabelAccuracy",
    "multi_label_accuracy",
    "read_label_sets",
]
