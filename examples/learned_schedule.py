"""A schedule of learning rate and weight decay for each layer, learned through whole trainings.

    python examples/learned_schedule.py

A network learns from 100 digits in 100 steps. In each round its loss on 197 other digits is
differentiated in the two settings of each step and layer, and Adam moves their logarithms at the
start, the middle and the end of the training. A round may be far worse than those before it. The
round to take is that with the smallest validation loss; the last lines have its test accuracy, and
that of the first round.
"""

import torch
from torch import nn
from torch.nn import functional as F

import metapl
from metapl.pictures import load_digits_split
from metapl.problems import EqualWeights

STEPS = 100
BATCH = 50
# (knots, layers).
START = {
    "lr": torch.full((3, 3), 0.1).log(),
    "weight_decay": torch.full((3, 3), 0.001).log(),
}


def settings(logs):
    """Return each step's and layer's settings, (STEPS, layers), linear between the logs' knots."""
    lines = {
        name: F.interpolate(log.T[None], STEPS, mode="linear", align_corners=True)
        for name, log in logs.items()
    }
    return {name: line[0].T.exp() for name, line in lines.items()}


def begin(split, seed):
    """Return the network, optimizer and batches with which every training of a seed begins."""
    drawn = torch.randint(100, (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    student = metapl.models.mlp([64, 64, 64, 10], nn.GELU)
    layers = [{"params": layer.parameters()} for layer in student if isinstance(layer, nn.Linear)]
    return (
        student,
        torch.optim.SGD(layers, lr=0.1, momentum=0.9),
        [tuple(t[i] for t in split.labeled) for i in drawn],
    )


def learn(split, seed, rounds=8, rate=0.3):
    """Yield each round's validation loss, the logarithms, and the network trained with them."""
    logs = {name: log.clone().requires_grad_() for name, log in START.items()}
    adam = torch.optim.Adam(logs.values(), lr=rate, betas=(0.5, 0.9))
    for _ in range(rounds):
        student, optimizer, batches = begin(split, seed)
        learned = settings(logs)
        gradient = metapl.hypergradient(
            None,
            student,
            outer=split.validation,
            inner=metapl.Lookahead(batches, settings=learned),
            problem=EqualWeights(),
            inner_optimizer=optimizer,
            wrt=(*learned,),
        )
        student.load_state_dict(gradient.student_params)
        yield (
            gradient.outer_loss.item(),
            {name: log.detach().clone() for name, log in logs.items()},
            student,
        )
        adam.zero_grad()
        for name, t in learned.items():
            t.backward(gradient.settings[name].to(t))
        adam.step()


def accuracy(student, labeled):
    """Return the accuracy in %."""
    x, y = labeled
    with torch.no_grad():
        return 100 * (student(x).argmax(1) == y).double().mean().item()


def main():
    split = load_digits_split(10, seed=0)
    rounds = []
    for loss, logs, student in learn(split, seed=0):
        rounds.append((loss, accuracy(student, split.test)))
        print(
            f"round {len(rounds)}: validation loss {loss:.3f}; at start, middle and end of the "
            "three layers"
        )
        for name, log in logs.items():
            print(
                f"  {name}: "
                f"{'; '.join(' '.join(f'{value:.2g}' for value in layer) for layer in log.T.exp())}"
            )
    best = min(range(len(rounds)), key=lambda index: rounds[index][0])
    loss, reached = rounds[best]
    print(f"best is round {best + 1}: validation loss {loss:.3f}, test accuracy {reached:.1f} %")
    print(f"round 1, whose settings are the first ones: test accuracy {rounds[0][1]:.1f} %")


if __name__ == "__main__":
    main()
