"""Meta Pseudo Labels with networks, data and a loop of one's own.

    python examples/own_networks.py [SEED ...]

Two digits of each class keep their labels, 1,180 have none. Printed is the student's accuracy on
400 others with the teacher's feedback and without it (mode "none": the same networks, batches and
views).
"""

import sys

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, RandomSampler

import metapl
from metapl.pictures import ShiftNoiseCutout, load_digits_split

STEPS = 800
FEEDBACK_WEIGHT = 2.0


def student_accuracy(mode: str, seed: int) -> float:
    torch.manual_seed(seed)
    split = load_digits_split(labels_per_class=2, seed=seed)
    view = ShiftNoiseCutout()
    # Each in three views a step.
    x_l, y_l = (t.repeat(3, *[1] * (t.ndim - 1)) for t in split.labeled)
    sampler = RandomSampler(split.unlabeled, replacement=True, num_samples=64 * STEPS)
    # Or any torch.nn.Module.
    teacher, student = (metapl.models.mlp([64, 32, 32, 10]) for _ in range(2))
    inner = SGD(student.parameters(), lr=1.0)
    outer = SGD(teacher.parameters(), lr=0.06, momentum=0.9)
    rates = [CosineAnnealingLR(optimizer, STEPS) for optimizer in (inner, outer)]
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=inner,
        outer_optimizer=outer,
        teacher_losses=(metapl.CrossEntropy(),),
        feedback_weight=FEEDBACK_WEIGHT,
    )
    for step, x_u in enumerate(DataLoader(split.unlabeled, batch_size=64, sampler=sampler)):
        labeled = view(x_l, seed=seed, step=step, examples=torch.arange(len(x_l)))
        strong = view(
            x_u, seed=seed, step=step, examples=torch.arange(len(x_l), len(x_l) + len(x_u))
        )
        # The teacher labels x_u, the student sees strong.
        trainer.step(outer=(labeled, y_l), inner=(x_u, strong))
        for rate in rates:
            rate.step()
    return trainer.evaluate(split.test).accuracy


differences = []
for seed in map(int, sys.argv[1:] or ["0"]):
    with_feedback, without = (100 * student_accuracy(mode, seed) for mode in ("forward", "none"))
    differences.append(with_feedback - without)
    print(
        f"seed {seed}: student's accuracy {with_feedback:.1f} % with feedback, {without:.1f} % "
        "without",
        flush=True,
    )
if len(differences) > 1:
    mean = torch.tensor(differences).mean()
    std = torch.tensor(differences).std()
    print(f"difference: {mean:+.1f} ± {std:.1f} (standard deviation over {len(differences)} seeds)")
else:
    print(
        "One seed does not show whether the feedback helps: give several, such as 0 1 2 3 4 5 6 7."
    )
