"""``examples/darts.py``: the gradient of the architecture is that of double backward."""

import darts
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

import metapl

pytestmark = pytest.mark.docs

RATE = 0.5


def test_both_orders_are_those_of_double_backward() -> None:
    torch.manual_seed(0)
    mix = darts.Mix().double()
    cell = darts.Cell().double()
    with torch.no_grad():
        mix.alpha.copy_(torch.tensor([0.3, -0.2, 0.1]))
    batches = [(torch.rand(6, 1, 8, 8).double(), torch.randint(10, (6,))) for _ in range(2)]
    (x_outer, y_outer), (x_inner, y_inner) = batches

    # The step by hand, and the loss after it.
    weights = dict(cell.named_parameters())
    logits = darts.mixed(mix.alpha, cell(x_inner))
    inner = torch.autograd.grad(
        F.cross_entropy(logits, y_inner), [*weights.values()], create_graph=True
    )
    moved = {
        name: weight - RATE * slope
        for (name, weight), slope in zip(weights.items(), inner, strict=True)
    }
    fixed = {name: weight.detach() for name, weight in moved.items()}
    gradients = []
    for after in (moved, fixed):
        outputs = functional_call(cell, after, (x_outer,))
        loss = F.cross_entropy(darts.mixed(mix.alpha, outputs), y_outer)
        gradients.append(torch.autograd.grad(loss, mix.alpha, retain_graph=True)[0])
    second_order, first_order = gradients

    limit = 1e-12 * float(second_order.norm())
    modes: tuple[metapl.feedback.Mode, ...] = ("forward", "direct")
    for mode, expected in zip(modes, gradients, strict=True):
        result = metapl.hypergradient(
            mix,
            cell,
            outer=batches[0],
            inner=batches[1],
            problem=darts.Darts(mix),
            inner_optimizer=torch.optim.SGD(cell.parameters(), lr=RATE),
            mode=mode,
        )
        assert float((result.grads["alpha"] - expected).norm()) <= limit
    assert float((second_order - first_order).norm()) > 1e-3 * float(second_order.norm())


def test_the_architecture_learns_only_where_it_has_a_rate() -> None:
    for mode in ("forward", "direct"):
        _, learned = darts.trained(seed=0, steps=5, mode=mode, rate_of_alpha=0.03)
        assert max(learned) > 1 / 3 + 0.01
    _, unlearned = darts.trained(seed=0, steps=5, mode="none", rate_of_alpha=0.0)
    assert unlearned == pytest.approx([1 / 3] * 3)
