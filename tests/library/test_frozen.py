"""Networks that learn a part of their weights, heads or low-rank changes.

They share what is frozen. They are compared with plain double backward in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, gradient
from reference import error
from torch import Tensor, nn
from torch.nn.utils import parametrize

import metapl


class LowRank(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(0.3 * torch.randn(len(weight), 2))
        self.down = nn.Parameter(0.3 * torch.randn(2, weight[0].numel()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def problem(tuning: str) -> Toy:
    """Return two networks that share a convolution and a layer, with a head each."""
    torch.manual_seed(0)
    body = nn.Conv2d(1, 4, 3), nn.Linear(16, 6)
    networks = []
    for _ in range(2):
        conv = nn.Conv2d(1, 4, 3)
        layer = nn.Linear(16, 6)
        for part, shared_part in zip((conv, layer), body, strict=True):
            part.weight = shared_part.weight.requires_grad_(requires_grad=False)
            part.bias = shared_part.bias.requires_grad_(requires_grad=False)
            if tuning == "lora":
                parametrize.register_parametrization(part, "weight", LowRank(part.weight))
        network = nn.Sequential(
            conv,
            nn.BatchNorm2d(4).eval(),
            nn.Tanh(),
            nn.Flatten(),
            layer,
            nn.Tanh(),
            nn.Linear(6, CLASSES),
        )
        networks.append(network.double())
    x_l, x_u = (torch.randn(n, 1, 4, 4, dtype=torch.float64) for n in (5, 4))
    return Toy(networks[0], networks[1], (x_l, torch.randint(CLASSES, (5,))), x_u, 0)


@pytest.mark.parametrize("tuning", ["head", "lora"])
@pytest.mark.parametrize("optimiser", ["torch_sgd_nesterov", "torch_adamw"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_the_gradient_in_what_is_learned_is_that_of_double_backward(
    mode: str, optimiser: str, tuning: str
) -> None:
    toy = problem(tuning)
    rule = OPTIMISERS[optimiser]
    frozen = {name: p for name, p in toy.teacher.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(p is toy.student.get_parameter(name) for name, p in frozen.items())
    frozen_before = {name: p.clone() for name, p in frozen.items()}
    expected = reference.pseudo_labels(**toy.networks(), **toy.data(), rule=rule.rule)
    result = gradient(toy, mode, inner_optimizer=rule.build(toy.student), verify=True)
    assert result.grads.keys() == expected.grads.keys()
    assert error(result.grads, expected.grads) < (1e-4 if mode == "difference" else 1e-9)
    assert error(result.student_params, expected.student_params) < 1e-9
    assert all(torch.equal(p, frozen_before[name]) for name, p in frozen.items())


@pytest.mark.parametrize("tuning", ["head", "lora"])
def test_a_step_moves_what_is_learned_alone_and_weights_that_both_learn_are_refused(
    tuning: str,
) -> None:
    toy = problem(tuning)
    learned = [
        {n for n, p in net.named_parameters() if p.requires_grad}
        for net in (toy.teacher, toy.student)
    ]
    states = [
        {n: t.clone() for n, t in net.state_dict().items()} for net in (toy.teacher, toy.student)
    ]
    trainer = metapl.BilevelTrainer(**toy.networks(), mode="forward")
    trainer.step(**toy.data())
    for net, names, state in zip((toy.teacher, toy.student), learned, states, strict=True):
        assert {n for n, t in net.state_dict().items() if not torch.equal(t, state[n])} == names
    shared: Any = toy.teacher[0].bias
    shared.requires_grad_(requires_grad=True)
    with pytest.raises(metapl.MetaplError, match="share"):
        metapl.BilevelTrainer(**toy.networks(), mode="forward")


class TiedAndFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.second.weight = self.first.weight.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x).tanh()).tanh())
        return logits


def test_a_frozen_weight_of_two_layers_is_one_parameter_in_the_outer_loss() -> None:
    torch.manual_seed(0)
    student = TiedAndFrozen()

    class Penalized(metapl.PseudoLabels):
        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            penalty = sum(p.square().sum() for p in student.parameters())
            return torch.nn.functional.cross_entropy(outputs, batch[1]) * (1 + penalty)

    outer = torch.randn(8, 6), torch.arange(8) % CLASSES
    still = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer = metapl.BilevelTrainer(
        nn.Linear(6, CLASSES), student, problem=Penalized(), inner_optimizer=still
    )
    expected = Penalized().outer_loss(student(outer[0]), outer)
    report = trainer.step(outer, torch.randn(8, 6))
    torch.testing.assert_close(report.outer_loss, float(expected.detach()))
