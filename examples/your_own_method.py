"""A label method of one's own: a learned trust in each pair of given label and prediction.

    python examples/your_own_method.py [SEED ...] [--steps N]

Measured on seeds 0-9, accuracy less that of plain training on the same data: +0.9 ± 1.2 points with
symmetric noise (93.0 and 92.1 %), +4.1 ± 2.5 with asymmetric noise (91.3 and 87.2 %); ±: standard
deviation. Settings were chosen on seeds 100-102. It helps where all wrong labels of a class are the
same one, and little, if at all, with symmetric noise.
"""

import torch
from noisy_digits import Digits, compare, fit
from torch.nn import functional as F

import metapl
from metapl.problems import Table


class PairWeights(metapl.BilevelProblem):
    """An example's weight is looked up by its label and the student's prediction."""

    def signal(self, teacher, batch, student_outputs, *, generator):
        labels = batch[1]
        predictions = student_outputs.argmax(1)
        return metapl.Signal(teacher(10 * labels + predictions).sigmoid())

    def inner_loss(self, outputs, signal, batch, params=None):
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def default_outer_optimizer(self, teacher):
        return torch.optim.Adam(teacher.parameters(), lr=0.1)


def train(digits: Digits, steps: int) -> metapl.BilevelTrainer:
    student, optimizer = digits.student()
    trust = Table(torch.zeros(10 * 10))
    trainer = metapl.BilevelTrainer(
        trust, student, "forward", problem=PairWeights(), inner_optimizer=optimizer
    )
    return fit(trainer, [digits.trusted], digits.noisy_batches(), steps)


if __name__ == "__main__":
    compare("trust in pairs", train)
