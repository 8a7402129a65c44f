"""Learning to reweight: a batch's weights are what one gradient step makes of zero; no teacher.

    python examples/learning_to_reweight.py [SEED ...] [--steps N]

Measured on seeds 0-9, accuracy less that of plain training on the same data: +0.8 ± 1.5 points with
symmetric noise (92.8 and 92.1 %), +6.6 ± 2.4 with asymmetric noise (93.8 and 87.2 %); ±: standard
deviation. Settings were chosen on seeds 100-102. It helps where all wrong labels of a class are the
same one; with symmetric noise no difference is shown.
"""

from noisy_digits import Digits, compare, fit

import metapl
from metapl.problems import LearningToReweight


def train(digits: Digits, steps: int) -> metapl.BilevelTrainer:
    student, optimizer = digits.student()
    trainer = metapl.BilevelTrainer(
        # Nothing is learned but the student.
        None,
        student,
        "forward",
        problem=LearningToReweight(),
        inner_optimizer=optimizer,
    )
    return fit(trainer, [digits.trusted], digits.noisy_batches(), steps)


if __name__ == "__main__":
    compare("LearningToReweight", train)
