"""What must hold whatever the numbers are.

Signs, zeros, sums, scales, orders, and that nothing is left moved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference
import torch
from problems_zoo import ANYWHERE, OPTIMISERS, STUDENTS, Toy, gradient, product, toy, unmoved, warm
from reference import error, flat
from torch import Tensor
from torch.nn import functional as F

import metapl
from metapl.feedback import LossDifference, Reinforce

SOFT = ["unrolled", "forward", "difference"]
SAMPLED = ["reinforce", "reinforce_per_example", "loss_difference"]


def find(
    case: Toy, mode: Any, optimiser: str = "torch_sgd_nesterov", **options: Any
) -> metapl.Hypergradient:
    case.draw_from_start()
    inner = options.pop("inner", None) or OPTIMISERS[optimiser].build(case.student)
    return gradient(case, mode, inner_optimizer=inner, **options)


@dataclass(frozen=True)
class ScaledOuter(metapl.PseudoLabels):
    """Mean cross-entropy on both levels, the outer one times a number."""

    scale: float = 1.0

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.scale * super().outer_loss(outputs, batch)


@pytest.mark.parametrize(
    ("mode", "student", "optimiser"),
    product(
        SOFT,
        STUDENTS,
        ("torch_sgd", "torch_sgd_nesterov", "torch_adam", "torchopt_clip"),
        usual=["forward", "unrolled", "mlp", "torch_sgd"],
    ),
)
def test_a_step_against_the_hypergradient_lowers_the_labelled_loss(
    mode: str, student: str, optimiser: str
) -> None:
    """The one-step labelled loss, computed anew with the moved teacher."""
    problem = toy(student)
    gradient = find(problem, mode, optimiser)
    length = flat(gradient.grads).square().sum()
    size = 1e-4 / length.sqrt()
    with torch.no_grad():
        for name, p in problem.teacher.named_parameters():
            p -= size * gradient.grads[name]
    fall = gradient.outer_loss - find(problem, "none", optimiser).outer_loss
    assert float(fall / (size * length)) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("student", ["mlp", "batch_norm", "dropout"])
@pytest.mark.parametrize("mode", [*SOFT, "reinforce", "reinforce_per_example"])
def test_a_labelled_gradient_of_zero_gives_zero_feedback(mode: str, student: str) -> None:
    gradient = find(toy(student), mode, problem=ScaledOuter(scale=0.0))
    assert gradient.feedback.abs().max() == 0
    assert all(g.abs().max() == 0 for g in gradient.grads.values())


@pytest.mark.parametrize(
    "optimiser", ["torch_sgd_nesterov", "torch_adam", "torchopt_clip", "torchopt_adam"]
)
@pytest.mark.parametrize("student", ["mlp", "batch_norm", "dropout"])
def test_credits_per_example_sum_to_the_scalar_of_algorithm_1(student: str, optimiser: str) -> None:
    scalar = find(toy(student), "reinforce", optimiser).feedback
    credits = find(toy(student), "reinforce_per_example", optimiser).feedback
    assert credits.shape == (4,)
    assert abs(float(credits.sum() - scalar)) < 1e-13 * float(credits.abs().sum())


def test_for_plain_sgd_the_scalar_is_eta_times_the_product_of_gradients() -> None:
    """Algorithm 1, line 4, as printed."""
    problem = toy("mlp")
    eta = 0.3
    gradient = find(problem, "reinforce", "torch_sgd")
    problem.draw_from_start()
    rule = OPTIMISERS["torch_sgd"].rule
    step = reference.pseudo_labels(**problem.networks(), **problem.data(), rule=rule, kind="score")
    theta = reference.weights(problem.student)
    g_u = {n: (theta[n].detach() - step.student_params[n]) / eta for n in theta}
    moved = {n: p.clone().requires_grad_() for n, p in step.student_params.items()}
    loss = F.cross_entropy(
        reference.outputs_at(problem.student, moved, problem.labeled[0]), problem.labeled[1]
    )
    v = torch.autograd.grad(loss, list(moved.values()))
    product = sum((a * b).sum() for a, b in zip(v, g_u.values(), strict=True))
    assert error(gradient.feedback, eta * product) < 1e-12


def test_the_loss_difference_is_old_minus_new() -> None:
    problem = toy("mlp")
    gradient = find(problem, "loss_difference", "torch_adam")
    x, y = problem.labeled
    with torch.no_grad():
        theta = dict(problem.student.named_parameters())
        loss_before = F.cross_entropy(reference.outputs_at(problem.student, theta, x), y)
        moved = gradient.student_params
        loss_after = F.cross_entropy(reference.outputs_at(problem.student, moved, x), y)
    assert error(gradient.feedback, loss_before - loss_after) < 1e-12


@pytest.mark.parametrize("student", ["mlp", "batch_norm", "dropout"])
@pytest.mark.parametrize("mode", [*SOFT, *SAMPLED])
def test_feedback_is_linear_in_the_outer_loss(mode: str, student: str) -> None:
    feedback = find(toy(student), mode, problem=ScaledOuter(scale=1.0)).feedback
    scaled = find(toy(student), mode, problem=ScaledOuter(scale=-3.0)).feedback
    assert error(scaled, -3 * feedback) < 1e-11


@pytest.mark.parametrize("mode", [*SOFT, *SAMPLED])
def test_feedback_over_eta_converges_as_eta_vanishes(mode: str) -> None:
    """h/η tends to a limit that is not zero, and linearly so."""
    per_eta = []
    for eta in (4e-3, 2e-3, 1e-3):
        problem = toy("mlp")
        inner = torch.optim.SGD(problem.student.parameters(), lr=eta)
        per_eta.append(find(problem, mode, inner=inner).feedback / eta)
    first = error(per_eta[0], per_eta[1])
    second = error(per_eta[1], per_eta[2])
    assert first < 0.05
    assert first / second == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("student", ["mlp", "group_norm", "attention", "batch_norm"])
@pytest.mark.parametrize("mode", SOFT)
def test_a_batch_in_another_order_gives_its_feedback_in_that_order(mode: str, student: str) -> None:
    problem = toy(student)
    order = torch.tensor([2, 0, 3, 1])
    straight = find(problem, mode)
    moved = find(replace(problem, unlabeled=problem.unlabeled[order]), mode)
    bound = 1e-6 if mode == "difference" else 1e-12
    assert error(moved.feedback, straight.feedback[order]) < bound
    assert error(moved.grads, straight.grads) < bound


@pytest.mark.parametrize("student", ["mlp", "batch_norm", "dropout"])
@pytest.mark.parametrize("mode", ANYWHERE)
def test_weights_buffers_gradients_and_states_stay_bit_for_bit(mode: str, student: str) -> None:
    """Gradients that the caller holds stay too.

    The generator of the call advances while the default one does not.
    """
    problem = toy(student)
    inner, _, _ = warm(problem, OPTIMISERS["torch_adamw"])
    for net in problem.networks().values():
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.5)
    generator = torch.Generator().manual_seed(5)
    drops = student == "dropout"
    with unmoved(problem, inner, generator=not drops):
        gradient(problem, mode, inner_optimizer=inner, generator=generator)
    assert (mode in SAMPLED) == (
        not torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())
    )


@pytest.mark.parametrize(
    "mode", [Reinforce(similarity="cosine"), Reinforce(similarity="cosine", baseline=0.9)]
)
def test_the_cosine_is_that_of_step_and_labelled_gradient(mode: Reinforce) -> None:
    """−⟨w, g⟩/(‖w‖‖g‖), with w = −ηv for plain SGD, whatever the scale of the losses."""
    cosine = find(toy("mlp"), mode, "torch_sgd").feedback
    scaled = find(toy("mlp"), mode, "torch_sgd", problem=ScaledOuter(scale=100.0)).feedback
    assert error(scaled, cosine) < 1e-12
    problem = toy("mlp")
    problem.draw_from_start()
    rule = OPTIMISERS["torch_sgd"].rule
    step = reference.pseudo_labels(**problem.networks(), **problem.data(), rule=rule, kind="score")
    moved = {n: p.clone().requires_grad_() for n, p in step.student_params.items()}
    loss = F.cross_entropy(
        reference.outputs_at(problem.student, moved, problem.labeled[0]), problem.labeled[1]
    )
    v = flat(dict(zip(moved, torch.autograd.grad(loss, list(moved.values())), strict=True)))
    g = flat({n: p - step.student_params[n] for n, p in problem.student.named_parameters()})
    assert error(cosine, torch.cosine_similarity(v, g, dim=0)) < 1e-12


@pytest.mark.parametrize(
    "name", ["forward", "difference", "reinforce", "reinforce_per_example", "loss_difference"]
)
def test_normalization_divides_by_the_learning_rate(name: str) -> None:
    kind = type(metapl.feedback.estimator(name))
    plain, per_eta = (
        find(toy("mlp"), kind(normalization=n)).feedback for n in ("gradient", "learning_rate")
    )
    assert error(per_eta, plain / 0.3) < 1e-12


@pytest.mark.parametrize("kind", [Reinforce, LossDifference])
def test_the_baseline_is_its_value_from_before_the_step(kind: Any) -> None:
    problem = toy("mlp")
    trainer = metapl.BilevelTrainer(
        **problem.networks(), mode=kind(baseline=0.75), teacher_losses=(), feedback_weight=0.0
    )
    twin_toy = toy("mlp")
    twin = metapl.BilevelTrainer(
        **twin_toy.networks(), mode=kind(), teacher_losses=(), feedback_weight=0.0
    )
    average = 0.0
    for step in range(4):
        torch.manual_seed(step)
        h = float(twin.step(**twin_toy.data()).feedback)
        torch.manual_seed(step)
        shifted = float(trainer.step(**problem.data()).feedback)
        assert shifted == pytest.approx(h - average, abs=1e-14)
        average = 0.75 * average + 0.25 * h
