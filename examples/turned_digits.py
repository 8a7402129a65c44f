"""What learned_start.py trains on.

Digits at angles, ordinary training, and the accuracy after fine-tuning.
"""

import copy
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F


def split():
    """Return 1,000 digits (x, y) and the others."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.view(-1, 1, 8, 8).float() / 16
    order = torch.randperm(len(x))
    return [(x[rows], y[rows]) for rows in (order[:1000], order[1000:])]


def draw(x, y, angles, sizes):
    """Draw digits (B, 1, 8, 8) at so many angles, in parts of these sizes."""
    rows = torch.randperm(len(x))[: sum(sizes)]
    turn = (2 * torch.pi * torch.rand(angles)).repeat_interleave(len(rows) // angles)
    turns = torch.stack(
        [turn.cos(), -turn.sin(), 0 * turn, turn.sin(), turn.cos(), 0 * turn], 1
    ).view(-1, 2, 3)
    turned = F.grid_sample(
        x[rows], F.affine_grid(turns, x[rows].shape, align_corners=False), align_corners=False
    )
    return [*zip(turned.split(sizes), y[rows].split(sizes), strict=True)]


def fit(network, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(network(x), y).backward()
    optimizer.step()


def pretrain(network, x, y, seconds):
    adam = torch.optim.Adam(network.parameters(), 0.003)
    since = time.process_time()
    while time.process_time() - since < seconds:
        fit(network, adam, *draw(x, y, 100, [100])[0])


def accuracy(network, x, y, rate):
    """Return the mean over 10 angles, at each after 20 steps on 20 digits."""
    accuracies = []
    for _ in range(10):
        few, (test, truth) = draw(x, y, 1, [20, len(x) - 20])
        tuned = copy.deepcopy(network)
        sgd = torch.optim.SGD(tuned.parameters(), rate, momentum=0.9)
        for _ in range(20):
            fit(tuned, sgd, *few)
        is_right = tuned(test).argmax(1) == truth
        accuracies.append(100 * is_right.float().mean().item())
    return statistics.fmean(accuracies)
