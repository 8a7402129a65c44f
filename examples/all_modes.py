"""Every mode's gradient for the teacher beside the exact one, on one batch of digits.

    python examples/all_modes.py

The exact one is by hand: ``torch.func.grad`` through the student's step.
"""

import torch
from torch.func import functional_call, grad
from torch.nn.functional import cosine_similarity, cross_entropy

import metapl
from metapl.pictures import load_digits_split

torch.manual_seed(0)
split = load_digits_split(labels_per_class=10, seed=0)
x_l, y_l = split.labeled
labeled, unlabeled = (x_l[:64], y_l[:64]), split.unlabeled[:64]
teacher = metapl.models.mlp([64, 32, 10])
student = metapl.models.mlp([64, 32, 10])
RATE = 0.05
# A little supervised training, so that the teacher has something to say.
for network in (teacher, student):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        cross_entropy(network(x_l), y_l).backward()
        optimizer.step()


def by_hand() -> torch.Tensor:
    """Return the teacher's gradient as one vector, by torch.func.grad over torch.func.grad."""
    weights = dict(student.named_parameters())

    def outer_loss(of_teacher: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = functional_call(teacher, of_teacher, (unlabeled,)).softmax(-1)

        def inner_loss(of_student: dict[str, torch.Tensor]) -> torch.Tensor:
            return cross_entropy(functional_call(student, of_student, (unlabeled,)), labels)

        slopes = grad(inner_loss)(weights)
        moved = {name: p - RATE * slopes[name] for name, p in weights.items()}
        inputs, targets = labeled
        return cross_entropy(functional_call(student, moved, (inputs,)), targets)

    of_teacher = grad(outer_loss)(dict(teacher.named_parameters()))
    return torch.cat([g.flatten() for g in of_teacher.values()])


def gradient(mode: str) -> torch.Tensor:
    """Return the teacher's gradient, as one vector."""
    inner_optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
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
exact = by_hand().detach()
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
