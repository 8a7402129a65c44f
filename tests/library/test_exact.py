"""Every estimator against plain double backward.

Grads, feedback, θ′ and losses, fresh and warmed, in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torchopt
from problems_zoo import (
    OPTIMISERS,
    STUDENTS,
    Optimiser,
    Toy,
    gradient,
    noisy_teacher,
    product,
    toy,
    unmoved,
    warm,
)
from reference import error

import metapl
from metapl.feedback import Difference, Forward, ReinforcePerExample

EXACT, DIFFERENCE = None, 1e-4  # None: the optimiser's own tolerance

ESTIMATORS: dict[str, tuple[Any, str, str, float | None]] = {
    # mode, kind of labels, what the reference differentiates, tolerance
    "unrolled": ("unrolled", "soft", "soft", EXACT),
    "forward": ("forward", "soft", "soft", EXACT),
    "forward_by_tangent": (Forward(by="tangent"), "soft", "soft", EXACT),  # as of large students
    "forward_hard": ("forward", "hard", "expected", EXACT),
    "difference": ("difference", "soft", "soft", DIFFERENCE),
    "difference_hard": ("difference", "hard", "expected", DIFFERENCE),
    "difference_one_sided": (Difference(one_sided=True), "soft", "soft", DIFFERENCE),
    "reinforce": ("reinforce", "hard", "batch_mean", EXACT),
    "reinforce_per_example": ("reinforce_per_example", "hard", "score", EXACT),
    "reinforce_per_example_by_difference": (
        ReinforcePerExample(tangent="difference"),
        "hard",
        "score",
        DIFFERENCE,
    ),
}

COMMON = ("unrolled", "forward", "reinforce_per_example")
EVERY = product(
    ESTIMATORS, STUDENTS, OPTIMISERS, usual=[*COMMON, "mlp", "torch_sgd_nesterov", "torch_adamw"]
)
WARMED = product(ESTIMATORS, STUDENTS, OPTIMISERS, usual=[*COMMON, "mlp", "torch_sgd_nesterov"])


def check_against_reference(
    estimator: str,
    problem: Toy,
    optimiser: Optimiser,
    inner: Any,
    inner_state: Any,
    rule_state: Any,
    *,
    at_least: float | None = None,
    **labels: Any,
) -> tuple[metapl.Hypergradient, reference.Found]:
    """One call of the library beside the reference.

    The library must leave everything where it was.
    """
    mode, kind, told, tolerance = ESTIMATORS[estimator]
    tolerance = max(optimiser.tolerance, tolerance or 0.0, at_least or 0.0)
    if told == "batch_mean" and "clip" in optimiser.name:
        tolerance = (
            1e-6  # behind an active clip ⟨w, g⟩ is zero but for rounding and the clip's 1e-6
        )
    if told == "batch_mean" and "adam_defaults" in optimiser.name and rule_state is None:
        # a first step of Adam is a sign: ⟨w, g⟩ cancels to its eps, 1e-8, in which rounding is 1e-8
        tolerance = 1e-7
    problem.draw_from_start()
    state = {"state": rule_state, "kind": told, **labels}
    expected = reference.pseudo_labels(
        **problem.networks(), **problem.data(), rule=optimiser.rule, **state
    )
    drawn_to = torch.get_rng_state()
    problem.draw_from_start()
    settings = {name: value for name, value in labels.items() if name == "temperature"}
    pseudo = metapl.PseudoLabels(
        kind=kind, label_smoothing=labels.get("smoothing", 0.0), **settings
    )
    found = gradient(problem, mode, problem=pseudo, inner_optimizer=inner, inner_state=inner_state)
    assert error(found.grads, expected.grads) < tolerance
    told_of = expected.signal_grad.squeeze() if told == "batch_mean" else expected.signal_grad
    assert found.feedback.shape == told_of.shape
    assert error(found.feedback, -told_of) < tolerance
    assert error(found.student_params, expected.student_params) < optimiser.tolerance
    assert error(found.inner_loss, expected.inner_loss) < 1e-12
    assert error(found.outer_loss, expected.outer_loss) < optimiser.tolerance
    assert torch.equal(torch.get_rng_state(), drawn_to), (
        "the generator is not where one forward pass leaves it"
    )
    return found, expected


@pytest.mark.parametrize(("estimator", "student", "optimiser"), EVERY)
def test_fresh_optimiser(estimator: str, student: str, optimiser: str) -> None:
    problem, rule = toy(student), OPTIMISERS[optimiser]
    inner = rule.build(problem.student)
    with unmoved_but_for_draws(problem, inner):
        check_against_reference(estimator, problem, rule, inner, None, None)


@pytest.mark.parametrize(("estimator", "student", "optimiser"), WARMED)
def test_warmed_optimiser(estimator: str, student: str, optimiser: str) -> None:
    problem, rule = toy(student), OPTIMISERS[optimiser]
    inner, inner_state, rule_state = warm(problem, rule)
    with unmoved_but_for_draws(problem, inner):
        check_against_reference(estimator, problem, rule, inner, inner_state, rule_state)


def unmoved_but_for_draws(problem: Toy, inner: Any) -> Any:
    """Weights, buffers, gradients and optimiser states bit for bit.

    The generator is the caller's own.
    """
    return unmoved(
        problem, *([inner] if isinstance(inner, torch.optim.Optimizer) else []), generator=False
    )


@pytest.mark.parametrize(
    ("estimator", "student", "optimiser"),
    product(
        ("unrolled", "forward", "reinforce_per_example"),
        ("mlp", "dropout"),
        [name for name in OPTIMISERS if name.startswith("torchopt")],
        usual=("unrolled", "forward", "mlp", "torchopt_adamw"),
    ),
)
def test_three_steps_chained_by_inner_state(estimator: str, student: str, optimiser: str) -> None:
    """Each step with a transform built anew, as after a resume."""
    problem, rule = toy(student), OPTIMISERS[optimiser]
    inner_state = rule_state = None
    for _ in range(3):
        transform = rule.build(problem.student)
        found, expected = check_against_reference(
            estimator, problem, rule, transform, inner_state, rule_state
        )
        inner_state, rule_state = found.inner_state, expected.state
        problem.student.load_state_dict(expected.student_params, strict=False)


@pytest.mark.parametrize("optimiser", ["torch_sgd_nesterov", "torch_adam", "torchopt_clip"])
def test_the_reference_agrees_with_central_differences_of_real_steps(optimiser: str) -> None:
    """The real optimiser moves the student twice, for a teacher moved to either side along one direction."""
    problem, rule = toy("mlp"), OPTIMISERS[optimiser]
    expected = reference.pseudo_labels(**problem.networks(), **problem.data(), rule=rule.rule).grads
    draw = torch.Generator().manual_seed(3)
    direction = {
        n: torch.randn(g.shape, generator=draw, dtype=g.dtype) for n, g in expected.items()
    }
    phi, step = reference.weights(problem.teacher), 1e-5

    def labelled_loss(moved: float) -> torch.Tensor:
        q = reference.at(
            problem.teacher,
            {n: p + moved * direction[n] for n, p in phi.items()},
            problem.unlabeled,
        )
        student = toy("mlp").student
        loss = reference.cross_entropy(q.softmax(-1).detach(), student(problem.unlabeled)).mean()
        params = dict(student.named_parameters())
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        real = rule.build(student)
        if isinstance(real, torch.optim.Optimizer):
            for name, p in params.items():
                p.grad = grads[name]
            real.step()
        else:
            updates, _ = real.update(grads, real.init(params), params=params, inplace=False)
            torchopt.apply_updates(params, updates, inplace=True)
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(
                student(problem.labeled[0]), problem.labeled[1]
            )

    slope = (labelled_loss(step) - labelled_loss(-step)) / (2 * step)
    along = sum((expected[n] * direction[n]).sum() for n in expected)
    assert abs(float(slope / along) - 1) < 1e-5


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_two_views_temperature_and_smoothing(estimator: str, smoothing: float) -> None:
    """The teacher is fed back through the weak view, the student learns the strong.

    Smoothing is the student's own.
    """
    problem, rule = toy("batch_norm", views=True), OPTIMISERS["torch_sgd_nesterov"]
    inner = rule.build(problem.student)
    labels = {"temperature": 0.7, "smoothing": smoothing}
    check_against_reference(estimator, problem, rule, inner, None, None, **labels)


@pytest.mark.parametrize("student", ["batch_norm", "dropout"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_eval_mode_is_left_and_used(estimator: str, student: str) -> None:
    problem, rule = toy(student), OPTIMISERS["torch_sgd_momentum"]
    problem.student.eval()
    problem.teacher.eval()
    check_against_reference(estimator, problem, rule, rule.build(problem.student), None, None)
    assert not any(m.training for net in problem.networks().values() for m in net.modules())


@pytest.mark.parametrize("student", ["batch_norm", "dropout"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_teacher_with_dropout_and_batch_norm(estimator: str, student: str) -> None:
    """The teacher's masks are drawn after the student's inner pass, and its labels after them."""
    problem, rule = toy(student, teacher=noisy_teacher), OPTIMISERS["torch_sgd_momentum"]
    with unmoved_but_for_draws(problem, None):
        check_against_reference(estimator, problem, rule, rule.build(problem.student), None, None)


# Measured over the cases below: unrolled 7.7e-6, forward 6.6e-6, difference 5.5e-4, one-sided
# 1.4e-3.
SINGLE = {"unrolled": 2e-5, "forward": 2e-5, "difference": 2e-3, "difference_one_sided": 5e-3}


@pytest.mark.parametrize(
    ("estimator", "student", "optimiser"),
    product(
        SINGLE,
        STUDENTS,
        ("torch_sgd", "torch_sgd_nesterov", "torch_adamw", "torchopt_clip"),
        usual=[*SINGLE, "mlp", "torch_adamw"],
    ),
)
def test_float32_agrees_with_float64(estimator: str, student: str, optimiser: str) -> None:
    mode, rule = ESTIMATORS[estimator][0], OPTIMISERS[optimiser]
    grads = []
    for dtype in (torch.float32, torch.float64):
        problem = toy(student, dtype=torch.float32)
        for net in problem.networks().values():
            net.to(dtype)
        data = {
            "labeled": (problem.labeled[0].to(dtype), problem.labeled[1]),
            "unlabeled": problem.unlabeled.to(dtype),
        }
        problem.draw_from_start()
        how = mode if dtype == torch.float32 else "forward"
        grads.append(
            gradient(problem, how, **data, inner_optimizer=rule.build(problem.student)).grads
        )
    assert error(*grads) < SINGLE[estimator]
