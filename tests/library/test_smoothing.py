"""Scores by adjoints of Adam that are smoother than its steps, and what is said of scores.

The reference is the whole training in one graph of autograd, in which the division by √n̂ + ε has a
backward of its own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import as_functions
from problems_zoo import product
from reference import error, outputs_at, weights
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.training.attribution import Attribution

N = 16
STEPS = 5
BATCH = 6
EPS = 1e-8

draw = torch.Generator().manual_seed(0)
X = torch.randn(N, 6, generator=draw, dtype=torch.float64)
Y = torch.randint(0, 3, (N,), generator=draw)
OUTER = torch.randn(5, 6, generator=draw, dtype=torch.float64), torch.arange(5) % 3
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.1},
    "AdamW, amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "Adam": {"weight_decay": 0.1},
}


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def optimizer_of(network: nn.Module, rule: str) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if rule.startswith("AdamW") else torch.optim.Adam
    return kind(network.parameters(), lr=0.05, eps=EPS, **RULES[rule])


def attributed(network: nn.Module, optimizer: Any, smoothing: float, **options: Any) -> Attribution:
    arguments: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, **options}
    return metapl.attribute(
        network, (X, Y), OUTER, optimizer=optimizer, smoothing=smoothing, **arguments
    )


def recorded(network: nn.Module, optimizer: Any, order: Tensor, out: Path) -> metapl.Recording:
    """Return the recording of a loop over batches of these examples."""
    with metapl.record(network, optimizer, out=out, train=(X, Y), states_every=2) as recording:
        for rows in order:
            optimizer.zero_grad()
            F.cross_entropy(network(X[rows]), Y[rows]).backward()
            optimizer.step()
    return recording


class SmoothedDivision(torch.autograd.Function):
    """m̂/(√n̂ + ε), whose backward is that of m̂/(√n̂ + ε + c·rms(√n̂))."""

    @staticmethod
    def forward(ctx: Any, m_hat: Tensor, n_hat: Tensor, smoothing: float) -> Tensor:
        root = n_hat.sqrt()
        ctx.save_for_backward(m_hat, root, root + EPS + smoothing * n_hat.mean().sqrt())
        return m_hat / (root + EPS)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:  # type: ignore[override]
        m_hat, root, divisor = ctx.saved_tensors
        return bar / divisor, -bar * m_hat / (2 * root * divisor**2), None


def by_hand(network: nn.Module, order: Tensor, rule: str, smoothing: float) -> Tensor:
    """Return −dL/dw through the training, whose division has the backward above."""
    options = RULES[rule]
    w = torch.ones(N, dtype=torch.float64, requires_grad=True)
    theta = weights(network)
    m = {name: torch.zeros_like(t) for name, t in theta.items()}
    n = dict(m)
    top = dict(m)
    for k, rows in enumerate(order):
        z = outputs_at(network, theta, X[rows])
        loss = (w[rows] * F.cross_entropy(z, Y[rows], reduction="none")).mean()
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        new: dict[str, Tensor] = {}
        for (name, t), gradient in zip(theta.items(), gradients, strict=True):
            d, decayed = gradient + 0.1 * t, t
            if rule.startswith("AdamW"):
                d, decayed = gradient, t * (1 - 0.05 * 0.1)
            m[name] = 0.9 * m[name] + 0.1 * d
            n[name] = 0.999 * n[name] + 0.001 * d**2
            top[name] = torch.where(n[name] >= top[name], n[name], top[name])
            second = top[name] if "amsgrad" in options else n[name]
            m_hat, n_hat = m[name] / (1 - 0.9 ** (k + 1)), second / (1 - 0.999 ** (k + 1))
            new[name] = decayed - 0.05 * SmoothedDivision.apply(m_hat, n_hat, smoothing)
        theta = new
    judged = F.cross_entropy(outputs_at(network, theta, OUTER[0]), OUTER[1])
    return -torch.autograd.grad(judged, w)[0]


@pytest.mark.parametrize(
    ("rule", "road", "smoothing"),
    product(
        RULES,
        ["eager", "by two graphs", "recorded"],
        [0.0, 0.3],
        usual=["AdamW", "AdamW, amsgrad", "eager", "by two graphs", "recorded", 0.3],
    ),
)
@pytest.mark.filterwarnings("ignore:the scores are the derivatives")
def test_smoothed_scores_are_those_of_another_backward(
    rule: str, road: str, smoothing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is the same to the last bit."""
    network = student()
    exact = attributed(network, optimizer_of(network, rule), 0.0)
    expected = by_hand(network, exact.order, rule, smoothing)
    if road == "by two graphs":
        as_functions(monkeypatch)
    if road == "recorded":
        model = copy.deepcopy(network)
        recording = recorded(model, optimizer_of(model, rule), exact.order, tmp_path / "r")
        found: Attribution = recording.attribute(OUTER, smoothing=smoothing, progress=False)
    else:
        found = attributed(
            network, optimizer_of(network, rule), smoothing, compile=road == "by two graphs"
        )
    assert error(found.scores, expected) < 1e-9
    if road == "eager":
        assert all(t.equal(exact.student_params[name]) for name, t in found.student_params.items())
    if smoothing:
        assert error(found.scores, exact.scores) > 0.01


@pytest.mark.filterwarnings("ignore:the scores are the derivatives")
def test_of_several_optimizers_those_of_adams_kind_are_smoothed() -> None:
    network = student()
    first, second = network[0], network[2]
    by_sgd = torch.optim.SGD(first.parameters(), lr=0.05)
    by_adam = torch.optim.AdamW(second.parameters(), lr=0.05)
    groups_before = copy.deepcopy(by_adam.param_groups)
    found = [attributed(network, (by_sgd, by_adam), c).scores for c in (0.0, 0.3)]
    assert error(found[0], found[1]) > 0.01
    for group, group_before in zip(by_adam.param_groups, groups_before, strict=True):
        assert group.keys() == group_before.keys()
    # Behind one optimizer over all weights, whose rates say which of them move.
    still = {"params": [*first.parameters()], "lr": 0.0}
    moving = {"params": [*second.parameters()]}
    alone = attributed(network, torch.optim.AdamW([still, moving], lr=0.05), 0.3).scores
    still_sgd = torch.optim.SGD(first.parameters(), lr=0.0)
    assert error(attributed(network, (still_sgd, by_adam), 0.3).scores, alone) < 1e-12


def test_a_smoothing_of_what_has_no_second_moments_is_refused(tmp_path: Path) -> None:
    network = student()
    by_sgd = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = r"smoothing=0.3 was given with SGD, .* expected Adam or AdamW, or smoothing=0"
    with pytest.raises(MetaplError, match=expected):
        attributed(network, by_sgd, 0.3)
    recording = recorded(network, by_sgd, torch.arange(8).view(2, 4), tmp_path / "r")
    with pytest.raises(MetaplError, match=expected):
        recording.attribute(OUTER, smoothing=0.3, progress=False)
    with pytest.raises(MetaplError, match="smoothing=-1.0: expected a number >= 0"):
        attributed(network, by_sgd, -1.0)
