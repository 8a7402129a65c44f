"""Signals that enter the student's input: the derivative goes through it, in every mode that can, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems_zoo import OPTIMISERS, Toy, toy, unmoved, warm
from reference import error, own_stream, weights
from test_own_problems import Labeller
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from trainers import trainer_for, values

import metapl
from metapl import MetaplError, Signal


class Augmenting(metapl.problems.Problem):
    """The teacher says how bright an example is shown, how much noise is added to it, and what is expected of it."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        assert student_outputs is None
        return Signal(teacher(batch).tanh())

    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        bright, noise = signal.value[:, 0, None, None, None], signal.value[:, 1, None, None, None]
        return batch * (1 + bright) + noise * torch.randn_like(batch)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return outputs.logsumexp(1) + (signal.value * outputs).sum(1).square()

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class InputAlone(Augmenting):
    """The loss does not read the signal."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return outputs.logsumexp(1)


class Plain:
    """The same without the base class, and with inputs in a dict beside a tensor without a graph."""

    def __init__(self) -> None:
        given = Augmenting()
        self.signal, self.inner_loss, self.outer_loss = given.signal, given.inner_loss, given.outer_loss
        self.student_input = given.student_input


def ahead_of(case: Toy, steps: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(4, 1, 4, 4, generator=draw, dtype=case.unlabeled.dtype) for _ in range(steps)]


def by_hand(case: Toy, batches: list[Tensor], rule: Any, state: Any, problem: Any, parts: int = 1) -> dict[str, Tensor]:
    """Double backward through every step, from the teacher's weights to the labeled loss."""
    theta, phi = weights(case.student), weights(case.teacher)
    student, teacher = copy.deepcopy(case.student), copy.deepcopy(case.teacher)
    for batch in batches:
        pieces = batch.chunk(parts)
        signals = [Signal(functional_call(teacher, phi, (x,)).tanh()) for x in pieces]
        losses = []
        for x, signal in zip(pieces, signals, strict=True):
            z = functional_call(student, theta, (problem.student_input(x, signal),))
            losses.append(problem.inner_loss(z, signal, x).mean())
        g = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()), create_graph=True)
        theta, state = rule(theta, dict(zip(theta, g, strict=True)), state)
    torch.set_rng_state(own_stream(torch.get_rng_state()))
    outer = [
        F.cross_entropy(functional_call(student, theta, (x,)), y)
        for x, y in zip(*(t.chunk(parts) for t in case.labeled), strict=True)
    ]
    return dict(zip(phi, torch.autograd.grad(torch.stack(outer).mean(), list(phi.values())), strict=True))


ENTERING = [
    *((mode, steps, torch.float64, 1e-9) for mode in ("unrolled", "forward") for steps in (1, 3)),
    *((mode, steps, torch.float32, 2e-5) for mode in ("unrolled", "forward") for steps in (1, 3)),
    (metapl.feedback.Forward(keep_every=2), 3, torch.float64, 1e-9),
    ("difference", 1, torch.float64, 1e-6),
    ("difference", 1, torch.float32, 1e-2),
    (metapl.feedback.Difference(one_sided=True), 1, torch.float64, 1e-6),
]


@pytest.mark.parametrize(
    ("student", "optimiser"), [("mlp", "torch_sgd_momentum"), ("batch_norm", "torch_adam"), ("dropout", "torch_adam")]
)
@pytest.mark.parametrize(("mode", "steps", "dtype", "tolerance"), ENTERING)
def test_a_signal_may_enter_the_students_input(
    mode: Any, steps: int, dtype: torch.dtype, tolerance: float, student: str, optimiser: str
) -> None:
    """Also with noise that student_input draws, and with the dropout masks drawn after it."""
    for problem in (Augmenting(), InputAlone(), Plain()):
        case, rule = toy(student, dtype=dtype), OPTIMISERS[optimiser]
        inner, _, state = warm(case, rule)
        batches = ahead_of(case, steps)
        case.draw_from_start()
        expected = by_hand(case, batches, rule.rule, state, problem)
        case.draw_from_start()
        with unmoved(case, inner, generator=False):
            found = metapl.hypergradient(
                **case.networks(),
                labeled=case.labeled,
                unlabeled=metapl.Lookahead(batches) if steps > 1 else batches[0],
                mode=mode,
                problem=problem,
                inner_optimizer=inner,
            )
        assert error(found.grads, expected) < tolerance


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("mode", "parts"), [("unrolled", 1), ("forward", 1), ("forward", 2), ("difference", 2)])
def test_a_step_on_a_signal_in_the_input(mode: str, parts: int, recompute: bool) -> None:
    """In micro-batches the signals are asked for first, then the student runs on each."""
    case, rule = toy("dropout", teacher=Labeller), OPTIMISERS["torch_sgd"]
    case = Toy(case.teacher, case.student, (case.labeled[0][:4], case.labeled[1][:4]), case.unlabeled, 0)
    case.draw_from_start()
    expected = by_hand(case, [case.unlabeled], rule.rule, None, Augmenting(), parts)
    before = values(case.teacher)
    trainer = trainer_for(
        case,
        mode,
        problem=Augmenting(),
        accumulate=parts,
        recompute_teacher=recompute,
        teacher_losses=(),
        inner_optimizer=rule.build(case.student),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=1.0),
    )
    case.draw_from_start()
    trainer.step(**case.data())
    assert error({n: before[n] - p for n, p in values(case.teacher).items()}, expected) < 1e-6


def test_implicit_takes_a_signal_in_the_input() -> None:
    """Its w is found from the outer gradient at θ; along it, the same derivative as by double backward."""
    case, problem = toy("mlp"), Augmenting()
    theta, phi = weights(case.student), weights(case.teacher)
    outer = F.cross_entropy(functional_call(case.student, theta, (case.labeled[0],)), case.labeled[1])
    w = [-0.2 * v for v in torch.autograd.grad(outer, list(theta.values()))]
    case.draw_from_start()
    signal = Signal(functional_call(case.teacher, phi, (case.unlabeled,)).tanh())
    z = functional_call(case.student, theta, (problem.student_input(case.unlabeled, signal),))
    loss = problem.inner_loss(z, signal, case.unlabeled).mean()
    g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    expected = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, w, strict=True)), list(phi.values()))
    case.draw_from_start()
    found = metapl.hypergradient(
        **case.networks(),
        **case.data(),
        mode=metapl.feedback.Implicit(solver="identity", step_size=0.2),
        problem=problem,
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.1),
    )
    assert error(found.grads, dict(zip(phi, expected, strict=True))) < 1e-9


class DrawnInput(Augmenting):
    """A sampled class, shown to the student in its input."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        log_q = teacher(batch).log_softmax(-1)
        drawn = torch.multinomial(log_q.detach().exp(), 1, generator=generator)
        return Signal(drawn[:, 0], log_q.gather(1, drawn)[:, 0], log_q.exp())

    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        return batch * signal.value[:, None, None, None]

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return outputs.logsumexp(1)


@pytest.mark.parametrize("mode", ["reinforce", "loss_difference"])
def test_a_sampled_signal_in_the_input_gets_the_batchs_feedback(mode: str) -> None:
    """h is −⟨w, g⟩, or L(θ) − L(θ′), of the step on these inputs."""
    case = toy("mlp")
    theta = weights(case.student)
    case.draw_from_start()
    drawn = torch.multinomial(case.teacher(case.unlabeled).detach().softmax(-1), 1)[:, 0]
    z = functional_call(case.student, theta, (case.unlabeled * drawn[:, None, None, None],))
    g = torch.autograd.grad(z.logsumexp(1).mean(), list(theta.values()))
    moved = {n: (p - 0.1 * d).detach().requires_grad_() for (n, p), d in zip(theta.items(), g, strict=True)}
    before, after = (
        F.cross_entropy(functional_call(case.student, at, (case.labeled[0],)), case.labeled[1]) for at in (theta, moved)
    )
    v = torch.autograd.grad(after, list(moved.values()))
    h = {"reinforce": 0.1 * sum((a * b).sum() for a, b in zip(v, g, strict=True)), "loss_difference": before - after}
    case.draw_from_start()
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    found = metapl.hypergradient(
        **case.networks(), **case.data(), mode=mode, problem=DrawnInput(), inner_optimizer=inner
    )
    assert error(found.feedback, h[mode].detach()) < 1e-9


class DrawnSize(DrawnInput):
    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        return F.pad(super().student_input(batch, signal), (0, int(signal.value[0])))


@pytest.mark.parametrize("mode", ["reinforce", "loss_difference"])
def test_a_sampled_signal_may_decide_the_size_of_the_input(mode: str) -> None:
    case = toy("mlp")
    student = nn.Sequential(nn.AdaptiveAvgPool2d(4), case.student)
    trainer = metapl.BilevelTrainer(case.teacher, student, mode, problem=DrawnSize())
    case.draw_from_start()
    drawn = [trainer.step(**case.data()).signal.value for _ in range(8)]
    assert any(value[0] != value[-1] for value in drawn)  # which take each other's places


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("forward", "credits each label.*enter the student's input.*modes reinforce, loss_difference, none, or"),
        ("difference", "credits each label.*enter the student's input.*modes reinforce, loss_difference, none, or"),
        ("reinforce_per_example", "credits each label apart, and the sampled labels of DrawnInput enter the student's"),
    ],
)
def test_a_sampled_signal_in_the_input_is_refused_elsewhere(mode: str, text: str) -> None:
    case = toy("mlp")
    with unmoved(case), pytest.raises(MetaplError, match=text):
        trainer_for(case, mode, problem=DrawnInput()).step(**case.data())


class Reading(Augmenting):
    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch) * student_outputs.softmax(-1))


class ByProbs(DrawnInput):
    def student_input(self, batch: Any, signal: Signal) -> Tensor:
        return batch * signal.probs[:, :1, None, None]


class Revising(Augmenting):
    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        return signal


class Three(Augmenting):
    def student_input(self, batch: Any, signal: Any, more: Any) -> Any:
        return batch


@pytest.mark.parametrize(
    ("problem", "mode", "text"),
    [
        (Reading, "forward", "Reading.signal reads the student's outputs.*student_outputs is None"),
        (ByProbs, "reinforce", r"student_input has a derivative in signal\.probs"),
        (Revising, "forward", r"has revised_signal and student_input\(batch, signal\)"),
        (Three, "forward", r"Three.student_input has the parameters \(batch.*expected \(batch\), or \(batch, signal\)"),
    ],
)
def test_what_does_not_go_with_a_signal_in_the_input(problem: type[Augmenting], mode: str, text: str) -> None:
    case = toy("mlp")
    with unmoved(case), pytest.raises(MetaplError, match=text):
        trainer_for(case, mode, problem=problem(), teacher_losses=()).step(**case.data())


def test_a_difference_that_is_rounding_is_refused() -> None:
    """A fresh Adam's w is of weights that no example reaches, and moves along it tell nothing in float32."""
    case = toy("mlp", dtype=torch.float32)
    case.student[2] = nn.ReLU()
    with torch.no_grad():
        case.student[1].weight[:3].abs_().neg_()  # units that the outer batch alone reaches
    case = Toy(case.teacher, case.student, (-case.labeled[0].abs(), case.labeled[1]), case.unlabeled.abs() + 3, 0)
    inner = torch.optim.Adam(case.student.parameters())
    with unmoved(case), pytest.raises(MetaplError, match=r"whose two halves differ .*mode=\"forward\" or \"unrolled\""):
        trainer_for(case, "difference", problem=Augmenting(), teacher_losses=(), inner_optimizer=inner).step(
            **case.data()
        )
