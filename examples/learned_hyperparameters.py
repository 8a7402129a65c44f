"""Hyperparameters learned through whole trainings: weight decays, label smoothing, augmentations.

    python examples/learned_hyperparameters.py

A network learns from 100 digits in 200 steps. The training begins again in each round, its loss on
197 other digits is differentiated through all of its steps, and Adam moves the logarithms of six
numbers.
"""

import torch
from torch import nn
from torch.nn import functional as F

import metapl
from metapl.pictures import load_digits_split

STEPS = 200
BATCH = 50
# Decay: of each layer.
START = {
    "decay": [0.001, 0.001, 0.001],
    "smoothing": [0.05],
    "noise": [0.1],
    "shift": [0.1],
}


class Hyperparameters(metapl.problems.BilevelProblem):
    """The signal is a dict of tensors that all examples share."""

    signal_has_rows = False

    def signal(self, teacher, batch, student_outputs, *, generator):
        # Between 0 and 1.
        return metapl.Signal({name: log.exp().tanh() for name, log in teacher.items()})

    def student_input(self, batch, signal):
        x = batch[0]
        # Pictures that are moved by a pixel to the right, down, to the left and up, (4, B, ...).
        by_a_pixel = torch.stack([x.roll(1, -1), x.roll(1, -2), x.roll(-1, -1), x.roll(-1, -2)])
        moved = by_a_pixel[torch.randint(4, x.shape[:1]), torch.arange(len(x))]
        return x + signal["shift"] * (moved - x) + signal["noise"] * torch.randn_like(x)

    def inner_loss(self, outputs, signal, batch, params=None):
        of_label = F.cross_entropy(outputs, batch[1], reduction="none")
        of_any_class = -outputs.log_softmax(1).mean(1)
        squares = torch.stack([p.square().sum() for p in params.values() if p.ndim > 1])
        smoothed = of_label + signal["smoothing"] * (of_any_class - of_label)
        return smoothed + signal["decay"] @ squares / 2

    def outer_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])


def falling(step):
    return 1 - step / STEPS


def begin(split, seed):
    """Return the network, optimizer and batches with which every training of a seed begins."""
    drawn = torch.randint(100, (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    layers = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    student = nn.Sequential(nn.Flatten(), *layers)
    batches = [tuple(t[i] for t in split.labeled) for i in drawn]
    return student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9), batches


def learn(split, seed, rounds=8, rate=0.3):
    """Yield each round's validation loss, the logarithms of the six, and the network trained so."""
    logs = nn.ParameterDict({name: torch.tensor(values).log() for name, values in START.items()})
    adam = torch.optim.Adam(logs.parameters(), lr=rate, betas=(0.5, 0.9))
    for _ in range(rounds):
        student, optimizer, batches = begin(split, seed)
        factors = [falling(step) for step in range(len(batches))]
        rates = 0.1 * torch.tensor(factors, dtype=torch.float64)[:, None]
        gradient = metapl.hypergradient(
            logs,
            student,
            outer=split.validation,
            inner=metapl.Lookahead(batches, settings={"lr": rates}),
            problem=Hyperparameters(),
            inner_optimizer=optimizer,
        )
        student.load_state_dict(gradient.student_params)
        yield (
            gradient.outer_loss.item(),
            {name: log.detach().clone() for name, log in logs.items()},
            student,
        )
        for name, log in logs.items():
            log.grad = gradient.grads[name]
        adam.step()


if __name__ == "__main__":
    for loss, logs, _ in learn(load_digits_split(10, seed=0), seed=0):
        six = Hyperparameters().signal(logs, None, None, generator=None).value
        values = ", ".join(
            f"{name} {' '.join(f'{v:.2g}' for v in value)}" for name, value in six.items()
        )
        print(f"validation loss {loss:.3f}; {values}")
