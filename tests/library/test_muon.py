"""Muon for the matrices and AdamW for the rest, in a tuple.

Against double backward by hand, and torch's own steps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, Toy, everything, gradient, product, same, toy
from reference import Rule, Tree, error
from test_lookahead import batches
from torch import Tensor, nn
from torch_versions import require_torch

import metapl
from metapl import Lookahead
from metapl.execution.state import trainable
from metapl.feedback import Forward
from metapl.updates import options_of, rounded_options, update_of

ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1}
NESTEROV: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "nesterov": NESTEROV,
    "momentum": {**NESTEROV, "momentum": 0.8, "nesterov": False, "weight_decay": 0.0},
    "no momentum": {**NESTEROV, "momentum": 0.0},
    "by size": {**NESTEROV, "lr": 0.05, "adjust_lr_fn": "match_rms_adamw"},
    "unclamped": {
        **NESTEROV,
        "adjust_lr_fn": "spectral_unclamped",
        "ns_steps": 3,
        "ns_coefficients": (3.0, -4.0, 2.0),
    },
}


def require_setting(settings: str) -> None:
    if settings == "unclamped":
        require_torch("2.14", "torch.optim.Muon takes spectral_unclamped")


def polar(matrix: Tensor, a: float, b: float, c: float, steps: int) -> Tensor:
    """Return the iteration of Newton and Schulz, written without a thought of roundings.

    From either side of the matrix it is the same.
    """
    x = matrix / torch.linalg.matrix_norm(matrix)
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def muon_and_adamw(
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    adjust_lr_fn: str | None = None,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    adamw: dict[str, Any] = ADAMW,
) -> Rule:
    """Return the rule by hand: Muon for matrices, AdamW for other weights."""
    adamw_rule = reference.adamw(**adamw)

    def factor(rows: int, columns: int) -> float:
        if adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        if adjust_lr_fn == "spectral_unclamped":
            return math.sqrt(rows / columns)
        return math.sqrt(max(1.0, rows / columns))

    def rule(params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        vectors = {name: p for name, p in params.items() if p.ndim != 2}
        grads_of_vectors = {name: grads[name] for name in vectors}
        new_params, adamw_state = adamw_rule(vectors, grads_of_vectors, state and state["adamw"])
        buffers = {}
        for name, p in params.items():
            if name in vectors:
                continue
            old_buffer = state["muon"][name] if state else torch.zeros_like(p)
            buffers[name] = momentum * old_buffer + (1 - momentum) * grads[name]
            direction = buffers[name]
            if nesterov:
                direction = (1 - momentum) * grads[name] + momentum * buffers[name]
            rate = lr * factor(*p.shape)
            step = polar(direction, *ns_coefficients, ns_steps)
            new_params[name] = (1 - lr * weight_decay) * p - rate * step
        ordered = {name: new_params[name] for name in params}
        return ordered, {"muon": buffers, "adamw": adamw_state}

    return rule


def student_of_matrices() -> nn.Module:
    """Return a network of a tall matrix, a wide one, and biases."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, CLASSES))


def toy_of_matrices() -> Toy:
    case = toy("mlp")
    torch.manual_seed(5)
    return replace(case, student=student_of_matrices().double())


def optimizers(network: nn.Module, settings: dict[str, Any] = NESTEROV) -> tuple[Any, Any]:
    matrices = [p for p in network.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim != 2]
    return torch.optim.Muon(matrices, **settings), torch.optim.AdamW(vectors, **ADAMW)


def weights_of(network: nn.Module) -> Tree:
    """Return copies of the weights, by name."""
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def warmed(case: Toy, settings: dict[str, Any], steps: int) -> tuple[tuple[Any, Any], Any]:
    """Return optimizers that have taken steps, and the state of the rule by hand.

    The state does not depend on the weights.
    """
    pair = optimizers(case.student, settings)
    rule = muon_and_adamw(**settings)
    state = None
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        params = weights_of(case.student)
        grads = {
            name: 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in params.items()
        }
        _, state = rule(params, grads, state)
        take_step(pair, case.student, grads)
    return pair, state


def take_step(pair: tuple[Any, Any], student: nn.Module, grads: Tree) -> None:
    """Let both optimizers take a step on these gradients."""
    for name, p in student.named_parameters():
        p.grad = grads[name].clone()
    for optimizer in pair:
        optimizer.step()
        optimizer.zero_grad()


def relative_distance(theta: Tree, exact: Tree, taken: Tree) -> float:
    """Return ‖exact − taken‖ / ‖exact − theta‖: how far a step is from the exact one."""
    gap = {name: exact[name] - taken[name] for name in taken}
    moved = {name: exact[name] - theta[name] for name in taken}
    return float(reference.flat(gap).norm() / reference.flat(moved).norm())


@pytest.mark.parametrize(
    ("mode", "settings", "steps", "warm"),
    product(
        ("unrolled", "forward", Forward(by="tangent", keep_every=2)),
        SETTINGS,
        (1, 3),
        (0, 2),
        usual=["unrolled", "forward", "nesterov", 3, 2],
    ),
)
def test_the_gradient_is_that_of_double_backward_by_hand(
    mode: Any, settings: str, steps: int, warm: int
) -> None:
    require_setting(settings)
    case = toy_of_matrices()
    inner_batches = batches(steps, case)
    pair, state = warmed(case, SETTINGS[settings], warm)
    rule = muon_and_adamw(**SETTINGS[settings])
    expected = reference.several_steps(
        **case.networks(), outer=case.labeled, batches=inner_batches, rule=rule, state=state
    )
    tensors_before = everything(case, *pair)
    result = gradient(case, mode, inner_batches, inner_optimizer=pair)
    assert same(tensors_before, everything(case, *pair))
    for h, g in zip(result.feedback, expected.signal_grads, strict=True):
        assert error(h, -g) < 1e-9
    assert error(result.grads, expected.grads) < 1e-9
    assert error(result.student_params, expected.student_params) < 1e-12


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_rule_that_rounds_is_torchs_own_step(settings: str) -> None:
    require_setting(settings)
    case = toy_of_matrices()
    pair, _ = warmed(case, SETTINGS[settings], 2)
    update = update_of(pair, trainable(case.student))
    params = weights_of(case.student)
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    options = rounded_options(options_of(update.optimizer))
    rounded, rounded_state = update.update(params, grads, update.read_state(), options)
    exact, _ = update.update(params, grads, update.read_state())
    take_step(pair, case.student, grads)
    taken = weights_of(case.student)
    assert error(rounded, taken) < 1e-12
    for name, state in update.read_state().items():
        if "momentum_buffer" in state:
            buffer = rounded_state[name]["momentum_buffer"]
            assert error(buffer, state["momentum_buffer"]) < 1e-12
    assert 1e-4 < relative_distance(params, exact, taken) < 3e-2


def trainer_of(case: Toy, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    return metapl.BilevelTrainer(
        **case.networks(),
        mode=mode,
        inner_optimizer=optimizers(case.student),
        outer_optimizer=optimizers(case.teacher),
        **options,
    )


@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce", "none"])
def test_a_trainer_takes_torchs_own_steps_and_reports_their_distance(mode: str) -> None:
    case = toy_of_matrices()
    trainer = trainer_of(case, mode, teacher_losses=())
    twin = toy_of_matrices().student
    pair = optimizers(twin)
    data = case.data()
    for _ in range(2):
        update = update_of(pair, trainable(twin))
        theta = weights_of(twin)
        report = trainer.step(**data)
        loss = nn.functional.cross_entropy(twin(data["inner"]), report.signal.value)
        by_autograd = torch.autograd.grad(loss, [*twin.parameters()])
        grads = dict(zip(theta, by_autograd, strict=True))
        exact, _ = update.update(theta, grads, update.read_state())
        take_step(pair, twin, grads)
        taken = weights_of(twin)
        assert error(dict(case.student.named_parameters()), taken) < 1e-9
        distance = relative_distance(theta, exact, taken)
        assert report.step_rounding == pytest.approx(distance)
        # The momentum of a few examples has few directions; the rest is noise.
        assert 1e-4 < report.step_rounding < 1.0


@pytest.mark.parametrize("mode", [Forward(keep_every=1), Forward(keep_every=2), "none"])
def test_several_steps_are_those_without_the_rounding(mode: Any) -> None:
    """The gradients are of these steps, and so is where the student goes."""
    case = toy_of_matrices()
    trainer = trainer_of(case, mode, lookahead=3, teacher_losses=())
    twins = [toy_of_matrices().teacher, toy_of_matrices().student]
    teacher, student = twins
    update = update_of(optimizers(student), trainable(student))
    inner_batches = batches(3, case)
    report = trainer.step(case.labeled, Lookahead(inner_batches))
    for batch in inner_batches:
        signal = teacher(batch).softmax(-1).detach()
        loss = nn.functional.cross_entropy(student(batch), signal)
        by_autograd = torch.autograd.grad(loss, [*student.parameters()])
        grads = dict(zip(weights_of(student), by_autograd, strict=True))
        update.take_differentiated_step(trainable(student), grads)
    assert error(dict(case.student.named_parameters()), weights_of(student)) < 1e-9
    assert report.step_rounding == 0


@pytest.mark.parametrize("lookahead", [1, 2])
def test_the_gradient_is_verified_in_the_weights_type(lookahead: int) -> None:
    case = toy_of_matrices()
    trainer = trainer_of(case, lookahead=lookahead)
    unlabeled: Any = case.unlabeled
    if lookahead > 1:
        unlabeled = Lookahead(batches(lookahead, case))
    check = metapl.check_gradient(trainer, outer=case.labeled, inner=unlabeled)
    assert check.passed, str(check)
    assert check.status == "right"
    # The first step verifies once more.
    trainer.step(case.labeled, unlabeled)
    result = gradient(case, inner=unlabeled, inner_optimizer=trainer.update, verify=True)
    assert all(g.isfinite().all() for g in result.grads.values())


def test_the_rates_of_both_follow_schedules() -> None:
    case = toy_of_matrices()
    inner_batches = batches(3, case)
    pair = optimizers(case.student)
    muon, adamw = pair

    def falling(step: int) -> float:
        return 1.0 - 0.2 * step

    def gradient_by(*schedulers: Any) -> Tree:
        return metapl.hypergradient(
            **case.networks(),
            outer=case.labeled,
            inner=Lookahead(inner_batches, settings=metapl.scheduled_settings(schedulers, steps=3)),
            inner_optimizer=pair,
            mode="forward",
        ).grads

    rules = []
    for step in range(3):
        muon_settings = {**NESTEROV, "lr": NESTEROV["lr"] * 0.5**step}
        adamw_settings = {**ADAMW, "lr": ADAMW["lr"] * (1 - 0.2 * step)}
        rules.append(muon_and_adamw(**muon_settings, adamw=adamw_settings))
    expected = reference.several_steps(
        **case.networks(), outer=case.labeled, batches=inner_batches, rule=rules
    )
    halving = torch.optim.lr_scheduler.StepLR(muon, 1, 0.5)
    falling_of_adamw = torch.optim.lr_scheduler.LambdaLR(adamw, falling)
    assert error(gradient_by(halving, falling_of_adamw), expected.grads) < 1e-9
    rates = [optimizer.param_groups[0]["lr"] for optimizer in pair]
    assert rates == [NESTEROV["lr"], ADAMW["lr"]]
