"""What learned_start.py trains on.

Digits at angles, ordinary training, and the accuracy after fine-tuning.
"""

import time

import torch
from maml import outputs_after_steps
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


def draw_tasks(x, y, tasks, sizes):
    """Draw digits at one angle for each task, (tasks, B, 1, 8, 8), in parts of these sizes."""
    of_tasks = [draw(x, y, 1, sizes) for _ in range(tasks)]
    return [
        tuple(torch.stack(tensors) for tensors in zip(*part, strict=True))
        for part in zip(*of_tasks, strict=True)
    ]


def accuracy(network, x, y, rate):
    """Return the mean over 10 angles, at each after 20 steps on 20 digits."""
    few, many = draw_tasks(x, y, 10, [20, 777])
    sgd = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    outputs = outputs_after_steps(network, sgd, few, many, steps=20)
    return 100 * (outputs.argmax(2) == many[1]).float().mean().item()
