"""Meta Pseudo Labels with networks, data and a loop of one's own: python examples/own_networks.py [SEED ...]

30 of 1,300 digits keep their labels. Printed is the student's accuracy on 497 others, with the teacher's feedback and
without it (mode "none": the same teacher, student, batches and draws).
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import metapl

images, labels = torch.tensor(load_digits().data / 16, dtype=torch.float32), torch.tensor(load_digits().target)


def student_accuracy(mode: str, seed: int, steps: int = 500, feedback_weight: float = 3.0) -> float:
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    few, many, test = order[:30], order[30:1300], order[1300:]
    unlabeled = iter(DataLoader(images[many].repeat(steps // 19 + 1, 1), batch_size=64, shuffle=True))
    teacher, student = (metapl.models.mlp([64, 64, 10]) for _ in range(2))  # or any nn.Module
    inner, outer = SGD(student.parameters(), lr=1.0), SGD(teacher.parameters(), lr=0.06, momentum=0.9)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=inner,
        outer_optimizer=outer,
        teacher_losses=(metapl.CrossEntropy(),),
        feedback_weight=feedback_weight,
    )
    rates = [CosineAnnealingLR(optimizer, steps) for optimizer in (inner, outer)]
    for _, x_u in zip(range(steps), unlabeled, strict=False):
        trainer.step(labeled=(noisy(images[few]), labels[few]), unlabeled=(x_u, noisy(x_u)))  # (weak, strong) view
        for rate in rates:
            rate.step()
    return trainer.evaluate((images[test], labels[test])).accuracy


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + 0.3 * torch.randn_like(x)


for seed in map(int, sys.argv[1:] or ["0"]):
    with_feedback, without = (100 * student_accuracy(mode, seed) for mode in ("forward", "none"))
    print(f"seed {seed}: student's accuracy {with_feedback:.1f} % with feedback, {without:.1f} % without")
