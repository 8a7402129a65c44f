"""Sampled labels, by enumerating every joint label of a tiny batch with its probability.

No draw is left to chance.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import reference
import torch
import torchopt
from problems_zoo import CLASSES, OPTIMISERS, Optimiser, Toy, gradient, toy, warm
from reference import error, flat
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.feedback import LossDifference, Reinforce, ReinforcePerExample
from metapl.problems import pseudo_labels
from metapl.problems.base import draw_classes
from metapl.problems.losses import UDA, CrossEntropy

ROWS = 2


def joint_labels(problem: Toy) -> list[tuple[Tensor, Tensor]]:
    """Return every ŷ (B,) with its probability, as a function of the teacher's weights."""
    q = problem.teacher(problem.unlabeled).softmax(-1)
    rows = torch.arange(len(q))
    pairs = []
    for classes in itertools.product(range(CLASSES), repeat=len(q)):
        ys = torch.tensor(classes)
        pairs.append((ys, q[rows, ys].prod()))
    return pairs


def mean_over_labels(grads_for: Callable[[Tensor], Any], problem: Toy) -> Tensor:
    return sum(p.detach() * flat(grads_for(ys)) for ys, p in joint_labels(problem))


def library_mean(
    mode: Any,
    problem: Toy,
    optimiser: Optimiser,
    monkeypatch: pytest.MonkeyPatch,
    warmed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the mean over ŷ of what the library hands the teacher, and of θ′."""
    if warmed:
        inner, inner_state, _ = warm(problem, optimiser)
    else:
        inner = optimiser.build(problem.student)
        inner_state = None

    def gradient_with(ys: Tensor) -> metapl.Hypergradient:
        monkeypatch.setattr(pseudo_labels, "draw_classes", lambda law, generator: ys.unsqueeze(-1))
        pseudo = metapl.PseudoLabels("hard")
        return gradient(
            problem, mode, problem=pseudo, inner_optimizer=inner, inner_state=inner_state
        )

    gradients = {tuple(ys.tolist()): gradient_with(ys) for ys, _ in joint_labels(problem)}
    return (
        mean_over_labels(lambda ys: gradients[tuple(ys.tolist())].grads, problem),
        mean_over_labels(lambda ys: gradients[tuple(ys.tolist())].student_params, problem),
    )


def reference_mean(kind: str, problem: Toy, optimiser: Optimiser, warmed: bool = False) -> Tensor:
    """Return the enumerated mean of an estimator by its own formula, from the reference."""
    state = warm(problem, optimiser)[2] if warmed else None
    case = {
        **problem.networks(),
        **problem.data(),
        "rule": optimiser.rule,
        "state": state,
        "kind": kind,
    }
    return mean_over_labels(lambda ys: reference.pseudo_labels(**case, labels=ys).grads, problem)


def soft_gradient(problem: Toy, optimiser: Optimiser, warmed: bool = False) -> Tensor:
    state = warm(problem, optimiser)[2] if warmed else None
    return flat(
        reference.pseudo_labels(
            **problem.networks(), **problem.data(), rule=optimiser.rule, state=state
        ).grads
    )


def sgd(lr: float) -> Optimiser:
    return Optimiser("sgd", reference.sgd(lr=lr), torch.optim.SGD, (("lr", lr),))


def nesterov(lr: float) -> Optimiser:
    options = {"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    return Optimiser("nesterov", reference.sgd(**options), torch.optim.SGD, tuple(options.items()))


def adam(lr: float) -> Optimiser:
    return Optimiser("adam", reference.adam(lr=lr), torch.optim.Adam, (("lr", lr),))


def clip(lr: float) -> Optimiser:
    transform = torchopt.chain(torchopt.clip_grad_norm(0.05), torchopt.sgd(lr))
    return Optimiser(
        "clip", reference.clipped(0.05, reference.sgd(lr=lr)), transform=lambda: transform
    )


HARD = {
    # mode, what the reference differentiates, order in η of the bias beside the soft gradient
    "reinforce": (Reinforce(reduction="sum"), "batch_score", 1),
    "reinforce_per_example": ("reinforce_per_example", "score", 1),
    "reinforce_per_example_by_difference": (ReinforcePerExample(tangent="difference"), "score", 1),
    "forward": ("forward", "expected", 2),
    "difference": ("difference", "expected", 2),
}


@pytest.mark.parametrize("optimiser", [sgd, nesterov])
@pytest.mark.parametrize("mode", HARD)
def test_mean_over_labels_tends_to_the_soft_gradient(
    mode: str, optimiser: Callable[[float], Optimiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean tends to the gradient in direction and in length.

    Its bias falls as η (one credit per draw) or η² (labels' expectation).
    """
    estimator, _, order = HARD[mode]
    problem = toy("mlp", rows=ROWS)
    gaps = []
    for eta in (0.01, 0.005):
        soft = soft_gradient(problem, optimiser(eta))
        mean, _ = library_mean(estimator, problem, optimiser(eta), monkeypatch)
        gaps.append(float((mean - soft).norm() / soft.norm()))
        assert torch.cosine_similarity(mean, soft, dim=0) > 1 - 5e-3
        assert abs(mean.norm() / soft.norm() - 1) < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("mode", HARD)
def test_the_mean_step_of_plain_sgd_is_the_soft_step(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = toy("mlp", rows=ROWS)
    optimiser = sgd(0.3)
    _, theta = library_mean(HARD[mode][0], problem, optimiser, monkeypatch)
    soft = reference.pseudo_labels(**problem.networks(), **problem.data(), rule=optimiser.rule)
    assert error(theta, soft.student_params) < 1e-12


@pytest.mark.parametrize(
    ("optimiser", "warmed"),
    [("torch_sgd_nesterov", True), ("torch_adam", True), ("torchopt_clip", False)],
)
@pytest.mark.parametrize("mode", HARD)
def test_mean_over_labels_is_that_of_the_formula(
    mode: str, optimiser: str, warmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimator, kind, _ = HARD[mode]
    rule = OPTIMISERS[optimiser]
    expected = reference_mean(kind, toy("mlp", rows=ROWS), rule, warmed)
    mean, _ = library_mean(estimator, toy("mlp", rows=ROWS), rule, monkeypatch, warmed)
    assert error(mean, expected) < (1e-4 if "difference" in mode else 1e-8)


@cache
def bias(
    mode: str, optimiser: Callable[[float], Optimiser], eta: float, warmed: bool
) -> tuple[float, float, float]:
    """Return ‖mean − soft‖/‖soft‖, ‖mean‖/‖soft‖ and their cosine.

    They are medians over five problems of two examples each.
    """
    seen = []
    for seed in range(5):
        mean = reference_mean(
            HARD[mode][1], toy("mlp", rows=ROWS, seed=seed), optimiser(eta), warmed
        )
        soft = soft_gradient(toy("mlp", rows=ROWS, seed=seed), optimiser(eta), warmed)
        seen.append([(mean - soft).norm(), mean.norm(), mean @ soft / mean.norm()])
        seen[-1] = [float(t / soft.norm()) for t in seen[-1]]
    return tuple(torch.tensor(seen).median(0).values.tolist())


@pytest.mark.parametrize(
    ("mode", "gap", "length"),
    [("reinforce", 0.49, 0.55), ("reinforce_per_example", 0.33, 0.74), ("forward", 0.26, 0.74)],
)
@pytest.mark.parametrize("eta", [pytest.param(0.01, marks=pytest.mark.long), 0.001])
def test_bias_under_adam_stays_as_the_learning_rate_falls(
    mode: str, gap: float, length: float, eta: float
) -> None:
    """The figures that the docstrings state: too short, in nearly the right direction."""
    assert bias(mode, adam, eta, warmed=True) == (
        pytest.approx(gap, abs=0.03),
        pytest.approx(length, abs=0.03),
        pytest.approx(0.99, abs=0.011),
    )


@pytest.mark.parametrize("eta", [pytest.param(0.1, marks=pytest.mark.long), 0.001])
@pytest.mark.parametrize(
    ("mode", "gap", "length"),
    [("reinforce", 1.0, 0.0), ("reinforce_per_example", 0.86, 0.16), ("forward", 0.82, 0.23)],
)
def test_bias_under_an_active_clip_stays_as_the_learning_rate_falls(
    mode: str, gap: float, length: float, eta: float
) -> None:
    """As above; the scalar of Algorithm 1 says nothing at all there."""
    assert bias(mode, clip, eta, warmed=False) == (
        pytest.approx(gap, abs=0.03),
        pytest.approx(length, abs=0.03),
        pytest.approx(0.95, abs=0.02),
    )


@pytest.mark.parametrize(
    ("optimiser", "warmed"),
    [
        *((name, False) for name in ("torch_sgd", "torch_adam", "torchopt_clip")),
        *((f"torch_{name}", True) for name in ("sgd_momentum", "sgd_nesterov", "adam", "adamw")),
    ],
)
def test_loss_difference_is_the_gradient_of_the_expected_labelled_loss(
    optimiser: str, warmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean is ∇ E_ŷ[L(θ′(ŷ))]: the expectation is differentiated as a finite sum.

    No optimiser is an exception.
    """
    rule = OPTIMISERS[optimiser]
    estimator = LossDifference(reduction="sum")
    mean, _ = library_mean(estimator, toy("mlp", rows=ROWS), rule, monkeypatch, warmed)
    problem = toy("mlp", rows=ROWS)
    state = warm(problem, rule)[2] if warmed else None
    case = {
        **problem.networks(),
        **problem.data(),
        "rule": rule.rule,
        "state": state,
        "kind": "score",
    }
    loss = sum(
        p * reference.pseudo_labels(**case, labels=ys).outer_loss for ys, p in joint_labels(problem)
    )
    assert error(mean, flat_grad(loss, problem)) < 1e-9


def flat_grad(loss: Tensor, problem: Toy) -> Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(problem.teacher.parameters()))]
    )


@pytest.mark.parametrize("optimiser", ["torch_sgd", "torch_adam", "torchopt_clip"])
@pytest.mark.parametrize(
    "estimator",
    [
        Reinforce(),
        Reinforce(similarity="cosine"),
        Reinforce(normalization="learning_rate"),
        LossDifference(),
    ],
)
def test_the_mean_is_the_sum_over_the_number_of_labels(
    estimator: Any, optimiser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Algorithm 1's reduction, the default, in every option and with any optimiser.

    The student's step is the same.
    """
    if optimiser == "torchopt_clip" and estimator.normalization == "learning_rate":
        pytest.skip("a TorchOpt transform shows no learning rate")
    problem = toy("mlp", rows=ROWS)
    rule = OPTIMISERS[optimiser]
    by_mean, theta = library_mean(estimator, problem, rule, monkeypatch)
    by_sum, same_theta = library_mean(
        replace(estimator, reduction="sum"), problem, rule, monkeypatch
    )
    assert error(by_mean, by_sum / ROWS) < 1e-12
    assert torch.equal(theta, same_theta)


def test_algorithm_1_is_a_scalar_times_the_mean_cross_entropy() -> None:
    """Line 5 is taken by hand: the gradient of h · (1/B) Σ CE(ŷ_i, T(x_i)).

    h is that of the report.
    """
    problem = toy("mlp", rows=5)
    result = gradient(problem, "reinforce", generator=torch.Generator().manual_seed(3))
    drawn = metapl.PseudoLabels("hard").signal(
        problem.teacher,
        problem.unlabeled,
        problem.student(problem.unlabeled).detach(),
        generator=torch.Generator().manual_seed(3),
    )
    mean_cross_entropy = torch.nn.functional.cross_entropy(
        problem.teacher(problem.unlabeled), drawn.value
    )
    expected = flat_grad(result.feedback * mean_cross_entropy, problem)
    assert error(result.grads, expected) < 1e-10


@pytest.mark.parametrize("mode", ["reinforce", "loss_difference"])
def test_a_constant_baseline_leaves_the_mean_alone(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[∇ log p(ŷ)] = 0, so whatever does not depend on these labels may be subtracted."""
    problem = toy("mlp", rows=ROWS)
    optimiser = sgd(0.3)
    without_baseline, _ = library_mean(mode, problem, optimiser, monkeypatch)
    init_baseline = metapl.feedback.reinforce.init_baseline

    def shifted_baseline(decay: float | None) -> dict[str, Tensor]:
        return {name: value + 5.0 for name, value in init_baseline(decay).items()}

    for module in (metapl.feedback.reinforce, metapl.feedback.loss_difference):
        monkeypatch.setattr(module, "init_baseline", shifted_baseline)
    estimators = {"reinforce": Reinforce, "loss_difference": LossDifference}
    estimator = estimators[mode](baseline=0.9)
    with_baseline, _ = library_mean(estimator, problem, optimiser, monkeypatch)
    assert error(with_baseline, without_baseline) < 1e-10


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_labels_are_drawn_from_the_tempered_softmax(temperature: float) -> None:
    """4000 draws of one row: frequencies within four standard errors of q."""
    problem = toy("mlp", rows=1)
    many = problem.unlabeled.expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    signal = metapl.PseudoLabels("hard", temperature).signal(
        problem.teacher, many, problem.student(many).detach(), generator=None
    )
    q = (problem.teacher(problem.unlabeled)[0] / temperature).softmax(-1)
    frequency = signal.value.bincount(minlength=CLASSES) / len(many)
    assert ((frequency - q).abs() < 4 * (q * (1 - q) / len(many)).sqrt()).all()
    torch.testing.assert_close(signal.log_prob, q.log()[signal.value])


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_a_step_is_algorithm_1_on_the_student_s_view(view: Any) -> None:
    """Lines 2, 3 and 5 have one x_u, the teacher's; the authors' code has the other view there."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    student = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x_l, y_l = torch.randn(8, 5).double(), torch.arange(8) % 3
    weak, strong = torch.randn(2, 10, 5).double()
    rate = 0.3

    # Algorithm 1, line by line; the student's label is drawn as the library draws it.
    by_hand = copy.deepcopy((teacher, student))
    T, S = by_hand
    x_u = weak if view == "weak" else strong
    q = T(weak).softmax(-1)
    drawn = draw_classes(q.detach(), torch.Generator().manual_seed(3)).squeeze(-1)
    g_u = torch.autograd.grad(F.cross_entropy(S(x_u), drawn), [*S.parameters()])
    with torch.no_grad():
        for p, g in zip(S.parameters(), g_u, strict=True):
            p -= rate * g
    g_l = torch.autograd.grad(F.cross_entropy(S(x_l), y_l), [*S.parameters()])
    h = rate * sum((a * b).sum() for a, b in zip(g_l, g_u, strict=True))
    loss = h * F.cross_entropy(T(weak), drawn) + F.cross_entropy(T(x_l), y_l)
    loss = loss + F.cross_entropy(T(strong), T(weak).softmax(-1).detach())
    g_T = torch.autograd.grad(loss, [*T.parameters()])
    with torch.no_grad():
        for p, g in zip(T.parameters(), g_T, strict=True):
            p -= rate * g

    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        "reinforce",
        problem=metapl.PseudoLabels("hard", student_view=view),
        teacher_losses=(CrossEntropy(), UDA()),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=rate),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=rate),
        feedback_weight=1.0,
        generator=torch.Generator().manual_seed(3),
        verify=False,
    )
    trainer.step((x_l, y_l), (weak, strong))
    for network, expected in ((teacher, T), (student, S)):
        for p, q_p in zip(network.parameters(), expected.parameters(), strict=True):
            assert float((p - q_p).detach().abs().max()) < 1e-14


def test_stored_labels_have_one_view() -> None:
    with pytest.raises(metapl.MetaplError, match="student_view was given to ReducedLabels"):
        metapl.problems.ReducedLabels(student_view="weak")
