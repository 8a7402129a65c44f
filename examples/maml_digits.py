"""MAML on digits: prints the accuracy, in %, after five steps on a picture of each of three digits.

    python examples/maml_digits.py [SEED ...]

Six digits, drawn by the seed, are known, four are new. The learned start stands beside a random
one, and one that was trained to tell the six, with a last layer of zeros: these take the best of
four rates, by what is printed.
"""

import statistics
import sys

import torch
from maml import TASKS, EachTask, Tasks, learn, score
from sklearn.datasets import load_digits
from torch.nn import functional as F

import metapl


class Digits(Tasks):
    def __init__(self):
        x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
        # Of all as many.
        self.pictures = [x[y == digit][:174].float() / 16 for digit in torch.randperm(10)]

    def draw(self, new=False):
        """Draw a picture of each of three digits to learn from, in any order; ten to judge by."""
        tasks = [torch.randperm(4)[:3] + 6 if new else torch.randperm(6)[:3] for _ in range(TASKS)]
        drawn = [
            torch.stack([self.pictures[digit][torch.randperm(174)[:11]] for digit in task], 1)
            for task in tasks
        ]
        x = torch.stack(drawn)  # (tasks, 11, 3, 64)
        y = torch.arange(3).expand(x.shape[:3])
        return (x[:, 0], y[:, 0]), (x[:, 1:].flatten(1, 2), y[:, 1:].flatten(1, 2))

    def losses(self, outputs, y):
        return F.cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)

    def score(self, outputs, y):
        return 100 * (outputs.argmax(2) == y).float().mean(1)


def accuracies(seed, rounds=200):
    torch.manual_seed(seed)
    problem, (start, known, learned) = Digits(), (metapl.models.mlp([64, 64, 6]) for _ in range(3))
    adam, x, y = (
        torch.optim.Adam(known.parameters(), 0.003),
        torch.cat(problem.pictures[:6]),
        torch.arange(6 * 174),
    )
    for rows in torch.randint(len(x), (500, 100)):
        adam.zero_grad()
        F.cross_entropy(known(x[rows]), y[rows] // 174).backward()
        adam.step()
    known[-1].apply(lambda layer: [p.data.zero_() for p in layer.parameters()])
    start, known, learned = map(EachTask, (start, known, learned))
    learn(learned, problem, rounds, rate=0.3)
    for new in (True, False):
        best = [
            max(score(one, problem, rate, new) for rate in (0.03, 0.1, 0.3, 1.0))
            for one in (start, known)
        ]
        yield from (*best, score(learned, problem, 0.3, new))


if __name__ == "__main__":
    columns = zip(*(accuracies(seed) for seed in map(int, sys.argv[1:] or range(5))), strict=True)
    starts = "random", "trained on six digits", "learned"
    for name, found in zip(
        [f"{start}, {on}" for on in ("new", "known") for start in starts], columns, strict=True
    ):
        print(
            f"{name} digits: accuracy {statistics.fmean(found):.1f} ({min(found):.1f} to "
            f"{max(found):.1f})"
        )
