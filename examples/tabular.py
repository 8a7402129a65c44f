"""Five labels a class on two tables, beside logistic regression on the same labels.

    python examples/tabular.py

    breast cancer: 569 tumours, 30 measurements, 2 classes; wine: 178 wines, 13 measurements, 3
    classes (scikit-learn)

Each seed draws a test set (30 %), the labeled rows and the weights anew; the rest of the rows is
unlabeled. All is standardized by the mean and deviation of the rows that may be seen in training,
labeled or not. The settings were chosen on seeds 1000-1019. On seeds 0-11 (``--seeds 0-11``, about
a minute of one core) logistic regression, MPL and the same loop without feedback have 90.8, 92.5
and 92.5 % on breast cancer, 95.4, 97.2 and 97.2 % on wine: none of the gain is shown to come from
the feedback. The same network on the labels alone is not run here (docs/something-simpler.md).
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import metapl
from metapl.metrics import paired_test

# The noise of the strong view, in standard deviations of each measurement.
NOISE = 0.5
METHODS = ("logistic regression", "MPL", "MPL's teacher", "no feedback")
Rows = tuple[Tensor, Tensor]


def split(table: str, labels_per_class: int, seed: int) -> tuple[Rows, Tensor, Rows]:
    """Return labeled rows, all rows for training, and a test set, standardized."""
    x, y = {"breast cancer": load_breast_cancer, "wine": load_wine}[table](return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(order, [len(x) * 3 // 10])
    few = np.concatenate([train[y[train] == k][:labels_per_class] for k in np.unique(y)])
    x = torch.tensor((x - x[train].mean(0)) / x[train].std(0), dtype=torch.float32)
    labels = torch.tensor(y, dtype=torch.int64)
    return (x[few], labels[few]), x[train], (x[test], labels[test])


def views(rows: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of 64 rows as they are, and the same with noise."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        weak = rows[torch.randint(len(rows), (64,), generator=draw)]
        yield weak, weak + NOISE * torch.randn(weak.shape, generator=draw)


def train(few: Rows, rows: Tensor, seed: int, mode: str) -> metapl.BilevelTrainer:
    """Train by Meta Pseudo Labels, or with mode "none" by the same loop without feedback."""
    torch.manual_seed(seed)
    classes = int(few[1].max()) + 1
    teacher, student = (metapl.models.mlp([rows.shape[1], 64, classes]) for _ in range(2))
    optimizers = [
        torch.optim.SGD(
            network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02
        )
        for network in (student, teacher)
    ]
    trainer = metapl.BilevelTrainer(
        teacher, student, mode, inner_optimizer=optimizers[0], outer_optimizer=optimizers[1]
    )
    trainer.fit([few], views(rows, seed), steps=300, progress=False)
    return trainer


def accuracies(table: str, labels_per_class: int, seed: int) -> list[float]:
    """Test accuracy in % of each of the METHODS."""
    few, rows, (x, y) = split(table, labels_per_class, seed)
    plain = LogisticRegression(max_iter=5000).fit(*few).score(x, y)
    mpl, without = (train(few, rows, seed, mode) for mode in ("forward", "none"))
    teacher = float((mpl.teacher(x).argmax(1) == y).double().mean())
    return [
        100 * share
        for share in (
            plain,
            mpl.evaluate((x, y)).accuracy,
            teacher,
            without.evaluate((x, y)).accuracy,
        )
    ]


def seeds(text: str) -> range:
    """Return the seeds of "0-9" or of "3"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=seeds, default=range(3), help='such as "0-9"; default 0-2')
    parser.add_argument("--labels-per-class", type=int, default=5)
    args = parser.parse_args()
    for table in ("breast cancer", "wine"):
        rows = [accuracies(table, args.labels_per_class, seed) for seed in args.seeds]
        drawn_by = "one seed" if len(rows) == 1 else f"{len(rows)} seeds"
        print(
            f"{table}, {args.labels_per_class} labels a class, test accuracy in % over {drawn_by}"
        )
        for name, column in zip(METHODS, zip(*rows, strict=True), strict=True):
            test = paired_test(column, [row[0] for row in rows])
            line = f"  {name:<20} {np.mean(column):5.1f}"
            if len(rows) > 1:
                line += f" ± {np.std(column, ddof=1):<4.1f}"
            if name != METHODS[0]:
                line += f" {test.mean:+5.1f}"
                line += "" if len(rows) == 1 else f" ± {test.std:.1f}"
            print(line)
    print("Right: paired difference to logistic regression. ±: standard deviation over seeds.")


if __name__ == "__main__":
    main()
