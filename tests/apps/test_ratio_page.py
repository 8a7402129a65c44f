"""feedback_ratio is the ratio of the norms of the two gradients in the teacher's parameters, whatever the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import metapl

FIRST = ("pooled_cnn", "small_cnn", "resnet18", "efficientnet_b0_svhn", "timm:resnet10t", "timm:test_vit")
"""One of each kind; the others are built of the same blocks, and ``make test-long`` tries those."""

HUGE = ("b6_wide", "l2", "vit_l_", "vit_h_", "vit_1b_")
"""Networks of more than 300 million weights, of the blocks of smaller ones, which are not run."""

OTHERS = [n for n in metapl.apps.networks.NAMES if n not in FIRST and not any(part in n for part in HUGE)]
OTHERS += ["timm:test_convnext", "timm:test_mambaout", "timm:test_coatnet", "timm:vit_tiny_patch16_224"]

NAMES = [*FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]


@pytest.mark.parametrize("name", NAMES)
def test_the_two_gradients_of_every_network_have_the_ratio(name: str) -> None:
    """In its parameters; many of these networks have layers without a bias, or draw masks."""
    shape, of_timm = (3, 32, 32), name.removeprefix("timm:")
    if of_timm != name:
        timm = pytest.importorskip("timm")
        if not timm.is_model(of_timm):
            pytest.skip(f"timm {timm.__version__} has no {of_timm}")
        shape = timm.get_pretrained_cfg(of_timm).input_size
    draws = torch.Generator().manual_seed(1)
    # Of two pictures batch norm has gradients that overflow.
    (x, u), y = (torch.randn(4, *shape, generator=draws) for _ in range(2)), torch.tensor([0, 2, 1, 0])

    def gradient(**size: float) -> tuple[Tensor, metapl.StepReport]:
        """What a step leaves in the teacher, from the same weights and masks."""
        torch.manual_seed(0)
        teacher = metapl.apps.networks.create(name, 3, image_size=shape[-1])
        student = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
        at_rest = torch.optim.SGD(teacher.parameters(), lr=0.0)
        losses = (metapl.CrossEntropy(),)
        trainer = metapl.BilevelTrainer(
            teacher, student, "forward", teacher_losses=losses, outer_optimizer=at_rest, verify=False, **size
        )
        found = list[Tensor]()
        at_rest.register_step_pre_hook(
            lambda *_: found.extend(p.new_zeros(p.shape) if p.grad is None else p.grad for p in teacher.parameters())
        )
        report = trainer.step((x, y), u)
        return torch.cat([g.flatten().double() for g in found]), report

    own, _ = gradient(feedback_weight=0.0)
    both, report = gradient(feedback_ratio=0.5)
    assert float((both - own).norm() / own.norm()) == pytest.approx(0.5, rel=1e-3)
    assert 0 < report.feedback_weight < float("inf")
