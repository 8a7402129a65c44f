"""Inputs, kernels and losses by which a replay would differ from the step: right, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems_zoo import ANYWHERE, CLASSES, Toy, mlp, toy
from reference import error
from replays import (
    EXACT,
    RULE,
    TOLERANCE,
    _seeded,  # noqa: F401  # used by every test
    case,
    check_exact,
    check_refused,
    found,
    plainly,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import metapl
from metapl import MetaplError
from metapl.feedback import Difference, ReinforcePerExample

# --------------------------------------------------------------------------------------------- inputs and kernels


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(0.5))


@pytest.mark.parametrize("mode", ANYWHERE)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_network_that_changes_its_input_is_refused(who: str, mode: str) -> None:
    networks = {"student": mlp().double(), "teacher": mlp().double(), who: InPlace().double()}
    check_refused(case(networks["student"], networks["teacher"]), mode, f"the {who} changed its input in place.*clone")


class Padded(nn.Module):
    """An encoder whose padded rows enter the output."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(len(x), 4, dtype=torch.bool)
        mask[:, 3] = True
        return self.head(self.encoder(x.flatten(1, 2), src_key_padding_mask=mask).mean(1))


@pytest.mark.parametrize("mode", [*EXACT, "difference_one_sided", "reinforce_per_example"])
def test_an_encoder_in_eval_mode_with_padding(mode: str) -> None:
    """Without a graph PyTorch would take a fused path, with other numbers in padded rows."""
    torch.manual_seed(5)
    check_exact(case(Padded().double().eval()), mode)


class Mixed(nn.Module):
    """A float32 body and a float64 head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).tanh().double())


@pytest.mark.parametrize("mode", [*EXACT, "difference_one_sided"])
def test_a_float32_body_under_a_float64_head(mode: str) -> None:
    torch.manual_seed(5)
    base = case(Mixed(), dtype=torch.float32)
    problem = Toy(mlp().double(), base.student, base.labeled, base.unlabeled, 0)
    problem.teacher[0] = Widen()
    expected, _ = plainly(problem)
    assert error(found(problem, mode).grads, expected) < (5e-3 if "difference" in mode else 1e-5)


class Widen(nn.Flatten):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


# ---------------------------------------------------------------------------------------------- losses of targets


class Generalised(metapl.PseudoLabels):
    """Generalised cross-entropy of a target: (1 − ⟨t, p⟩^0.7)/0.7, not linear in t."""

    def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
        target = signal.value
        if not target.is_floating_point():
            target = F.one_hot(target, outputs.shape[-1]).to(outputs)
        return (1 - (target * outputs.softmax(-1)).sum(-1) ** 0.7) / 0.7


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_hard_labels_and_an_inner_loss_that_is_not_linear_in_its_target(mode: str) -> None:
    problem = case(mlp().double())
    inner = RULE.build(problem.student)
    given = {**problem.networks(), **problem.data(), "mode": mode, "inner_optimizer": inner}
    with pytest.raises(metapl.MetaplError, match=r"not linear in its target.*reinforce_per_example"):
        metapl.hypergradient(**given, problem=Generalised(kind="hard"))
    soft = metapl.hypergradient(**given, problem=Generalised(kind="soft"))
    exact = metapl.hypergradient(**{**given, "mode": "unrolled"}, problem=Generalised(kind="soft"))
    assert error(soft.grads, exact.grads) < TOLERANCE[mode]


@pytest.mark.parametrize("mode", [Difference(), Difference(one_sided=True)], ids=["central", "one_sided"])
@pytest.mark.parametrize("wrong", [(), (1.0,), (1.0, 8.0), (1.0, 8.0, 64.0)], ids=str)
def test_a_difference_that_is_spoilt_is_taken_again_over_a_smaller_move(
    wrong: tuple[float, ...], mode: Difference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units that switch on within a move spoil it by as much as all of it, and a smaller move meets fewer of them."""
    real = Difference.tangent

    def spoilt(self: Difference, step: Any, w: Any, shorter: float = 1.0) -> Any:
        tangent = real(self, step, w, shorter)
        return replace(tangent, z_dot=3 * tangent.z_dot) if shorter in wrong else tangent

    found = [case(mlp().double()) for _ in range(2)]
    exact = metapl.hypergradient(
        **found[0].networks(), **found[0].data(), inner_optimizer=RULE.build(found[0].student)
    ).grads
    monkeypatch.setattr(Difference, "tangent", spoilt)
    call = lambda: metapl.hypergradient(  # noqa: E731
        **found[0].networks(), **found[0].data(), mode=mode, inner_optimizer=RULE.build(found[0].student)
    )
    if len(wrong) == 3:
        with pytest.raises(MetaplError, match="forward and backward passes are not of one function"):
            call()
    else:
        assert error(call().grads, exact) < 1e-3


@pytest.mark.parametrize("mode", [Difference(), Difference(one_sided=True)], ids=["central", "one_sided"])
def test_a_small_network_of_relus_trains_by_differences(mode: Difference) -> None:
    torch.manual_seed(5)
    networks = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2)]
    trainer = metapl.BilevelTrainer(*networks, mode)
    labeled, unlabeled = (torch.randn(32, 16), torch.randint(0, 4, (32,))), torch.randn(32, 16)
    for _ in range(320):
        trainer.step(labeled, unlabeled)


@pytest.mark.parametrize("mode", ["forward", "difference"])
@pytest.mark.parametrize("seed", [39, 56, 61, 69, 84, 120])
def test_slopes_that_cancel_to_rounding_are_no_disagreement(seed: int, mode: str) -> None:
    """Batch normalization takes a bias away, and a first step of Adam makes its whole direction of such biases."""
    torch.manual_seed(seed)
    networks = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    inner, outer = (torch.optim.Adam(network.parameters(), lr=0.01) for network in networks[::-1])
    trainer = metapl.BilevelTrainer(*networks, mode, inner_optimizer=inner, outer_optimizer=outer)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    trainer.step((x, y), torch.randn(8, 4))


class Rounded(nn.Module):
    """A student in float32 that rounds its outputs, straight through, to so many levels a unit."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.network, self.levels = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)), levels

    def forward(self, x: Tensor) -> Tensor:
        z = self.network(x)
        return z + ((z * self.levels).round() / self.levels - z).detach()


@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("mode", [Difference(), ReinforcePerExample(tangent="difference")], ids=["soft", "sampled"])
def test_rounding_in_float32_is_refused_by_a_difference(mode: Any, levels: int) -> None:
    """Its outputs do not move, or jump; rounding of the numbers is no excuse, nor is it at a smaller move."""
    for seed in range(4):
        base = toy("mlp", dtype=torch.float32, rows=64, seed=seed)
        student = Rounded(levels)
        inner = torch.optim.SGD(student.parameters(), lr=0.1)
        with pytest.raises(metapl.MetaplError, match="the feedback would be wrong"):
            metapl.hypergradient(base.teacher, student, **base.data(), mode=mode, inner_optimizer=inner)


class Jump(nn.Module):
    """The units of one example of the inner batch jump at their sum of today."""

    def forward(self, h: Tensor) -> Tensor:
        if not hasattr(self, "today"):
            self.register_buffer("today", h.detach()[0].sum(), persistent=False)
        jump = torch.zeros_like(h)
        if h.shape[0] == 64:
            jump[0] = 1e-2 * (h.detach()[0].sum() >= self.today)
        return h + jump


def test_jumps_that_the_slopes_do_not_see_are_refused() -> None:
    """Where student and teacher agree the loss is flat, and its feedback is not."""
    base = toy("mlp", dtype=torch.float32, rows=64)
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), Jump(), nn.Linear(32, CLASSES))
    student(base.unlabeled)
    inner = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(metapl.MetaplError, match="outputs jump"):
        metapl.hypergradient(base.teacher, student, **base.data(), mode="difference", inner_optimizer=inner)


# ------------------------------------------------------------------------------------ cached and complex weights


class Bounded(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w.tanh()


def bounded() -> nn.Module:
    student = mlp().double()
    parametrize.register_parametrization(student[1], "weight", Bounded())
    return student


@pytest.mark.parametrize("mode", EXACT)
def test_parametrized_weights_that_are_cached_around_a_step(mode: str) -> None:
    """A cached weight would be that of θ in every pass; the cache is empty after a step, which moved it."""
    problem, again = case(bounded()), case(bounded())
    again.student.load_state_dict(problem.student.state_dict())
    expected, _ = plainly(problem)
    inner = [RULE.build(one.student) for one in (problem, again)]
    trainers = [
        metapl.BilevelTrainer(**one.networks(), mode=mode, inner_optimizer=of, teacher_losses=())
        for one, of in zip((problem, again), inner, strict=True)
    ]
    with parametrize.cached():
        stale = problem.student[1].weight
        assert error(found(problem, mode).grads, expected) < TOLERANCE[mode]
        for _ in range(2):
            trainers[0].step(**problem.data())
        assert not torch.equal(problem.student[1].weight, stale)
        assert problem.student[1].weight is problem.student[1].weight, "the caller's cache is as it was"
    for _ in range(2):
        trainers[1].step(**again.data())
    assert all(map(torch.equal, problem.student.parameters(), again.student.parameters()))


class Spectral(nn.Module):
    """Complex weights, or a complex buffer, as those of rotary embeddings."""

    def __init__(self, learned: bool, real: bool = True) -> None:
        super().__init__()
        self.real, w = real, torch.randn(16, 16, dtype=torch.complex128) / 4
        self.w = nn.Parameter(w) if learned else nn.Buffer(w)
        self.head = nn.Linear(16, CLASSES).double()

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).to(self.w.dtype) @ self.w
        z = self.head(z.abs())
        return z if self.real else z * 1j


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("mode", ANYWHERE)
def test_complex_weights_and_outputs_are_refused(mode: str, optimizer: Any) -> None:
    for student, text in (
        (Spectral(learned=True), r"the student's w is complex .*view_as_real"),
        (Spectral(learned=False, real=False), r"the student returned .*complex128.*expected real outputs"),
    ):
        problem = case(student)
        inner = optimizer(student.parameters(), lr=0.1)
        before = [p.clone() for p in student.parameters()]
        with pytest.raises(MetaplError, match=text):
            metapl.hypergradient(**problem.networks(), **problem.data(), mode=mode, inner_optimizer=inner)
        with pytest.raises(MetaplError, match=text):
            metapl.BilevelTrainer(**problem.networks(), mode=mode, inner_optimizer=inner).step(**problem.data())
        assert all(map(torch.equal, before, student.parameters()))


@pytest.mark.parametrize("mode", EXACT)
def test_a_complex_buffer_is_exact(mode: str) -> None:
    check_exact(case(Spectral(learned=False)), mode)
