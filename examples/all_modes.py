"""Every mode's gradient for the teacher beside the exact one, on one batch of digits.

Python examples/all_modes.py
"""

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import metapl
from metapl.pictures import load_digits_split

torch.manual_seed(0)
split = load_digits_split(labels_per_class=10, seed=0)
x_l, y_l = split.labeled
labeled, unlabeled = (x_l[:64], y_l[:64]), split.unlabeled[:64]
teacher = metapl.models.mlp([64, 32, 10])
student = metapl.models.mlp([64, 32, 10])
# A little supervised training, so that the teacher has something to say.
for network in (
    teacher,
    student,
):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        cross_entropy(network(x_l), y_l).backward()
        optimizer.step()


def gradient(mode: str) -> torch.Tensor:
    """Return the teacher's gradient, as one vector."""
    inner_optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    result = metapl.hypergradient(
        teacher,
        student,
        outer=labeled,
        inner=unlabeled,
        mode=mode,
        inner_optimizer=inner_optimizer,
    )
    return torch.cat([g.flatten() for g in result.grads.values()])


DRAWS = 100
exact = gradient("unrolled")
print(f"{'mode':<22}  {'one draw':>8}  {f'mean of {DRAWS}':>11}   (cosine to the exact gradient)")
for mode in metapl.MODES:
    # The first asks for a student at an optimum of the inner loss, which this one is not near, and
    # the second for an outer loss that reads the teacher.
    if mode in ("implicit", "direct"):
        continue
    of_one_draw = gradient(mode)
    if not of_one_draw.any():
        print(f"{mode:<22}  {'0':>8}  {'0':>11}   (no gradient)")
        continue
    mean = sum(gradient(mode) for _ in range(DRAWS)) / DRAWS
    print(
        f"{mode:<22}  {cosine_similarity(of_one_draw, exact, 0):8.4f}  "
        f"{cosine_similarity(mean, exact, 0):11.4f}"
    )
