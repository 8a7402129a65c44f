"""Hyperparameters that are learned through whole trainings: weight decays, label smoothing, and two augmentations.

    python examples/learned_hyperparameters.py [SEED ...] [--rounds N]

A network learns from 100 digits in 200 steps. The teacher holds six numbers: the weight decay of each of three layers,
label smoothing, and how much noise and shift the images get. The training begins again in each round, its loss on 197
other digits is differentiated through all of its steps, and Adam moves the six.

docs/hyperparameters.md compares this with random search, over several seeds.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import metapl
from metapl.data import load_digits_split

STEPS, BATCH = 200, 50
START = torch.tensor([0.001, 0.001, 0.001, 0.05, 0.1, 0.1]).log()


class Six(nn.Module):
    """The hyperparameters by name, made of their logarithms."""

    def __init__(self, logs):
        super().__init__()
        self.logs = nn.Parameter(logs.clone())

    def forward(self):
        decay, smoothing, noise, shift = self.logs.exp().split([3, 1, 1, 1])
        return {"decay": decay, "smoothing": smoothing.tanh(), "noise": noise, "shift": shift.tanh()}


class Hyperparameters(metapl.problems.Problem):
    """The signal is a dict of tensors that all examples share."""

    teacher_reads_inputs = False
    signal_has_rows = False

    def signal(self, teacher, batch, student_outputs, *, generator):
        return metapl.Signal(teacher())

    def student_input(self, batch, signal):
        x = batch[0]
        by_a_pixel = torch.stack([x.roll(by, dim) for by in (1, -1) for dim in (-1, -2)])
        moved = by_a_pixel[torch.randint(4, x.shape[:1]), torch.arange(len(x))]
        return x + signal["shift"] * (moved - x) + signal["noise"] * torch.randn_like(x)

    def inner_loss(self, outputs, signal, batch, params=None):
        given, any_class = F.cross_entropy(outputs, batch[1], reduction="none"), -outputs.log_softmax(1).mean(1)
        squares = torch.stack([p.square().sum() for p in params.values() if p.ndim > 1])
        return given + signal["smoothing"] * (any_class - given) + signal["decay"] @ squares / 2

    def outer_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])


def begin(split, seed):
    """The network, optimizer and batches with which every training of a seed begins, and the draws of its images."""
    generator = torch.Generator().manual_seed(seed)
    batches = [tuple(t[i] for t in split.labeled) for i in torch.randint(100, (STEPS, BATCH), generator=generator)]
    torch.manual_seed(seed)
    layers = nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    student = nn.Sequential(nn.Flatten(), *layers)
    return student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9), batches


def falling(step):
    return 1 - step / STEPS


def learn(split, seed, rounds, rate=0.3):
    """In each round: validation loss, the logarithms of the six, and the network that was trained with them."""
    six = Six(START)
    adam = torch.optim.Adam(six.parameters(), lr=rate, betas=(0.5, 0.9))
    for _ in range(rounds):
        student, optimizer, batches = begin(split, seed)
        found = metapl.hypergradient(
            six,
            student,
            outer=split.validation,
            inner=metapl.Lookahead(batches, schedule=falling),
            problem=Hyperparameters(),
            inner_optimizer=optimizer,
        )
        student.load_state_dict(found.student_params)
        yield found.outer_loss.item(), six.logs.detach().clone(), student
        six.logs.grad = found.grads["logs"]
        adam.step()


@torch.no_grad()
def judged(student, split):
    """Loss, and accuracy in %, on the digits that neither training nor validation has seen."""
    x, y = torch.cat([split.test[0], split.unlabeled]), torch.cat([split.test[1], split.unlabeled_truth])
    return F.cross_entropy(student(x), y).item(), 100 * (student(x).argmax(1) == y).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    for seed in args.seeds:
        split = load_digits_split(10, seed)
        rounds = list(learn(split, seed, args.rounds))
        for name, (loss, logs, student) in {"first": rounds[0], "best": min(rounds, key=lambda one: one[0])}.items():
            six = ", ".join(f"{key} {' '.join(f'{v:.2g}' for v in t)}" for key, t in Six(logs)().items())
            test = "{:.3f}, accuracy {:.1f} %".format(*judged(student, split))
            print(f"seed {seed}, {name} round: validation loss {loss:.3f}; test loss {test}; {six}")


if __name__ == "__main__":
    main()
