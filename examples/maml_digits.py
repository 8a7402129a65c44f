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
        # Each digit has as many.
        self.pictures = [x[y == digit][:174].float() / 16 for digit in torch.randperm(10)]

    def draw(self, new=False):
        """Draw a picture of each of three digits to learn from, in any order; ten to judge by."""
        tasks = [torch.randperm(4)[:3] + 6 if new else torch.randperm(6)[:3] for _ in range(TASKS)]
        drawn = [
            torch.stack([self.pictures[digit][torch.randperm(174)[:11]] for digit in task], 1)
            for task in tasks
        ]
        # (tasks, 11, 3, 64)
        x = torch.stack(drawn)
        y = torch.arange(3).expand(x.shape[:3])
        return (x[:, 0], y[:, 0]), (x[:, 1:].flatten(1, 2), y[:, 1:].flatten(1, 2))

    def losses(self, outputs, y):
        return F.cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)

    def score(self, outputs, y):
        return 100 * (outputs.argmax(2) == y).float().mean(1)


def accuracies(seed, rounds=200):
    torch.manual_seed(seed)
    problem = Digits()
    start, trained, learned = (metapl.models.mlp([64, 64, 6]) for _ in range(3))
    adam = torch.optim.Adam(trained.parameters(), 0.003)
    x = torch.cat(problem.pictures[:6])
    y = torch.arange(6 * 174)
    for rows in torch.randint(len(x), (500, 100)):
        adam.zero_grad()
        F.cross_entropy(trained(x[rows]), y[rows] // 174).backward()
        adam.step()
    for p in trained[-1].parameters():
        p.data.zero_()
    start, trained, learned = map(EachTask, (start, trained, learned))
    learn(learned, problem, rounds, rate=0.3)
    rates = 0.03, 0.1, 0.3, 1.0
    for new in (True, False):
        yield max(score(start, problem, rate, new) for rate in rates)
        yield max(score(trained, problem, rate, new) for rate in rates)
        yield score(learned, problem, 0.3, new)


if __name__ == "__main__":
    columns = zip(*(accuracies(seed) for seed in map(int, sys.argv[1:] or range(5))), strict=True)
    starts = "random", "trained on six digits", "learned"
    names = [f"{start}, {digits} digits" for digits in ("new", "known") for start in starts]
    for name, column in zip(names, columns, strict=True):
        mean = statistics.fmean(column)
        print(f"{name}: accuracy {mean:.1f} ({min(column):.1f} to {max(column):.1f})")
