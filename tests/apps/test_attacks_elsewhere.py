"""FGSM and PGD against torchattacks, where that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metapl.apps.evaluation.attacks import PGD_STEPS, attacked

torchattacks = pytest.importorskip("torchattacks")


@pytest.mark.parametrize("eps", [2, 8, 16])
@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_the_same_pictures_as_torchattacks(attack: str, eps: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x, y = torch.rand(16, 3, 8, 8), torch.arange(16) % 4
    reach = eps / 255
    other = (
        torchattacks.FGSM(network, eps=reach)
        if attack == "fgsm"
        else torchattacks.PGD(network, eps=reach, alpha=reach / 4, steps=PGD_STEPS, random_start=False)
    )
    found = attacked(network, x, y, attack, eps)  # type: ignore[arg-type]  # one of the two
    # A gradient that is zero up to rounding may have either sign.
    same = ((found - other(x, y)).abs() < 1e-5).float().mean()
    assert same > 0.999
    assert float((found - x).abs().max()) > 0.99 * reach
