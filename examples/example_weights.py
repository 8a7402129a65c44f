"""Data hyper-cleaning: each training example has a learned weight of its own.

    python examples/example_weights.py [SEED ...] [--steps N]

Measured on seeds 0-9, accuracy less that of plain training on the same data: +0.3 ± 1.1 points with
symmetric noise (92.4 and 92.1 %), +2.8 ± 1.6 with asymmetric noise (89.9 and 87.2 %); ±: standard
deviation. Settings were chosen on seeds 100-102. It helps where all wrong labels of a class are the
same one; with symmetric noise no difference is shown.
"""

import torch
from noisy_digits import Digits, compare, fit

import metapl
from metapl.problems import ExampleWeights, Table


def train(digits: Digits, steps: int) -> metapl.BilevelTrainer:
    student, optimizer = digits.student()
    examples = len(digits.x)
    # An index -> a number, whose sigmoid is the weight: 1/2 at first.
    table = Table(torch.zeros(examples))
    trainer = metapl.BilevelTrainer(
        table,
        student,
        "forward",
        problem=ExampleWeights(),
        inner_optimizer=optimizer,
        outer_optimizer=torch.optim.Adam(table.parameters(), lr=0.4),
    )
    return fit(
        trainer,
        [digits.trusted],
        digits.noisy_batches(digits.labels, torch.arange(examples)),
        steps,
    )


if __name__ == "__main__":
    compare("ExampleWeights", train)
