"""The functional updates against the optimisers themselves, and their pullbacks against autograd and differences."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torchopt
from problems_zoo import OPTIMISERS, toy, warm
from reference import error

from metapl.parts import trainable
from metapl.updates import Clipped, update_of

TORCH = [name for name in OPTIMISERS if name.startswith("torch_")]
TORCHOPT = [name for name in OPTIMISERS if name.startswith("torchopt")]


def gradients(student: torch.nn.Module, seed: int = 11) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in student.named_parameters()}


def values(student: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in student.named_parameters()}


def check_three_steps(functional: Any, student: torch.nn.Module) -> None:
    """θ′ by the pure update, its state carried along, and by the optimizer's own step."""
    params, state = values(student), functional.read_state()
    for seed in range(3):
        g = gradients(student, seed)
        moved = params, state = functional.update(params, g, state)
        functional.commit(trainable(student), g, lambda moved=moved: moved)
        assert error(params, values(student)) < 1e-14


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", TORCH)
def test_the_functional_update_is_the_optimisers_own_step(name: str, steps: int) -> None:
    """In θ′ and, over three more steps, in the state."""
    problem = toy("batch_norm")
    student = problem.student
    real, _, _ = warm(problem, OPTIMISERS[name], steps)
    functional = update_of(real, trainable(student))
    check_three_steps(functional, student)
    assert all(p.grad is None for p in student.parameters())


def groups(student: torch.nn.Module) -> list[dict[str, Any]]:
    first, *rest = student.parameters()
    return [{"params": [first], "lr": 0.5}, {"params": rest[:1], "weight_decay": 0.2}, {"params": rest[1:]}]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
    ],
)
def test_param_groups_keep_their_own_options(cls: Any, options: dict[str, Any]) -> None:
    student = toy("mlp").student
    real = cls(groups(student), **options)
    functional = update_of(real, trainable(student))
    check_three_steps(functional, student)
    check_pullback(functional, student)


def check_pullback(functional: Any, student: torch.nn.Module, tolerance: float = 1e-10) -> None:
    """w = (∂U/∂g)ᵀ v by the library, and by autograd through ``update``."""
    params, state = values(student), functional.read_state()
    g = {n: t.requires_grad_() for n, t in gradients(student, 21).items()}
    v = gradients(student, 22)
    moved, _ = functional.update(params, g, state)
    by_autograd = torch.autograd.grad(sum((moved[n] * v[n]).sum() for n in v), list(g.values()))
    w = functional.pullback(params, {n: t.detach() for n, t in g.items()}, state, v)
    assert error(w, dict(zip(g, by_autograd, strict=True))) < tolerance


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_pullback_is_the_updates_vjp(name: str, steps: int) -> None:
    problem = toy("mlp")
    real, state, _ = warm(problem, OPTIMISERS[name], steps)
    check_pullback(update_of(real, trainable(problem.student), state), problem.student)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_pullback_agrees_with_central_differences_of_the_real_update(name: str, steps: int) -> None:
    """⟨w, d⟩ = d/dε ⟨v, U(θ, g + εd)⟩, U the optimiser itself (its step, or its transform untouched)."""
    problem = toy("mlp")
    real, state, _ = warm(problem, OPTIMISERS[name], steps)
    student = problem.student
    functional = update_of(real, trainable(student), state)
    theta, g, v, d = values(student), *(gradients(student, seed) for seed in (31, 32, 33))
    w = functional.pullback(theta, g, functional.read_state(), v)

    def along(moved: float) -> torch.Tensor:
        twin = toy("mlp")
        optimizer, inner_state, _ = warm(twin, OPTIMISERS[name], steps)
        grads = {n: g[n] + moved * d[n] for n in g}
        if isinstance(optimizer, torch.optim.Optimizer):
            for n, p in twin.student.named_parameters():
                p.grad = grads[n]
            optimizer.step()
            new = values(twin.student)
        else:
            updates, _ = optimizer.update(grads, inner_state, params=theta, inplace=False)
            new = {n: theta[n] + updates[n] for n in theta}
        return sum((v[n] * new[n]).sum() for n in v)

    slope = (along(1e-5) - along(-1e-5)) / 2e-5
    expected = sum((w[n] * d[n]).sum() for n in w)
    assert float(slope) == pytest.approx(float(expected), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", TORCHOPT)
def test_a_fresh_transform_with_a_saved_state_goes_on_like_the_old_one(name: str) -> None:
    """TorchOpt's own momentum forgets the saved state on a fresh transform's first call."""
    student = toy("mlp").student
    old = update_of(OPTIMISERS[name].build(student), trainable(student))
    params, state = values(student), old.read_state()
    for seed in range(3):
        params, state = old.update(params, gradients(student, seed), state)
    fresh = update_of(OPTIMISERS[name].build(student), trainable(student), state)
    went_on, _ = old.update(params, gradients(student, 9), state)
    resumed, _ = fresh.update(params, gradients(student, 9), fresh.read_state())
    assert all(torch.equal(went_on[n], resumed[n]) for n in went_on)


def test_dampening_of_a_transform_damps_the_first_step_too() -> None:
    """TorchOpt takes the first gradient whole, which a state handed to a fresh transform cannot tell."""
    student = toy("mlp").student
    transform = torchopt.sgd(0.3, momentum=0.9, dampening=0.4)
    functional = update_of(transform, trainable(student))
    g = gradients(student)
    moved, _ = functional.update(values(student), g, functional.read_state())
    assert error(moved, {n: p - 0.3 * 0.6 * g[n] for n, p in values(student).items()}) < 1e-14


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_the_clip_is_torchopts_and_has_its_derivative(max_norm: float, norm_type: float) -> None:
    """TorchOpt computes the norm outside autograd; the values must be its, the derivative the true one."""
    student = toy("mlp").student
    theta, g = values(student), gradients(student)
    plain = torchopt.clip_grad_norm(max_norm, norm_type)
    expected, _ = plain.update(g, plain.init(theta), params=theta, inplace=False)
    functional = update_of(torchopt.clip_grad_norm(max_norm, norm_type), trainable(student))
    moved, _ = functional.update(theta, g, functional.read_state())
    assert error(moved, {n: theta[n] + expected[n] for n in g}) < 1e-14
    check_pullback(functional, student)


@pytest.mark.parametrize("name", ["torch_sgd_nesterov", "torch_adamw", "torchopt_sgd_nesterov"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_an_update_behind_a_clip_is_that_of_clipped_gradients(max_norm: float, name: str) -> None:
    """The values of ``torch.nn.utils.clip_grad_norm_``, the optimiser's own step on them, and its derivative."""
    problem = toy("mlp")
    real, state, _ = warm(problem, OPTIMISERS[name], 2)
    student = problem.student
    functional = Clipped(update_of(real, trainable(student), state), max_norm)
    g = gradients(student)
    moved, new_state = functional.update(values(student), g, functional.read_state())
    for n, p in student.named_parameters():
        p.grad = g[n].clone()
    torch.nn.utils.clip_grad_norm_(student.parameters(), max_norm)
    clipped = {n: p.grad for n, p in student.named_parameters()}
    expected, _ = functional.inner.update(values(student), clipped, functional.read_state())
    assert error(moved, expected) < 1e-7  # clip_grad_norm_ adds the norms of the parameters in another order
    check_pullback(functional, student)
    functional.commit(trainable(student), g, lambda: (moved, new_state))
    assert error(values(student), moved) < 1e-14


def test_parameters_that_the_loss_does_not_reach_do_not_move() -> None:
    student = toy("mlp").student
    real = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.5)
    functional = update_of(real, trainable(student))
    g = gradients(student)
    last = list(g)[-1]
    del g[last]
    before = values(student)
    moved, _ = functional.update(before, g, functional.read_state())
    functional.commit(trainable(student), g, lambda: (moved, None))
    assert torch.equal(moved[last], before[last])
    assert error(moved, values(student)) < 1e-14


@pytest.mark.parametrize("decayed", [False, True])
def test_a_scheduled_learning_rate_is_read_at_every_step(decayed: bool) -> None:
    student = toy("mlp").student
    real = torch.optim.SGD(student.parameters(), lr=0.4)
    functional = update_of(real, trainable(student))
    if decayed:
        real.param_groups[0]["lr"] = 0.1
    v = gradients(student)
    w = functional.pullback(values(student), v, functional.read_state(), v)
    eta = 0.1 if decayed else 0.4
    assert functional.learning_rate == eta
    assert error(w, {n: -eta * t for n, t in v.items()}) < 1e-14


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_adjoints_over_three_steps_are_those_of_the_rule_unrolled(name: str, steps: int, clip: float | None) -> None:
    """Through θ and through the optimizer's state, whose rule is written out in the reference.

    A gradient that depends on θ stands for the student, so that θ's own cotangent counts.
    """
    optimiser = OPTIMISERS[name]
    problem = toy("mlp")
    real, state, rule_state = warm(problem, optimiser, steps)
    update = update_of(real, trainable(problem.student), state)
    update = update if clip is None else Clipped(update, clip)
    rule = optimiser.rule if clip is None else reference.clipped(clip, optimiser.rule)
    pull = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in problem.student.named_parameters()}

    def gradient(theta: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: torch.tanh(theta[n]) * 0.3 + given[n] for n in theta}

    givens = [{n: g.requires_grad_() for n, g in gradients(problem.student, seed).items()} for seed in (41, 42, 43)]
    theta: Any = values(problem.student)
    for given in givens:
        theta, rule_state = rule(theta, gradient(theta, given), rule_state)
    expected = torch.autograd.grad(
        sum((theta[n] * pull[n]).sum() for n in pull), [g for given in givens for g in given.values()]
    )

    theta, state = values(problem.student), update.read_state()
    records = []
    for given in givens:
        g = {n: t.detach() for n, t in gradient(theta, given).items()}
        records.append((theta, g, state))
        theta, state = update.update(theta, g, state)
    bar, state_bar, found = pull, None, []
    for theta, g, state in reversed(records):
        cotangents = update.vjp(theta, g, state, bar, state_bar)
        found.append(cotangents.gradient)
        bar = {
            n: t + 0.3 * (1 - torch.tanh(theta[n]) ** 2) * cotangents.gradient[n] for n, t in cotangents.params.items()
        }
        state_bar = cotangents.state
    flat = [w[n] for w in reversed(found) for n in w]
    for one, other in zip(flat, expected, strict=True):
        assert error({"": one}, {"": other}) < optimiser.tolerance
