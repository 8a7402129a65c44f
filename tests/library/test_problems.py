"""Problems of one's own against plain double backward: example weights, corrected labels, losses that read θ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from problems_zoo import OPTIMISERS, STUDENTS, Toy, mlp, product, toy, warm
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.problems import Problem

Loss = Callable[..., Tensor]


class Outer:
    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class MetaWeightNet(Outer):
    """The teacher weighs each example by the student's own loss on it; a batch is (x, noisy label)."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        losses = F.cross_entropy(student_outputs, batch[1], reduction="none")
        return Signal(teacher(losses.unsqueeze(-1)).squeeze(-1).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")


class LabelCorrection(Outer):
    """The teacher reads the input and mixes its own label with the noisy one."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        x, noisy = batch
        logits = teacher(x)
        return Signal(0.6 * logits.softmax(-1) + 0.4 * F.one_hot(noisy, logits.shape[-1]), outputs=logits)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return F.cross_entropy(outputs, signal.value, reduction="none")


class LearnedDecay(Outer):
    """The teacher says, per example, how strongly the student's weights are pulled to zero."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch[0]).softmax(-1)[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        squares = sum(p.square().sum() for p in params.values())
        return F.cross_entropy(outputs, batch[1], reduction="none") + 0.3 * signal.value * squares


@dataclass(frozen=True)
class ByName:
    problem: Any
    teacher: Callable[[], nn.Module]


def weigher() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))


PROBLEMS = {
    "meta_weight_net": ByName(MetaWeightNet(), weigher),
    "label_correction": ByName(LabelCorrection(), mlp),
    "learned_decay": ByName(LearnedDecay(), mlp),
}


def noisy_toy(name: str, student: str) -> Toy:
    problem = toy(student, teacher=PROBLEMS[name].teacher)
    noisy = torch.tensor([2, 0, 1, 1])
    return Toy(problem.teacher, problem.student, problem.labeled, (problem.unlabeled, noisy), problem.seed)


def double_backward(name: str, case: Toy, rule: reference.Rule, state: Any) -> dict[str, Tensor]:
    """dL(θ′)/dθ_T with one graph from end to end, each problem's formulas written out once more."""
    theta, phi = reference.weights(case.student), reference.weights(case.teacher)
    x, noisy = case.unlabeled
    rows = torch.arange(len(noisy))
    z = reference.at(case.student, theta, x)
    after_inner = torch.get_rng_state()
    ce = -z.log_softmax(-1)[rows, noisy]
    if name == "meta_weight_net":
        losses = torch.sigmoid(reference.at(case.teacher, phi, ce.detach()[:, None]))[:, 0] * ce
    elif name == "label_correction":
        target = 0.6 * torch.softmax(reference.at(case.teacher, phi, x), -1) + 0.4 * torch.eye(3)[noisy]
        losses = reference.cross_entropy(target, z)
    else:
        pull = torch.softmax(reference.at(case.teacher, phi, x), -1)[:, 0]
        losses = ce + 0.3 * pull * torch.stack([(p**2).sum() for p in theta.values()]).sum()
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    moved, _ = rule(theta, dict(zip(theta, g, strict=True)), state)
    torch.set_rng_state(reference.own_stream(after_inner))
    outer = F.cross_entropy(reference.at(case.student, moved, case.labeled[0]), case.labeled[1])
    return dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))


@pytest.mark.parametrize(
    ("name", "mode", "student", "optimiser"),
    product(
        PROBLEMS,
        ("unrolled", "forward", "difference"),
        STUDENTS,
        ("torch_sgd_nesterov", "torch_adam", "torchopt_clip"),
        usual=[*PROBLEMS, "unrolled", "forward", "difference", "dropout", "torch_sgd_nesterov"],
    ),
)
def test_own_problems_are_exact(name: str, mode: str, student: str, optimiser: str) -> None:
    case = noisy_toy(name, student)
    inner, inner_state, state = warm(case, OPTIMISERS[optimiser])
    case.draw_from_start()
    expected = double_backward(name, case, OPTIMISERS[optimiser].rule, state)
    case.draw_from_start()
    found = metapl.hypergradient(
        **case.networks(),
        **case.data(),
        mode=mode,
        problem=PROBLEMS[name].problem,
        inner_optimizer=inner,
        inner_state=inner_state,
    )
    assert error(found.grads, expected) < (1e-4 if mode == "difference" else 1e-9)
    assert found.feedback.shape == ((4, 3) if name == "label_correction" else (4,))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_trainer_takes_own_problems(name: str) -> None:
    """Thirty steps lower the labelled loss by more than the student's steps alone do with an idle teacher."""
    losses = {}
    for mode in ("forward", "none"):
        case = noisy_toy(name, "mlp")
        trainer = metapl.BilevelTrainer(
            **case.networks(),
            mode=mode,
            problem=PROBLEMS[name].problem,
            inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
            outer_optimizer=torch.optim.Adam(case.teacher.parameters(), lr=0.05),
            teacher_losses=(),
        )
        for _ in range(30):
            trainer.step(**case.data())
        losses[mode] = F.cross_entropy(case.student(case.labeled[0]), case.labeled[1]).item()
    assert losses["forward"] < losses["none"] - 0.02


class Coins(Outer):
    """A signal that is not a class: the teacher draws which examples to keep, by their log-probability alone."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        p = teacher(batch[0])[:, 0].sigmoid()
        kept = torch.bernoulli(p.detach(), generator=generator)
        return Signal(kept, log_prob=(kept * p + (1 - kept) * (1 - p)).log())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")


def test_sampled_signals_need_no_classes() -> None:
    """The examples left out get no credit, and the credits sum to Algorithm 1's scalar."""
    h = {}
    for mode in ("reinforce", "reinforce_per_example"):
        case = noisy_toy("learned_decay", "mlp")
        case.draw_from_start()
        inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
        h[mode] = metapl.hypergradient(
            **case.networks(), **case.data(), mode=mode, problem=Coins(), inner_optimizer=inner
        ).feedback
    assert 0 < int((h["reinforce_per_example"] == 0).sum()) < 4
    assert error(h["reinforce_per_example"].sum(), h["reinforce"]) < 1e-12


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_an_expectation_needs_the_law(mode: str) -> None:
    case = noisy_toy("learned_decay", "mlp")
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    with pytest.raises(metapl.MetaplError, match=r"has no probs.*reinforce_per_example"):
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=Coins(), inner_optimizer=inner)


def test_an_inner_loss_that_is_averaged_already_is_refused() -> None:
    class Averaged(metapl.PseudoLabels):
        def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
            return super().inner_loss(outputs, signal, batch, params).mean()

    case = toy("mlp")
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    with pytest.raises(metapl.MetaplError, match=r"shape \(\), .* for a batch of 4; expected one loss per example"):
        metapl.hypergradient(**case.networks(), **case.data(), problem=Averaged(), inner_optimizer=inner)


class Ratings(Problem):
    """A student that reads two tensors by name, and is judged by a float target; the teacher makes up targets."""

    def student_input(self, batch: Any) -> Any:
        return {name: batch[name] for name in ("user", "item")}

    outer_input = student_input

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(self.student_input(batch)))

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (outputs - signal.value).square()[:, 0]

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        rating, mask = batch["target"]["rating"], batch["target"]["mask"]
        return ((outputs[:, 0] - rating).square() * mask).sum(), mask.sum()


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.user(batch["user"]) * self.item(batch["item"])).sum(-1, keepdim=True)


def ratings(rows: int, *, labeled: bool) -> Any:
    draw = torch.Generator().manual_seed(rows)
    user, item, rating = (torch.randn(rows, n, generator=draw, dtype=torch.float64) for n in (3, 3, 1))
    target = {"target": {"rating": rating[:, 0], "mask": torch.arange(rows) % 2}} if labeled else {}
    return {"user": user, "item": item} | target


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["forward", "difference", "unrolled"])
def test_an_outer_batch_of_any_nesting(mode: str, accumulate: int) -> None:
    """The trainer's gradient against double backward on the modules' own functional calls."""
    if mode == "unrolled" and accumulate > 1:
        pytest.skip("refused: it keeps the graph of the whole batch")
    torch.manual_seed(0)
    teacher, student = Bilinear().double(), Bilinear().double()
    labeled, unlabeled = ratings(6, labeled=True), ratings(4, labeled=False)
    weights = dict(student.named_parameters())

    inner = (torch.func.functional_call(student, weights, (unlabeled,)) - teacher(unlabeled)).square().mean()
    g = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {name: p - 0.1 * t for (name, p), t in zip(weights.items(), g, strict=True)}
    rating, mask = labeled["target"]["rating"], labeled["target"]["mask"]
    outputs = torch.func.functional_call(student, moved, ({name: labeled[name] for name in ("user", "item")},))[:, 0]
    outer = ((outputs - rating).square() * mask).sum() / mask.sum()
    expected = torch.autograd.grad(outer, list(teacher.parameters()))
    before = [p.detach().clone() for p in teacher.parameters()]
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        problem=Ratings(),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=1.0),
        accumulate=accumulate,
    )
    trainer.fit([labeled], [unlabeled], steps=1)
    found = [a - p.detach() for a, p in zip(before, teacher.parameters(), strict=True)]
    tolerance = 1e-6 if mode == "difference" else 1e-10
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(found, expected, strict=True))


def test_other_problems_refuse_such_a_batch() -> None:
    trainer = metapl.BilevelTrainer(Bilinear().double(), Bilinear().double(), "forward")
    with pytest.raises(MetaplError, match="labeled is a dict with the keys"):
        trainer.step(ratings(6, labeled=True), ratings(4, labeled=False))
