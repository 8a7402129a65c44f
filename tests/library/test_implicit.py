"""The implicit gradient against closed forms and a training unrolled to its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_zoo import everything, same, toy
from reference import error
from torch import Tensor, nn

import metapl
from metapl import MetaplError
from metapl.feedback import Implicit
from metapl.guards.verification import VerificationWarning

N = 12
D = 4


class Penalties(nn.Module):
    """The logarithm of a penalty for each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_penalty = nn.Parameter(torch.linspace(-1, 1, D).double())

    def forward(self) -> Tensor:
        return self.log_penalty.exp()


class Ridge(metapl.problems.BilevelProblem):
    """Least squares with a penalty per feature, judged by squares on other data."""

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher())

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        penalty = (signal.value * params["weight"][0] ** 2).sum() / 2
        return (outputs[:, 0] - batch[1]) ** 2 / 2 + penalty

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return ((outputs[:, 0] - batch[1]) ** 2).mean() / 2


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    x, z = (torch.randn(N, D, generator=draw, dtype=torch.float64) for _ in range(2))
    y, t = (torch.randn(N, generator=draw, dtype=torch.float64) for _ in range(2))
    return (x, y), (z, t)


def optimum(penalty: Tensor) -> Tensor:
    (x, y), _ = data()
    return torch.linalg.solve(x.T @ x / N + torch.diag(penalty), x.T @ y / N)


def closed_form() -> Tensor:
    """Return dL(θ*(λ))/d log λ, through the solution of the normal equations."""
    _, (z, t) = data()
    log_penalty = Penalties().log_penalty.detach().requires_grad_()
    theta = optimum(log_penalty.exp())
    return torch.autograd.grad(((z @ theta - t) ** 2).mean() / 2, log_penalty)[0]


def student() -> nn.Linear:
    network = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(optimum(Penalties().log_penalty.detach().exp()))
    return network


def implicit_gradient(mode: Implicit, inner: Any = None) -> metapl.Hypergradient:
    inner_batch, outer_batch = data()
    network = student()
    if inner is None:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    else:
        optimizer = inner(network)
    return metapl.hypergradient(
        Penalties(),
        network,
        outer=outer_batch,
        inner=inner_batch,
        mode=mode,
        problem=Ridge(),
        inner_optimizer=optimizer,
        # It would warn of a student that is not at its optimum.
        verify=False,
    )


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        (Implicit(iterations=D), 1e-8),
        (Implicit(iterations=30), 1e-8),
        (Implicit(solver="neumann", iterations=500, step_size=0.2), 1e-6),
        # Its step size is the student's learning rate.
        (Implicit(solver="neumann", iterations=1000), 1e-6),
    ],
    ids=str,
)
def test_ridge_regression_with_a_penalty_per_feature(mode: Implicit, tolerance: float) -> None:
    assert error(implicit_gradient(mode).grads["log_penalty"], closed_form()) < tolerance


def test_damping_and_the_identity_are_what_they_say() -> None:
    (x, _), (z, t) = data()
    penalty = Penalties().log_penalty.detach().exp()
    theta = optimum(penalty)
    v = z.T @ (z @ theta - t) / N
    hessian = x.T @ x / N + torch.diag(penalty)
    # g = Hθ − xᵀy/N, so ∂g/∂log λ = diag(λ θ).
    damped = -torch.linalg.solve(hessian + 0.7 * torch.eye(D).double(), v) * penalty * theta
    assert (
        error(implicit_gradient(Implicit(iterations=D, damping=0.7)).grads["log_penalty"], damped)
        < 1e-8
    )
    assert (
        error(
            implicit_gradient(Implicit(solver="identity")).grads["log_penalty"],
            -v * penalty * theta,
        )
        < 1e-10
    )
    assert (
        error(
            implicit_gradient(Implicit(solver="identity", step_size=0.3)).grads["log_penalty"],
            -0.3 * v * penalty * theta,
        )
        < 1e-10
    )
    short = Implicit(solver="neumann", iterations=1, step_size=0.1)
    series = -(0.1 * v + 0.1 * (v - 0.1 * hessian @ v)) * penalty * theta
    assert error(implicit_gradient(short).grads["log_penalty"], series) < 1e-10


def by_pseudo_inverse(network: nn.Linear, table: nn.Module, outer: Any, inner: Any) -> Tensor:
    """Return h of a linear student on learned labels, in float64, by the Hessian as a matrix."""
    x, index = inner
    theta = torch.cat([p.detach().flatten() for p in network.parameters()]).double()
    q = table(index).detach().double().softmax(-1).requires_grad_()

    def logits(flat: Tensor, inputs: Tensor) -> Tensor:
        return inputs.double() @ flat[: 4 * D].reshape(4, D).T + flat[4 * D :]

    def inner_loss(flat: Tensor) -> Tensor:
        return -(q * logits(flat, x).log_softmax(-1)).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(inner_loss, theta)
    flat_theta = theta.clone().requires_grad_()
    (v,) = torch.autograd.grad(
        nn.functional.cross_entropy(logits(flat_theta, outer[0]), outer[1]), flat_theta
    )
    (g,) = torch.autograd.grad(inner_loss(flat_theta), flat_theta, create_graph=True)
    w = -torch.linalg.pinv(hessian, rtol=1e-10) @ v
    return -torch.autograd.grad(g @ w, q)[0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-9)], ids=str
)
@pytest.mark.parametrize("rows", [60, 6])
@pytest.mark.parametrize("iterations", [60, 100])
def test_conjugate_gradients_end_where_they_have_converged(
    dtype: torch.dtype, tolerance: float, rows: int, iterations: int
) -> None:
    """The softmax makes H singular, and of 6 examples v has a part outside its range."""
    draw = torch.Generator().manual_seed(3)
    x, z = (torch.randn(n, D, generator=draw, dtype=dtype) for n in (rows, 8))
    table = metapl.problems.Table(torch.randn(40, 4, generator=draw, dtype=dtype))
    y = torch.randint(4, (8,), generator=draw)
    index = torch.randint(40, (rows,), generator=draw)
    torch.manual_seed(3)
    network = nn.Linear(D, 4).to(dtype)
    gradient = metapl.hypergradient(
        table,
        network,
        outer=(z, y),
        inner=(x, index),
        mode=Implicit(iterations=iterations),
        problem=metapl.problems.ExampleLabels(),
        inner_optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        # It would warn of a student that is not at its optimum.
        verify=False,
    )
    expected = by_pseudo_inverse(network, table, (z, y), (x, index))
    assert error(gradient.feedback.double(), expected) < tolerance


def test_negative_curvature_and_a_series_that_diverges_are_refused_and_nothing_moves() -> None:
    problem = toy("mlp")
    for mode in (
        Implicit(iterations=40),
        Implicit(solver="neumann", iterations=20, step_size=50.0),
    ):
        trainer = metapl.BilevelTrainer(**problem.networks(), mode=mode, verify=False)
        tensors_before = everything(problem)
        with pytest.raises(MetaplError):
            trainer.step(problem.labeled, problem.unlabeled)
        assert same(tensors_before, everything(problem))


@pytest.mark.parametrize("step_size", [None, 50.0])
def test_a_series_that_diverges_says_where_its_step_size_is_from(step_size: float | None) -> None:
    problem = toy("mlp")
    networks = problem.networks()
    networks["inner_optimizer"] = torch.optim.SGD(networks["student"].parameters(), lr=50.0)
    mode = Implicit(solver="neumann", iterations=20, step_size=step_size)
    trainer = metapl.BilevelTrainer(**networks, mode=mode, verify=False)
    with pytest.raises(MetaplError, match="diverges with a step size of 50") as caught:
        trainer.step(problem.labeled, problem.unlabeled)
    assert ("the student's learning rate, since step_size was not given" in str(caught.value)) == (
        step_size is None
    )
    assert "expected step_size=... below 2 over" in str(caught.value)


def unsolved_ridge(
    scales: Tensor, *, at_optimum: bool, penalty: float = 1e-5, **options: Any
) -> Any:
    """Return the implicit gradient of a ridge regression in the weights of its examples."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=draw).double() * scales
    y = x @ torch.randn(20, 1, generator=draw).double()
    y = y + 0.1 * torch.randn(60, 1, generator=draw).double()
    student = nn.Linear(20, 1, bias=False).double()
    if at_optimum:
        eye = penalty * torch.eye(20).double()
        student.weight.data = torch.linalg.solve(x.T @ x / 120 + eye, x.T @ y / 120).T
    else:
        nn.init.ones_(student.weight)
    return metapl.hypergradient(
        metapl.problems.Table(torch.zeros(60).double()),
        student,
        outer=(x, y),
        inner=(x, y, torch.arange(60)),
        problem=WeightedRidge(penalty),
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        **options,
    )


class WeightedRidge(metapl.BilevelProblem):
    """A weight for each example, and a penalty."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch[2]).sigmoid())

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        penalty = self.penalty * params["weight"].square().sum()
        return signal.value * (outputs - batch[1]).square().sum(1) + penalty

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch[1]).square().mean()


def test_a_system_that_is_not_solved_is_said() -> None:
    """Columns in different units, as in a table: ten iterations leave a fifth of v and more."""
    scales = torch.logspace(0, -2, 20).double()
    with pytest.warns(
        VerificationWarning, match="after 10 iterations the solver has left a residual"
    ):
        few = unsolved_ridge(scales, at_optimum=True, mode=Implicit(iterations=10), verify=True)
    many = unsolved_ridge(scales, at_optimum=True, mode=Implicit(iterations=200), verify=True)
    assert error(few.feedback, many.feedback) > 0.1
    assert few.numbers["solver_residual"] > 0.1
    assert many.numbers["solver_residual"] < 1e-9
    assert many.numbers["gradient_norm"] < 1e-9


@pytest.mark.parametrize("iterations", [10, 15])
def test_small_eigenvalues_that_are_not_solved_are_said(iterations: int) -> None:
    """Columns in units of 1 to 1e-4: the residual is below 1 %, and h is wrong by a tenth or more.

    The outer rows are others than those of the inner loss.
    """
    draw = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -4, 12).double()
    x, z = (torch.randn(n, 12, generator=draw).double() * scales for n in (60, 40))
    y = x @ torch.randn(12, 1, generator=draw).double()
    y = y + 0.1 * torch.randn(60, 1, generator=draw).double()
    student = nn.Linear(12, 1, bias=False).double()
    ridge = 1e-9 * torch.eye(12).double()
    student.weight.data = torch.linalg.solve(0.5 * x.T @ x / 60 + ridge, 0.5 * x.T @ y / 60).T

    def gradient(iterations: int) -> Any:
        return metapl.hypergradient(
            metapl.problems.Table(torch.zeros(60).double()),
            student,
            outer=(z, z.sum(1, keepdim=True)),
            inner=(x, y, torch.arange(60)),
            problem=WeightedRidge(1e-9),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            mode=Implicit(iterations=iterations),
            verify=True,
        )

    with pytest.warns(VerificationWarning, match="small eigenvalues are not solved"):
        few = gradient(iterations)
    many = gradient(40)
    assert few.numbers["solver_residual"] < 0.01
    assert error(few.feedback, many.feedback) > 0.1
    assert many.numbers["solver_residual"] < 1e-9


@pytest.mark.parametrize("solver", ["cg", "neumann"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_residual_is_that_of_the_solution_that_is_used(solver: Any, damping: float) -> None:
    """v − (H + damping) x by matrices: of a series, (1 − step_size·(H + damping))ⁿ⁺¹ v."""
    (x, _), (z, t) = data()
    penalty = Penalties().log_penalty.detach().exp()
    v = z.T @ (z @ optimum(penalty) - t) / N
    hessian = x.T @ x / N + torch.diag(penalty) + damping * torch.eye(D).double()
    mode = Implicit(solver=solver, iterations=3, step_size=0.1, damping=damping)
    used = mode.solution(
        lambda tree: {"w": (hessian - damping * torch.eye(D).double()) @ tree["w"]}, {"w": v}, 0.1
    )
    assert used.residual is not None
    expected = (v - hessian @ used.x["w"]).norm() / v.norm()
    assert error(used.residual, expected) < 1e-10
    mode = Implicit(solver=solver, iterations=3, step_size=0.1, damping=damping)
    assert (
        error(torch.as_tensor(implicit_gradient(mode).numbers["solver_residual"]), expected) < 1e-6
    )


def test_a_student_away_from_its_optimum_is_said() -> None:
    scales = torch.ones(20).double()
    options: dict[str, Any] = {"mode": Implicit(iterations=100), "verify": True}
    with pytest.warns(VerificationWarning, match="not at the optimum"):
        away = unsolved_ridge(scales, at_optimum=False, **options)
    assert away.numbers["gradient_norm"] > 0.1 * away.numbers["outer_gradient_norm"]
    report = metapl.BilevelTrainer(
        **toy("mlp").networks(), mode=Implicit(damping=1.0), verify=False
    ).step(toy("mlp").labeled, toy("mlp").unlabeled)
    assert report.gradient_norm > 0
    assert report.solver_residual >= 0
