"""Which examples are labeled, unlabeled, held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import MetaplError, needed_for

# This keeps these draws apart from every other use of a seed.
_VALIDATION = 0x5B17


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Set a part of each class aside for validation.

    Of n examples it is round(fraction · n), but at least 1 and at most n − 1.

    Args:
        labels: int64 (n,).
        fraction: of each class, in (0, 1).
        seed: any integer.

    Returns: (train, validation): indices, int64, disjoint, sorted, and together all.

    >>> train, validation = stratified_split(torch.tensor([0] * 8 + [1] * 4 + [2]), 0.25, seed=0)
    >>> len(train), len(validation)
    (10, 3)
    """
    if not 0 < fraction < 1:
        raise MetaplError(
            f"stratified_split got fraction {fraction}; expected a number between 0 and 1, such "
            "as 0.1."
        )
    drawn = draws.bits(seed, 0, torch.arange(len(labels)), 1, _VALIDATION)[:, 0]
    order = torch.argsort(drawn, stable=True)
    is_aside = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = order[labels[order] == label]
        count = max(round(fraction * len(rows)), 1)
        # One example at least is left to learn from.
        is_aside[rows[: min(count, len(rows) - 1)]] = True
    if not is_aside.any():
        raise MetaplError(
            f"no class of the {len(labels)} labeled pictures has two; expected more, or --val "
            "FOLDER."
        )
    return (~is_aside).nonzero()[:, 0], is_aside.nonzero()[:, 0]


# ------------------------------------------------------------------------------------------- digits


@dataclass(frozen=True, eq=False)
class DigitsSplit:
    """The digits in four disjoint parts.

    Images are float32 (n, 1, 8, 8) in [0, 1], labels int64 (n,) in 0, …, 9. ``unlabeled_truth`` has
    the labels that were hidden, for diagnostics only: nothing may be trained, selected or stopped
    on them.
    """

    labeled: tuple[Tensor, Tensor]
    unlabeled: Tensor
    unlabeled_truth: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits_split(labels_per_class: int, seed: int) -> DigitsSplit:
    """Split scikit-learn's 1,797 digits for a seed, and keep the labels of a few of each class.

    197 images are to select on and 400 to report on, drawn with the classes in proportion.

    Args:
        labels_per_class: labeled images of each class, 1 or more.
        seed: from 0 to 2³² − 1. With one seed, the parts for fewer labels lie within those for
            more.

    >>> split = load_digits_split(labels_per_class=4, seed=0)
    >>> len(split.labeled[0]), len(split.unlabeled), len(split.validation[0]), len(split.test[0])
    (40, 1160, 197, 400)
    """
    # The import takes a second, and only the digits need it.
    with needed_for("the digits of scikit-learn"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    other_rows, test_rows = train_test_split(
        range(len(labels)), test_size=400, stratify=labels, random_state=seed
    )
    train_rows, validation_rows = train_test_split(
        other_rows, test_size=197, stratify=labels[other_rows], random_state=seed
    )
    train = torch.tensor(train_rows)
    fewest = int(labels[train].bincount(minlength=10).min())
    if not 1 <= labels_per_class <= fewest:
        raise MetaplError(
            f"labels_per_class is {labels_per_class}; expected 1 to {fewest}, as the smallest "
            "class has."
        )
    # The split comes shuffled, so the first of each class are a random choice.
    is_labeled = torch.zeros(len(train), dtype=torch.bool)
    for label in range(10):
        is_labeled[(labels[train] == label).nonzero()[:labels_per_class, 0]] = True
    labeled_rows = train[is_labeled]
    unlabeled_rows = train[~is_labeled]
    return DigitsSplit(
        labeled=(images[labeled_rows], labels[labeled_rows]),
        unlabeled=images[unlabeled_rows],
        unlabeled_truth=labels[unlabeled_rows],
        validation=(images[validation_rows], labels[validation_rows]),
        test=(images[test_rows], labels[test_rows]),
    )
