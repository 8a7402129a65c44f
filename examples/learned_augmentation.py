"""A learned augmentation: how much noise is added to the images that a student learns from.

    python examples/learned_augmentation.py [SEED ...] [--steps N]

A student learns from 1,100 clean digits and is judged by digits with noise, of which 100 have
trusted labels. The teacher is one number, the noise of the student's images: ``student_input(batch,
signal)`` adds it, and the feedback goes through the images that were made. Beside it: the same
without feedback, from the same start and with the noise that the digits have, which the teacher is
not told; and plain training on clean digits and the 100.

Measured on seeds 10-14, on which nothing was chosen: 72.4 % with learned noise, which went from 0.1
to 0.50; 69.0 % where it stays at 0.1, 74.8 % where it is 0.5 from the start, 64.3 % with plain
training.
"""

import argparse

import torch
from noisy_digits import batches, fit
from torch.nn import functional as F

import metapl
from metapl.pictures import load_digits_split
from metapl.problems import Table

# The standard deviation of the noise on the digits that the student is judged by.
NOISE = 0.5
START = 0.1


class Noise(metapl.problems.BilevelProblem):
    """The signal is the noise's standard deviation, one for all examples."""

    signal_has_rows = False

    def signal(self, teacher, batch, student_outputs, *, generator):
        return metapl.Signal(teacher(torch.zeros(1, dtype=torch.int64)).exp())

    def student_input(self, batch, signal):
        return batch[0] + signal.value * torch.randn_like(batch[0])

    def inner_loss(self, outputs, signal, batch, params=None):
        return F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])


def network(seed):
    torch.manual_seed(seed)
    student = metapl.models.mlp([64, 32, 10])
    return student, torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="*", type=int, default=[10, 11, 12, 13, 14])
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        split = load_digits_split(10, seed)
        generator = torch.Generator().manual_seed(seed)
        (trusted, test) = (
            (x + NOISE * torch.randn(x.shape, generator=generator), y)
            for x, y in (split.labeled, split.test)
        )
        clean = split.unlabeled, split.unlabeled_truth
        row = []
        for mode, start in (("forward", START), ("none", START), ("none", NOISE)):
            student, optimizer = network(seed)
            strength = Table(torch.tensor([start]).log())
            trainer = metapl.BilevelTrainer(
                strength,
                student,
                mode,
                problem=Noise(),
                inner_optimizer=optimizer,
                outer_optimizer=torch.optim.Adam(strength.parameters(), lr=0.03),
            )
            fit(trainer, [trusted], batches(64, seed, *clean), args.steps)
            row += [
                100 * trainer.evaluate(test).accuracy,
                strength(torch.zeros(1, dtype=torch.int64)).exp().item(),
            ]
        student, optimizer = network(seed)
        all_labels = (
            (torch.cat([x, trusted[0]]), torch.cat([y, trusted[1]]))
            for x, y in batches(64, seed, *clean)
        )
        plain = fit(metapl.LossTrainer(student, optimizer=optimizer), all_labels, None, args.steps)
        rows.append([*row, 100 * plain.evaluate(test).accuracy])
    learned, noise, with_start, _, with_noise, _, plain = torch.tensor(rows).mean(0).tolist()
    drawn_by = "one seed" if len(rows) == 1 else f"mean over {len(rows)} seeds"
    print(
        f"test accuracy in % on digits with noise {NOISE}, {drawn_by}: {learned:.1f} with noise "
        f"that was learned ({START} -> {noise:.2f}), {with_start:.1f} with {START}, "
        f"{with_noise:.1f} with {NOISE}, {plain:.1f} with plain training on clean digits and 100 "
        "with noise"
    )


if __name__ == "__main__":
    main()
