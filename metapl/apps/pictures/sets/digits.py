"""The 1,797 handwritten digits that come with scikit-learn, with most labels hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.apps.pictures.splits import rank_in_class
from metapl.errors import MetaplError, reason_of


@dataclass(frozen=True, eq=False)
class DigitsSplit:
    """The digits in four disjoint parts; images float32 (n, 1, 8, 8) in [0, 1], labels int64 (n,) in 0, …, 9.

    Args:
        labeled: (images, labels), the same number of every class.
        unlabeled: images.
        unlabeled_truth: the labels that were hidden. For diagnostics only, such as how many pseudo labels are right;
            nothing may be trained, selected or stopped on them.
        validation: (images, labels), to select on.
        test: (images, labels), to open once.
    """

    labeled: tuple[Tensor, Tensor]
    unlabeled: Tensor
    unlabeled_truth: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits_split(labels_per_class: int, seed: int, validation: int = 197, test: int = 400) -> DigitsSplit:
    """Split the digits anew for a seed, and keep the labels of a few images of each class.

    Test and validation are drawn with the classes in proportion; of the rest (1,200 images by default),
    ``labels_per_class`` images of each class keep their labels.

    Args:
        labels_per_class: labeled images of each class, 1 or more.
        seed: from 0 to 2³² − 1. With one seed, the parts for fewer labels lie within those for more.
        validation, test: number of images to select on and to report on, 10 or more each.

    Raises:
        MetaplError: a number out of its range, or more labels than the rest has.

    >>> split = load_digits_split(labels_per_class=4, seed=0)
    >>> len(split.labeled[0]), len(split.unlabeled), len(split.validation[0]), len(split.test[0])
    (40, 1160, 197, 400)
    """
    from sklearn.datasets import load_digits  # it takes a second, and only the digits need it
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    how = {"random_state": seed}
    try:
        rest, test_rows = train_test_split(range(len(labels)), test_size=test, stratify=labels, **how)
        train_rows, validation_rows = train_test_split(rest, test_size=validation, stratify=labels[rest], **how)
    except ValueError as error:  # sklearn's own, for numbers that are out of its range
        raise MetaplError(
            f"the {len(labels)} digits cannot be split by seed {seed} into {validation} for validation and {test} for "
            f"test: {reason_of(error)}"
        ) from error
    train = torch.tensor(train_rows)
    fewest = int(labels[train].bincount(minlength=10).min())
    if not 1 <= labels_per_class <= fewest:
        raise MetaplError(
            f"labels_per_class is {labels_per_class}; expected 1 or more, and at most {fewest}, the size of the "
            "smallest class outside validation and test: ask for fewer labels or make those smaller"
        )
    # The split comes shuffled, so the first of each class are a random choice.
    chosen = rank_in_class(labels[train]) < labels_per_class
    parts = (train[chosen], train[~chosen], validation_rows, test_rows)
    (x, y), (unlabeled, truth), held_out, last = ((images[rows], labels[rows]) for rows in parts)
    return DigitsSplit((x, y), unlabeled, truth, held_out, last)
