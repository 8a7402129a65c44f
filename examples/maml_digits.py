"""MAML on digits: prints the accuracy, in %, after five steps on a picture of each of three digits.

    python examples/maml_digits.py [SEED ...]

Six digits, drawn by the seed, are known, four are new. The learned start stands beside a random
one, and one that was trained to tell the six, with a last layer of zeros: these take the best of
four rates, by what is printed.
"""

import statistics
import sys
from functools import partial

import torch
from maml import learn, outputs_after_steps
from sklearn.datasets import load_digits
from torch.nn import functional as F

import metapl


def draw(pictures, digits, tasks):
    """Draw a picture of each of three of these digits to learn from, in any order; ten to judge."""
    drawn = []
    for _ in range(tasks):
        three = digits[torch.randperm(len(digits))[:3]]
        drawn.append(torch.stack([pictures[d][torch.randperm(174)[:11]] for d in three], 1))
    # (tasks, 11, 3, 64)
    x = torch.stack(drawn)
    y = torch.arange(3).expand(x.shape[:3])
    return (x[:, 0], y[:, 0]), (x[:, 1:].flatten(1, 2), y[:, 1:].flatten(1, 2))


def score(network, draw, rate):
    """Return the mean accuracy over 250 tasks, in %."""
    few, many = draw(250)
    outputs = outputs_after_steps(network, torch.optim.SGD(network.parameters(), rate), few, many)
    return 100 * (outputs.argmax(2) == many[1]).float().mean().item()


def accuracies(seed, rounds=200):
    torch.manual_seed(seed)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    # Each digit has as many.
    pictures = [x[y == digit][:174].float() / 16 for digit in torch.randperm(10)]
    known, new = (partial(draw, pictures, digits) for digits in torch.arange(10).split([6, 4]))
    start, trained, learned = (metapl.models.mlp([64, 64, 6]) for _ in range(3))
    adam = torch.optim.Adam(trained.parameters(), 0.003)
    x = torch.cat(pictures[:6])
    y = torch.arange(6 * 174)
    for rows in torch.randint(len(x), (500, 100)):
        adam.zero_grad()
        F.cross_entropy(trained(x[rows]), y[rows] // 174).backward()
        adam.step()
    for p in trained[-1].parameters():
        p.data.zero_()
    adam = torch.optim.Adam(learned.parameters(), 0.003)
    sgd = torch.optim.SGD(learned.parameters(), 0.3)
    learn(learned, adam, sgd, (known(25) for _ in range(rounds)))
    rates = 0.03, 0.1, 0.3, 1.0
    for drawn in (new, known):
        yield max(score(start, drawn, rate) for rate in rates)
        yield max(score(trained, drawn, rate) for rate in rates)
        yield score(learned, drawn, 0.3)


if __name__ == "__main__":
    columns = zip(*(accuracies(seed) for seed in map(int, sys.argv[1:] or range(5))), strict=True)
    starts = "random", "trained on six digits", "learned"
    names = [f"{start}, {digits} digits" for digits in ("new", "known") for start in starts]
    for name, column in zip(names, columns, strict=True):
        mean = statistics.fmean(column)
        print(f"{name}: accuracy {mean:.1f} ({min(column):.1f} to {max(column):.1f})")
