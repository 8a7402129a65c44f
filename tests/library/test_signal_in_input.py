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
    ("forward", 3, torch.float32, 2e-5),
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
    for problem in (Augmenting(), InputAlone()):
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


class Revising(Augmenting):
    def revised_signal(self, signal: Signal, h: Tensor) -> Signal:
        return signal


@pytest.mark.parametrize(
    ("mode", "problem"),
    [*((mode, DrawnInput) for mode in ("forward", "difference", "reinforce_per_example")), ("forward", Revising)],
)
def test_what_does_not_go_with_a_signal_in_the_input(mode: str, problem: type[Augmenting]) -> None:
    """Labels that are credited apart, where each acts on others too; a signal that is made of its own feedback."""
    case = toy("mlp")
    with unmoved(case), pytest.raises(MetaplError):
        trainer_for(case, mode, problem=problem(), teacher_losses=()).step(**case.data())
