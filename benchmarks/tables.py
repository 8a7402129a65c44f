"""The classifiers for tables beside scikit-learn's own: few or wrong labels, at their defaults.

    python benchmarks/tables.py                            # minutes of one core; goes on
    python benchmarks/tables.py --write benchmarks/results/tables.md     # the tables into the page

Each seed draws test rows (40 %), labels and weights anew. All arms get the same standardized rows
and labels. Nothing was tuned on these three problems: the settings were looked at on moons, wine,
breast cancer and ``make_classification``. The committed rows are of a second run, as the first drew
the training rows wrongly. scikit-learn's classifiers have their defaults, but for what
:func:`few_labels` and :func:`plain` show.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from harness import RESULTS, Row, arguments, environment, every, go_on, grid, parsed, read, show
from sklearn.datasets import load_digits, load_iris, make_gaussian_quantiles
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.semi_supervised import LabelSpreading, SelfTrainingClassifier

from metapl.metrics import paired_test
from metapl.sklearn import MetaPseudoLabelsClassifier, MetaReweightedClassifier

RAW = RESULTS / "tables.jsonl"
PROBLEMS = ("digits", "iris", "quantiles")
# Labels of a class, the share of wrong labels, that of trusted ones.
FEW = 5
WRONG = 0.3
TRUSTED = 0.1
OWN = {
    "few labels": "Meta Pseudo Labels",
    "any wrong class": "reweighted",
    "the next class": "reweighted",
}
BESIDE = {
    "few labels": f"{FEW} labels of each class, all other rows unlabeled",
    "any wrong "
    "class": f"{WRONG:.0%} of the labels replaced by any other class, {TRUSTED:.0%} of each class "
    "trusted",
    "the next "
    "class": f"{WRONG:.0%} of the labels replaced by the next class, {TRUSTED:.0%} of each class "
    "trusted",
}


def drawn(problem: str, seed: int) -> list[np.ndarray]:
    """Return standardized rows and classes, to train and to test on."""
    if problem == "quantiles":
        X, y = make_gaussian_quantiles(n_samples=600, n_features=10, n_classes=3, random_state=seed)
    else:
        X, y = {"digits": load_digits, "iris": load_iris}[problem](return_X_y=True)
    rows, test, y, truth = train_test_split(
        X, y, train_size=min(600, len(y) * 6 // 10), random_state=seed, stratify=y
    )
    scaler = StandardScaler().fit(rows)
    return [scaler.transform(rows), y, scaler.transform(test), truth]


def some_of_each(y: np.ndarray, share: float | int, seed: int) -> np.ndarray:
    """Return a mask of so many rows of each class, or of that share of it."""
    order = np.random.default_rng(seed).permutation(len(y))
    mask = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = order[y[order] == label]
        mask[rows[: share if share >= 1 else round(share * len(rows))]] = True
    return mask


def few_labels(
    X: np.ndarray, y: np.ndarray, seed: int, **options: Any
) -> Iterator[tuple[str, Any]]:
    """Yield each arm, fitted to few labels."""
    is_labeled = some_of_each(y, FEW, seed)
    labels = np.where(is_labeled, y, -1)
    yield (
        "Meta Pseudo Labels",
        MetaPseudoLabelsClassifier(random_state=seed, **options).fit(X, labels),
    )
    yield (
        "the same without feedback",
        MetaPseudoLabelsClassifier(random_state=seed, mode="none", **options).fit(X, labels),
    )
    regression = LogisticRegression(max_iter=2000)
    yield "SelfTraining(LogisticRegression)", SelfTrainingClassifier(regression).fit(X, labels)
    yield "LabelSpreading(kernel='knn')", LabelSpreading(kernel="knn").fit(X, labels)
    yield from plain(X[is_labeled], y[is_labeled], seed)


def plain(X: np.ndarray, y: np.ndarray, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield what learns from labels alone, as they are."""
    yield "LogisticRegression", LogisticRegression(max_iter=2000).fit(X, y)
    yield "RandomForestClassifier", RandomForestClassifier(random_state=seed).fit(X, y)
    yield "MLPClassifier, 64 units", MLPClassifier(64, max_iter=500, random_state=seed).fit(X, y)


def wrong_labels(
    X: np.ndarray, y: np.ndarray, seed: int, kind: str, **options: Any
) -> Iterator[tuple[str, Any]]:
    """Yield each arm, fitted to wrong labels."""
    draw = np.random.default_rng(seed)
    classes = y.max() + 1
    trusted = some_of_each(y, TRUSTED, seed)
    other = (y + (1 if kind == "the next class" else draw.integers(1, classes, len(y)))) % classes
    noisy_labels = np.where((draw.random(len(y)) < WRONG) & ~trusted, other, y)
    reweighted = MetaReweightedClassifier(random_state=seed, **options).fit(
        X, noisy_labels, trusted=trusted
    )
    yield "reweighted", reweighted
    forest = RandomForestClassifier(random_state=seed).fit(
        X, noisy_labels, sample_weight=reweighted.weights_
    )
    yield "RandomForestClassifier with its `weights_`", forest
    yield (
        "LogisticRegression, trusted rows alone",
        LogisticRegression(max_iter=2000).fit(X[trusted], y[trusted]),
    )
    yield from plain(X, noisy_labels, seed)


def row_of(seed: int, labels: str, problem: str, **options: Any) -> Row:
    """Return the accuracy of each arm."""
    X, y, test, truth = drawn(problem, seed)
    few = labels == "few labels"
    begun = time.process_time()
    arms = few_labels(X, y, seed, **options) if few else wrong_labels(X, y, seed, labels, **options)
    accuracies = {name: round(100 * classifier.score(test, truth), 2) for name, classifier in arms}
    return {
        "accuracy": accuracies,
        "seconds": round(time.process_time() - begun, 1),
        "made_with": environment(),
    }


def table(rows: Sequence[Row]) -> str:
    """Return a table for each kind of labels, of the seeds that all of it has."""
    problems = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
    accuracy_of = {(row["labels"], row["problem"], row["seed"]): row["accuracy"] for row in rows}
    cases = [*itertools.product(OWN, problems)]
    seeds = sorted(
        s for s in {row["seed"] for row in rows} if all((*case, s) in accuracy_of for case in cases)
    )
    parts = []
    for labels, our_arm in OWN.items():
        lines = []
        for arm in accuracy_of[labels, problems[0], seeds[0]]:
            cells = []
            for problem in problems:
                rows_of_problem = [accuracy_of[labels, problem, seed] for seed in seeds]
                scores = [accuracies[arm] for accuracies in rows_of_problem]
                our_scores = [accuracies[our_arm] for accuracies in rows_of_problem]
                test = paired_test(our_scores, scores)
                beside = (
                    f" ({test.interval[0]:+.1f} to {test.interval[1]:+.1f})"
                    if test.interval
                    else ""
                )
                cells.append(f"{np.mean(scores):.1f}{beside}")
            lines.append([arm, *cells])
        parts.append(f"**{BESIDE[labels]}**\n\n{grid(['test accuracy in %', *problems], lines)}")
    return "\n\n".join(parts)


def main() -> None:
    args = parsed(arguments(__doc__, RAW))
    problems, seeds = (PROBLEMS[1:2], 2) if args.miniature else (PROBLEMS, 5)
    jobs = every(seed=tuple(range(seeds)), labels=(*OWN,), problem=problems)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if args.runs:
            go_on(args.out, jobs, partial(row_of, **{"steps": 2} if args.miniature else {}))
    show(args.write, "tables", table(read(args.out)))


if __name__ == "__main__":
    main()
