"""MetaPseudoLabelsClassifier comes out on tables of few labels.

Beside its own control, and beside the labels alone.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from trainings import DATA_SETS, SEEDS, Comparison, above_chance, check_all, near, one_thread

from metapl.sklearn import MetaPseudoLabelsClassifier

LABELED = {"digits": 100, "wine": 15, "breast_cancer": 20}
"""How many rows keep their label, the same number of each class."""


@dataclass(frozen=True)
class Rows:
    """The rows of a seed.

    Those to learn from, most of whose labels are -1, and those to test on.
    """

    inputs: np.ndarray
    labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


@cache
def rows_of_seed(data: str, seed: int) -> Rows:
    bunch = DATA_SETS[data].load()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    inputs = bunch.data[order]
    truth = bunch.target[order]
    train = len(truth) - DATA_SETS[data].test
    classes = len(np.unique(truth))
    labels = np.full(train, -1)
    for label in range(classes):
        kept = np.flatnonzero(truth[:train] == label)[: LABELED[data] // classes]
        labels[kept] = label
    return Rows(inputs[:train], labels, test_inputs=inputs[train:], test_labels=truth[train:])


Seeds = tuple[int, ...]


def mean_accuracy(data: str, mode: str, seeds: Seeds) -> float:
    accuracies: list[float] = []
    with one_thread():
        for seed in seeds:
            rows = rows_of_seed(data, seed)
            classifier = MetaPseudoLabelsClassifier(mode=mode, random_state=seed)
            classifier.fit(rows.inputs, rows.labels)
            accuracies.append(classifier.score(rows.test_inputs, rows.test_labels))
    return statistics.fmean(accuracies)


@cache
def without_feedback(data: str, seeds: Seeds) -> float:
    return mean_accuracy(data, "none", seeds)


def on_labeled(data: str, seeds: Seeds) -> float:
    """Return the accuracy of logistic regression on the rows that have a label."""
    accuracies: list[float] = []
    for seed in seeds:
        rows = rows_of_seed(data, seed)
        has_label = rows.labels != -1
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        plain.fit(rows.inputs[has_label], rows.labels[has_label])
        accuracies.append(plain.score(rows.test_inputs, rows.test_labels))
    return statistics.fmean(accuracies)


def comparisons(data: str, mode: str, seeds: Seeds) -> Iterator[Comparison]:
    """Train, and yield what the classifier is held against."""
    accuracy = mean_accuracy(data, mode, seeds)
    frequent = [np.bincount(rows_of_seed(data, seed).test_labels).max() for seed in seeds]
    yield above_chance("classifier", accuracy, statistics.fmean(frequent) / DATA_SETS[data].test)
    yield near("classifier and its mode none", accuracy, without_feedback(data, seeds))
    yield near(
        "classifier and logistic regression on the labeled rows", accuracy, on_labeled(data, seeds)
    )


TABLES = [
    *itertools.product(
        ["wine", "breast_cancer", "digits"], ["forward", "reinforce", "loss_difference"]
    )
]


def test_the_classifier_comes_out_for_a_seed() -> None:
    check_all(comparisons("breast_cancer", "forward", seeds=(0,)))


@pytest.mark.long
@pytest.mark.parametrize(("data", "mode"), TABLES)
def test_the_classifier_comes_out(data: str, mode: str) -> None:
    check_all(comparisons(data, mode, SEEDS))
