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
    """Of the wide one of a matrix and its transpose, without a thought of roundings."""
    x = matrix / torch.linalg.matrix_norm(matrix)
    for _ in range(steps):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x  # from either side it is the same
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
    of_others = reference.adamw(**adamw)

    def rule(params: Tree, grads: Tree, state: Any) -> tuple[Tree, Any]:
        others = {name: p for name, p in params.items() if p.ndim != 2}
        moved, of_adamw = of_others(
            others, {name: grads[name] for name in others}, state and state["adamw"]
        )
        buffers = {}
        for name, p in params.items():
            if name in others:
                continue
            old = state["muon"][name] if state else torch.zeros_like(p)
            buffers[name] = momentum * old + (1 - momentum) * grads[name]
            step = (
                (1 - momentum) * grads[name] + momentum * buffers[name]
                if nesterov
                else buffers[name]
            )
            rows, columns = p.shape
            by = {
                "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
                "spectral_unclamped": (rows / columns) ** 0.5,
            }
            rate = lr * by.get(str(adjust_lr_fn), max(1.0, rows / columns) ** 0.5)
            moved[name] = (1 - lr * weight_decay) * p - rate * polar(
                step, *ns_coefficients, ns_steps
            )
        return {name: moved[name] for name in params}, {"muon": buffers, "adamw": of_adamw}

    return rule


def student_of_matrices() -> nn.Module:
    """Return weights: a tall one, a wide one, and biases."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, CLASSES))


def problem() -> Toy:
    found = toy("mlp")
    torch.manual_seed(5)
    return replace(found, student=student_of_matrices().double())


def optimizers(network: nn.Module, settings: dict[str, Any] = NESTEROV) -> tuple[Any, Any]:
    matrices, others = (
        [p for p in network.parameters() if (p.ndim == 2) == which] for which in (True, False)
    )
    return torch.optim.Muon(matrices, **settings), torch.optim.AdamW(others, **ADAMW)


def warmed(given: Toy, settings: dict[str, Any], steps: int) -> tuple[tuple[Any, Any], Any]:
    """Return optimizers that have taken steps, and the state of the rule by hand.

    The state does not depend on the weights.
    """
    real, rule, state = optimizers(given.student, settings), muon_and_adamw(**settings), None
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        params = {name: p.detach().clone() for name, p in given.student.named_parameters()}
        grads = {
            n: 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()
        }
        _, state = rule(params, grads, state)
        stepped(real, given.student, grads)
    return real, state


def stepped(real: tuple[Any, Any], student: nn.Module, grads: Tree) -> None:
    for name, p in student.named_parameters():
        p.grad = grads[name].clone()
    for one in real:
        one.step()
        one.zero_grad()


@pytest.mark.parametrize(
    ("mode", "settings", "steps", "warm"),
    product(
        ("unrolled", "forward", Forward(by="tangent", keep_every=2)), SETTINGS, (1, 3), (0, 2),
        usual=["unrolled", "forward", "nesterov", 3, 2],
    ),
)  # fmt: skip
def test_the_gradient_is_that_of_double_backward_by_hand(
    mode: Any, settings: str, steps: int, warm: int
) -> None:
    require_setting(settings)
    given = problem()
    ahead = batches(steps, given)
    real, state = warmed(given, SETTINGS[settings], warm)
    rule = muon_and_adamw(**SETTINGS[settings])
    expected = reference.several_steps(
        **given.networks(), labeled=given.labeled, batches=ahead, rule=rule, state=state
    )
    before = everything(given, *real)
    found = gradient(given, mode, ahead, inner_optimizer=real)
    assert same(before, everything(given, *real))
    for h, g in zip(found.feedback, expected.signal_grads, strict=True):
        assert error(h, -g) < 1e-9
    assert error(found.grads, expected.grads) < 1e-9
    assert error(found.student_params, expected.student_params) < 1e-12


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_rule_that_rounds_is_torchs_own_step(settings: str) -> None:
    require_setting(settings)
    given = problem()
    real, _ = warmed(given, SETTINGS[settings], 2)
    update = update_of(real, trainable(given.student))
    params = {n: p.detach().clone() for n, p in given.student.named_parameters()}
    grads = {n: torch.randn_like(p) for n, p in params.items()}
    rounded, state = update.update(
        params, grads, update.read_state(), rounded_options(options_of(update.optimizer))
    )
    exact, _ = update.update(params, grads, update.read_state())
    stepped(real, given.student, grads)
    own = {n: p.detach() for n, p in given.student.named_parameters()}
    assert error(rounded, own) < 1e-12
    assert all(error(state[n]["momentum_buffer"], held["momentum_buffer"]) < 1e-12
               for n, held in update.read_state().items() if "momentum_buffer" in held)  # fmt: skip
    moved, gap = ({n: exact[n] - other[n] for n in own} for other in (params, own))
    assert 1e-4 < reference.flat(gap).norm() / reference.flat(moved).norm() < 3e-2


def trainer_of(given: Toy, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    made = {
        "inner_optimizer": optimizers(given.student),
        "outer_optimizer": optimizers(given.teacher),
    }
    return metapl.BilevelTrainer(**given.networks(), mode=mode, **made, **options)


@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce", "none"])
def test_a_trainer_takes_torchs_own_steps_and_reports_their_distance(mode: str) -> None:
    given, twin = problem(), problem()
    trainer, real = trainer_of(given, mode, teacher_losses=()), optimizers(twin.student)
    data = given.data()
    for _ in range(2):
        update = update_of(real, trainable(twin.student))
        theta = {n: p.detach().clone() for n, p in twin.student.named_parameters()}
        report = trainer.step(**data)
        loss = nn.functional.cross_entropy(twin.student(data["unlabeled"]), report.signal.value)
        names = [n for n, _ in twin.student.named_parameters()]
        grads = dict(
            zip(names, torch.autograd.grad(loss, [*twin.student.parameters()]), strict=True)
        )
        exact, _ = update.update(theta, grads, update.read_state())
        stepped(real, twin.student, grads)
        taken = dict(twin.student.named_parameters())
        assert error(dict(given.student.named_parameters()), taken) < 1e-9
        moved, gap = ({n: exact[n] - other[n] for n in taken} for other in (theta, taken))
        assert report.step_rounding == pytest.approx(
            float(reference.flat(gap).norm() / reference.flat(moved).norm())
        )
        assert (
            1e-4 < report.step_rounding < 1.0
        )  # of a few examples the momentum has few directions; the rest is noise


@pytest.mark.parametrize("lookahead", [1, 2])
def test_the_gradient_is_verified_in_the_weights_type(lookahead: int) -> None:
    given = problem()
    trainer = trainer_of(given, lookahead=lookahead)
    unlabeled = Lookahead(batches(lookahead, given)) if lookahead > 1 else given.unlabeled
    found = metapl.check_gradient(trainer, labeled=given.labeled, unlabeled=unlabeled)
    assert found.passed, str(found)
    assert found.status == "right"
    trainer.step(given.labeled, unlabeled)  # verified once more
    result = gradient(given, unlabeled=unlabeled, inner_optimizer=trainer.update, verify=True)
    assert all(g.isfinite().all() for g in result.grads.values())


def test_the_rates_of_both_follow_schedules() -> None:
    given = problem()
    ahead = batches(3, given)
    real = optimizers(given.student)
    rates = torch.optim.lr_scheduler.StepLR(real[0], 1, 0.5), lambda step: 1.0 - 0.2 * step
    rules = [
        muon_and_adamw(
            **{**NESTEROV, "lr": NESTEROV["lr"] * 0.5**number},
            adamw={**ADAMW, "lr": ADAMW["lr"] * (1 - 0.2 * number)},
        )
        for number in range(3)
    ]
    expected = reference.several_steps(
        **given.networks(), labeled=given.labeled, batches=ahead, rule=rules
    )
    how = {"labeled": given.labeled, "mode": "forward", "inner_optimizer": real}
    found = metapl.hypergradient(
        **given.networks(), unlabeled=Lookahead(ahead, schedule=rates), **how
    )
    assert error(found.grads, expected.grads) < 1e-9
    assert [one.param_groups[0]["lr"] for one in real] == [NESTEROV["lr"], ADAMW["lr"]]
    # One factor is of all of them.
    together, apart = (
        metapl.hypergradient(
            **given.networks(), unlabeled=Lookahead(ahead, schedule=one), **how
        ).grads
        for one in (rates[1], (rates[1], rates[1]))
    )
    assert error(together, apart) == 0.0
