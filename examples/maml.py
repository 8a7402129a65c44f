"""What maml_sinusoids.py and maml_digits.py share.

A start from which five steps fit a new task, learned and judged.
"""

import copy

import torch
from torch import nn
from torch.func import functional_call, vmap

import metapl

TASKS = 25
STEPS = 5


class EachTask(nn.Module):
    """A copy of a network for each task, as one student.

    (tasks, examples, ...) to (tasks, examples, ...).
    """

    def __init__(self, network):
        super().__init__()
        self.names, weights = zip(*network.named_parameters(), strict=True)
        self.weights = nn.ParameterList(p.detach().repeat(TASKS, *[1] * p.ndim) for p in weights)
        self.run = vmap(lambda weights, x: functional_call(network, weights, (x,)))

    def forward(self, x):
        return self.run(dict(zip(self.names, self.weights, strict=True)), x)


class Tasks(metapl.problems.EqualWeights):
    """A task stands where others have an example.

    A subclass draws tasks, and has losses and scores (tasks,).
    """

    def inner_loss(self, outputs, signal, batch, params=None):
        # metapl takes the mean over tasks, and the loss is their sum.
        return TASKS * signal.value * self.losses(outputs, batch[1])

    def outer_loss(self, outputs, batch):
        return self.losses(outputs, batch[1]).mean()


def learn(student, problem, rounds, rate):
    """Take a step of Adam a round, on the loss after the steps of SGD on 25 tasks."""
    adam = torch.optim.Adam(student.parameters(), 0.003)
    sgd = torch.optim.SGD(student.parameters(), rate)
    for _ in range(rounds):
        few, many = problem.draw()
        gradient = metapl.hypergradient(
            None,
            student,
            outer=many,
            inner=metapl.Lookahead([few] * STEPS),
            problem=problem,
            inner_optimizer=sgd,
            wrt="start",
        )
        for name, p in student.named_parameters():
            # The copies stay one start.
            p.grad = gradient.start[name].sum(0, keepdim=True).expand_as(p)
        adam.step()


def score(student, problem, rate, new=True):
    """Return the mean over 250 tasks, after the steps of SGD on each."""
    scores = []
    for _ in range(10):
        (x, y), (test, truth) = problem.draw(new)
        tuned = copy.deepcopy(student)
        sgd = torch.optim.SGD(tuned.parameters(), rate)
        for _ in range(STEPS):
            sgd.zero_grad()
            problem.losses(tuned(x), y).sum().backward()
            sgd.step()
        scores.append(problem.score(tuned(test), truth).mean().item())
    return sum(scores) / len(scores)
