"""What the label methods' examples share: digits with wrong labels, plain training, and a table.

Of scikit-learn's digits, drawn anew for each seed, 100 have trusted labels, about 1,100 others have
labels of which 40 % are made wrong, and 400 are to test on. The wrong label is any other class
(symmetric), or the next class, one and the same for all examples of a class (asymmetric).
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import metapl
from metapl.metrics import paired_test
from metapl.pictures import load_digits_split

# The steps on the noisy labels as they are, before a method begins.
WARM_UP = 60


@dataclass(frozen=True)
class Digits:
    """Images with their given labels, and (images, labels) that are trusted and to test on."""

    x: Tensor
    labels: Tensor
    wrong: Tensor
    trusted: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    seed: int

    def noisy_batches(self, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Return batches of 64 images, with their rows of the columns.

        The columns are the given labels, unless others are named.
        """
        return batches(64, self.seed, self.x, *(columns or (self.labels,)))

    def student(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a small network after some steps on the labels as given, and its optimizer."""
        torch.manual_seed(self.seed)
        student = metapl.models.mlp([64, 32, 10])
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        fit(
            metapl.LossTrainer(student, optimizer=optimizer),
            self.noisy_batches(),
            None,
            WARM_UP,
            "constant",
        )
        return student, optimizer


def draw(seed: int, noise: str) -> Digits:
    """Return the digits of a seed, with "symmetric" or "asymmetric" noise."""
    split = load_digits_split(10, seed)
    generator = torch.Generator().manual_seed(seed)
    y = split.unlabeled_truth
    other = torch.randint(1, 10, y.shape, generator=generator) if noise == "symmetric" else 1
    labels = torch.where(torch.rand(len(y), generator=generator) < 0.4, (y + other) % 10, y)
    return Digits(split.unlabeled, labels, labels != y, split.labeled, split.test, seed)


def batches(size: int, seed: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield endless batches of the same rows of each column."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(columns[0]), (size,), generator=generator)
        yield tuple(column[rows] for column in columns)


def fit(trainer: Any, outer: Any, inner: Any, steps: int, schedule: str = "cosine") -> Any:
    # All students have had their steps on the given labels: see ``WARM_UP``.
    trainer.fit(outer, inner, steps=steps, schedule=schedule, first_steps=0, progress=False)
    return trainer


def plain(digits: Digits, steps: int) -> Any:
    """Train on all labels: each batch has 64 noisy ones and the trusted ones."""
    student, optimizer = digits.student()
    batches = (
        tuple(map(torch.cat, zip(batch, digits.trusted, strict=True)))
        for batch in digits.noisy_batches()
    )
    return fit(metapl.LossTrainer(student, optimizer=optimizer), batches, None, steps)


def compare(name: str, train: Callable[[Digits, int], Any]) -> None:
    """Print the test accuracy of a method and of plain training, for the command line's seeds."""
    parser = argparse.ArgumentParser(
        description=f"{name} beside plain training on digits with wrong labels"
    )
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240, help="of each training")
    args = parser.parse_args()
    count = len(args.seeds)
    drawn_by = "one seed, which decides nothing" if count == 1 else f"mean over {count} seeds"
    print(f"test accuracy in %, {drawn_by}; 40 % of the labels are wrong")
    for noise in ("symmetric", "asymmetric"):
        by_method = []
        by_plain = []
        for seed in args.seeds:
            digits = draw(seed, noise)
            by_method.append(100 * train(digits, args.steps).evaluate(digits.test).accuracy)
            by_plain.append(100 * plain(digits, args.steps).evaluate(digits.test).accuracy)
        test = paired_test(by_method, by_plain)
        spread = "" if count == 1 else f" ± {test.std:.1f} (standard deviation)"
        print(
            f"{noise}: {sum(by_method) / count:.1f} by {name}, {sum(by_plain) / count:.1f} by "
            f"plain training, difference {test.mean:+.1f}{spread}"
        )
