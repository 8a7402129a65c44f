"""feedback_ratio sets the size of the feedback beside the teacher's own losses, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import metapl

FIRST = ("pooled_cnn", "small_cnn", "resnet18", "efficientnet_b0_svhn", "timm:resnet10t", "timm:test_vit")
"""One of each kind; the others are built of the same blocks, and ``make test-long`` tries those."""

HUGE = ("b6_wide", "l2", "vit_l_", "vit_h_", "vit_1b_")
"""Networks of more than 300 million weights, of the blocks of smaller ones, which are not run."""

OTHERS = [n for n in metapl.apps.networks.NAMES if n not in FIRST and not any(part in n for part in HUGE)]
OTHERS += ["timm:resnet18", "timm:vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_the_ratio_of_every_network_is_that_at_its_outputs(name: str) -> None:
    """By hand, from gradients at the outputs; many of these networks have layers without a bias."""
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    size = 160 if name == "timm:test_vit" else 32
    teacher = metapl.apps.networks.create(name, 3, image_size=size)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 3))
    draws = torch.Generator().manual_seed(1)
    x, u = (torch.randn(2, 3, size, size, generator=draws) for _ in range(2))
    y = torch.tensor([0, 2])
    at_rest = torch.optim.SGD(teacher.parameters(), lr=0.0)
    losses = (metapl.CrossEntropy(),)
    trainer = metapl.BilevelTrainer(teacher, student, "forward", teacher_losses=losses, outer_optimizer=at_rest)
    h = trainer.hypergradient((x, y), u).feedback
    with torch.no_grad():
        z, z_labeled = teacher(u), teacher(x)
    (from_feedback,) = torch.autograd.grad(-(h * z.requires_grad_().softmax(-1)).sum(), z)
    (own,) = torch.autograd.grad(nn.functional.cross_entropy(z_labeled.requires_grad_(), y), z_labeled)
    found = trainer.step((x, y), u).feedback_ratio
    assert found == pytest.approx(float(from_feedback.norm() / own.norm()), rel=1e-3)
    trainer.feedback_ratio = 0.5
    assert trainer.step((x, y), u).feedback_ratio == pytest.approx(0.5, rel=1e-4)
