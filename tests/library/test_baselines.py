"""One network on its own losses, and what the comparison's methods have in common and where they differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import UDA, CrossEntropy
from metapl.ablation import Altered
from metapl.execution.ranks import ALONE
from metapl.feedback import Estimator
from metapl.training.loss_trainer import LossTrainer


def test_a_step_is_torchs_own_on_the_sum_of_the_losses() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    theirs.load_state_dict(ours.state_dict())
    labeled = (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    weak, strong = torch.randn(2, 6, 4).double()
    trainer = LossTrainer(
        ours,
        (CrossEntropy(label_smoothing=0.1), UDA(temperature=0.5, weight=2.0)),
        optimizer=torch.optim.SGD(ours.parameters(), lr=0.2, momentum=0.9),
        clip_norm=0.3,
    )
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.9)
    for _ in range(3):
        report = trainer.step(labeled, (weak, strong)).as_dict()
        supervised = F.cross_entropy(theirs(labeled[0]), labeled[1], label_smoothing=0.1)
        target = (theirs(weak) / 0.5).softmax(1).detach()
        consistency = 2.0 * F.cross_entropy(theirs(strong), target)
        optimizer.zero_grad()
        (supervised + consistency).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.step()
        assert report["loss"] == pytest.approx((supervised + consistency).item(), rel=1e-6)
        assert report["loss_cross_entropy"] == pytest.approx(supervised.item(), rel=1e-6)
        assert report["loss_uda"] == pytest.approx(consistency.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Steps(Estimator):
    """An estimator whose feedback is known."""

    name, labels = "known", ("soft",)

    def __init__(self, h: Tensor, part: Any = "value") -> None:
        self.h, self.part = h, part

    def feedback(self, path: Any, state: Any) -> Any:
        return [metapl.feedback.base.Feedback(self.h, self.part)], state


def altered(
    h: Tensor, how: Any, seed: int = 0, labels: Tensor | None = None, weights: Tensor | None = None
) -> list[Tensor]:
    """h as it is altered in four steps, on sampled labels or on a differentiable signal."""
    soft = torch.zeros(len(h)) if weights is None else weights
    signal = metapl.Signal(soft) if labels is None else metapl.Signal(labels, log_prob=torch.zeros(len(h)))
    fields = {"signal": signal, "has_rows": lambda name: True, "student": type("Student", (), {"ranks": ALONE})}
    step = type("Step", (), fields)
    estimator = Altered(Steps(h), how, seed)
    state, found = estimator.init(), []
    for _ in range(4):
        (feedback,), state = estimator.feedback(type("Path", (), {"steps": [step]}), state)  # type: ignore[arg-type]
        found.append(feedback.h)
    return found


H = torch.tensor([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [6.0, -6.0]])


def test_permuted_gives_the_rows_to_others() -> None:
    found = altered(H, "permuted")
    for one in found:
        assert sorted(one[:, 0].tolist()) == [1, 2, 3, 6]
        assert torch.equal(one[:, 1], -one[:, 0])
    assert len({tuple(one[:, 0].tolist()) for one in found}) > 1
    assert all(torch.equal(a, b) for a, b in zip(found, altered(H, "permuted"), strict=True))
    others = altered(H, "permuted", seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(found, others, strict=True))


def test_class_means_leave_nothing_of_the_single_example() -> None:
    for one in altered(H, "class_means"):
        assert torch.equal(one, torch.tensor([[3.0, -3.0]] * 4))
    labels = torch.tensor([0, 1, 0, 1])
    for one in altered(torch.tensor([1.0, 2.0, 5.0, 8.0]), "class_means", labels=labels):
        assert one.tolist() == [3, 5, 3, 5]
    weights = torch.tensor([0.1, 0.2, 0.3, 0.3])  # equal weights are no class
    for one in altered(torch.tensor([1.0, 2.0, 5.0, 8.0]), "class_means", weights=weights):
        assert one.tolist() == [4, 4, 4, 4]


def test_random_sign_flips_whole_rows() -> None:
    found = torch.stack(altered(H, "random_sign"))
    signs = found[..., 0] / H[:, 0]
    assert torch.equal(found, H * signs[..., None])
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert len({tuple(one.tolist()) for one in signs}) > 1
