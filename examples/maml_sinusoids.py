"""MAML: prints the squared error on new sinusoids, after five steps on ten points, by the start.

    python examples/maml_sinusoids.py [SEED ...]

The learned start stands beside a random one, and one that learned the same sinusoids together,
without the five steps: these take the best of four rates, by the new sinusoids themselves. In as
many rounds first-order MAML has 0.73 where this has 0.50, and in 3.2 times as many 0.46
(benchmarks/something_simpler.py).
"""

import statistics
import sys

import torch
from maml import learn, outputs_after_steps
from torch.nn import functional as F

import metapl


class Sinusoids(metapl.problems.EqualWeights):
    def inner_loss(self, outputs, signal, batch, params=None):
        return signal.value * F.mse_loss(outputs, batch[1], reduction="none").mean(1)

    def outer_loss(self, outputs, batch):
        return F.mse_loss(outputs, batch[1])


PROBLEM = Sinusoids()


def draw(tasks):
    """Draw ten points to learn from, ten to judge by, of sinusoids of any height and shift."""
    height = 0.1 + 4.9 * torch.rand(tasks, 1, 1)
    shift = torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, 20, 1) - 5
    y = height * (x - shift).sin()
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def score(network, rate):
    """Return the mean error over 250 sinusoids."""
    few, many = draw(250)
    sgd = torch.optim.SGD(network.parameters(), rate)
    outputs = outputs_after_steps(network, sgd, few, many, problem=PROBLEM)
    return F.mse_loss(outputs, many[1]).item()


def errors(seed, rounds=500):
    torch.manual_seed(seed)
    start, together, learned = (metapl.models.mlp([1, 40, 40, 1]) for _ in range(3))
    adam = torch.optim.Adam(together.parameters(), 0.003)
    for _ in range(rounds):
        _, (x, y) = draw(25)
        adam.zero_grad()
        F.mse_loss(together(x.reshape(-1, 1)), y.reshape(-1, 1)).backward()
        adam.step()
    adam = torch.optim.Adam(learned.parameters(), 0.003)
    sgd = torch.optim.SGD(learned.parameters(), 0.01)
    learn(learned, adam, sgd, (draw(25) for _ in range(rounds)), problem=PROBLEM)
    rates = 0.001, 0.003, 0.01, 0.03
    error_of_start = min(score(start, rate) for rate in rates)
    error_of_together = min(score(together, rate) for rate in rates)
    return error_of_start, error_of_together, score(learned, 0.01)


if __name__ == "__main__":
    columns = zip(*(errors(seed) for seed in map(int, sys.argv[1:] or range(5))), strict=True)
    for name, column in zip(("random", "trained together", "learned"), columns, strict=True):
        mean = statistics.fmean(column)
        print(f"{name}: error {mean:.2f} ({min(column):.2f} to {max(column):.2f})")
