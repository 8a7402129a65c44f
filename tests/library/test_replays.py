"""Students and teachers whose passes are hard to run again: the gradient is that of plain double backward, or refused.

The reference is double backward on the module itself: its weights are swapped by hand, and hooks, buffers and
checkpoints act as they do in training.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems_zoo import ANYWHERE, CLASSES, Toy, everything, mlp, same
from reference import error
from replays import (
    ALL,
    EXACT,
    RULE,
    TOLERANCE,
    _seeded,  # noqa: F401  # used by every test
    case,
    check_exact,
    check_refused,
    found,
    plainly,
    twin,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metapl

REPLAYING = [name for name in ALL if name in ("forward", "difference") or "per_example" in name or "sided" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["forward", "difference", "difference_one_sided"])
def test_outputs_that_are_zero_have_a_derivative(mode: str, dtype: torch.dtype) -> None:
    """As those of a network whose last layer begins with zeros, where the move alone has a size."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)
    nn.init.zeros_(student[-1].weight)
    nn.init.zeros_(student[-1].bias)
    problem = case(student, dtype=dtype)
    assert error(found(problem, mode).grads, plainly(problem)[0]) < 1e-3


# ----------------------------------------------------------------------------------------- activation checkpoints


class Checkpointed(nn.Module):
    """Two blocks, each under a checkpoint of its own, or none."""

    def __init__(self, reentrant: bool | None, *, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Linear(16, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h) if self.reentrant is None else checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", [*EXACT, "reinforce_per_example"])
def test_checkpoints_in_the_student(mode: str, reentrant: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(5)
    student = Checkpointed(reentrant, **options).double()
    other = copy.deepcopy(student)  # plain double backward refuses reentrant checkpoints
    other.reentrant = False
    check_exact(case(student), mode, case(other))


@pytest.mark.parametrize("mode", EXACT)
def test_a_checkpoint_changes_nothing(mode: str) -> None:
    torch.manual_seed(5)
    plain = Checkpointed(None, norm=True).double()
    grads = []
    for reentrant in (None, True, False):
        student = copy.deepcopy(plain)
        student.reentrant = reentrant
        grads.append(found(case(student), mode).grads)
    assert error(grads[1], grads[0]) < 1e-12
    assert error(grads[2], grads[0]) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_the_teacher(reentrant: bool) -> None:
    torch.manual_seed(5)
    teacher, student = Checkpointed(None, norm=True, dropout=0.4).double(), mlp().double()
    grads = []
    for kind in (None, reentrant):
        torch.manual_seed(1)
        teacher.reentrant = kind
        grads.append(found(case(student, teacher), "forward").grads)
    assert error(*grads) < 1e-12


# ------------------------------------------------------------------------------------------------------- buffers


class OwnNorm(nn.BatchNorm1d):
    """A batch norm with a forward of its own, which always updates its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        return self.weight * (x - mean) / (var + self.eps).sqrt() + self.bias


class Counting(nn.Module):
    """Its outputs depend on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1  # another tensor
        return self.net(x) * self.count.log()


class Centring(nn.Module):
    """Subtracts a running mean, updated in place before it is used, with the batch's gradient."""

    def __init__(self, track_gradient: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)
        self.track_gradient = track_gradient
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        if self.track_gradient:
            mean = 0.7 * self.mean + 0.3 * h.mean(0)
            self.mean = mean.detach()
            return self.head((h - mean).tanh())
        with torch.no_grad():
            self.mean.mul_(0.7).add_(0.3 * h.mean(0))
        return self.head((h - self.mean).tanh())


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


def with_instance_norm() -> nn.Module:
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    return nn.Sequential(Rows(), norm, nn.Flatten(), nn.Linear(16, CLASSES))


def with_own_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), OwnNorm(6), nn.Tanh(), nn.Linear(6, CLASSES))


BUFFERED: dict[str, Callable[[], nn.Module]] = {
    "instance_norm": with_instance_norm,
    "own_norm": with_own_norm,
    "counter": Counting,
    "centring_with_gradient": lambda: Centring(True),
}


def moved_on(build: Callable[[], nn.Module], batches: int = 2) -> nn.Module:
    """The network after some batches."""
    torch.manual_seed(5)
    net = build().double()
    for _ in range(batches):
        net(torch.randn(5, 1, 4, 4, dtype=torch.float64))
    return net


@pytest.mark.parametrize("student", BUFFERED)
@pytest.mark.parametrize("mode", [*EXACT, "difference_one_sided", "reinforce_per_example"])
def test_buffers_of_the_student(mode: str, student: str) -> None:
    check_exact(case(moved_on(BUFFERED[student])), mode)


@pytest.mark.parametrize("student", BUFFERED)
@pytest.mark.parametrize("mode", ["none", "reinforce", "loss_difference"])
def test_no_mode_moves_buffers_twice(mode: str, student: str) -> None:
    problem = case(moved_on(BUFFERED[student]))
    _, buffers = plainly(problem)
    metapl.BilevelTrainer(**problem.networks(), mode=mode).step(**problem.data())
    after = dict(problem.student.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in buffers.items())


@pytest.mark.parametrize("mode", EXACT)
def test_running_statistics_by_which_the_student_normalises(mode: str) -> None:
    """Centring by a mean that follows the batch without its gradient: right, or refused."""
    problem = case(moved_on(Centring))
    if mode == "difference":
        check_refused(problem, mode, "no_grad")
    else:
        check_exact(problem, mode)


SPECTRAL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": nn.utils.parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("mode", EXACT)
def test_spectral_norm(mode: str, kind: str) -> None:
    net = moved_on(
        lambda: nn.Sequential(nn.Flatten(), SPECTRAL[kind](nn.Linear(16, 6)), nn.Tanh(), nn.Linear(6, CLASSES)), 300
    )
    check_exact(case(net), mode)


@pytest.mark.parametrize("mode", EXACT)
def test_a_spectral_norm_that_has_not_converged(mode: str) -> None:
    """The power iteration follows the weights without a gradient, which a difference of outputs sees all the same."""
    norm = nn.utils.parametrizations.spectral_norm
    net = moved_on(lambda: nn.Sequential(nn.Flatten(), norm(nn.Linear(16, 6)), nn.Tanh(), nn.Linear(6, CLASSES)))
    torch.manual_seed(4)
    with torch.no_grad():
        for b in net.buffers():
            b.copy_(F.normalize(torch.randn_like(b), dim=0))
    if mode == "difference":
        check_refused(case(net), mode, "not of one function")
    else:
        check_exact(case(net), mode)


def with_teacher(build: Callable[[], nn.Module]) -> Toy:
    problem = case(mlp().double(), moved_on(build))
    return Toy(problem.teacher, problem.student, (problem.labeled[0][:6], problem.labeled[1][:6]), problem.unlabeled, 0)


TEACHERS = {**BUFFERED, "centring": Centring, "checkpointed_norm": lambda: Checkpointed(False, norm=True, dropout=0.3)}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_recomputing_a_teacher_changes_nothing(mode: str, teacher: str) -> None:
    """Nor its buffers, which its two passes on the unlabelled batch move once."""
    states = []
    for recompute in (False, True):
        torch.manual_seed(5)
        problem = with_teacher(TEACHERS[teacher])
        trainer = metapl.BilevelTrainer(**problem.networks(), mode=mode, recompute_teacher=recompute)
        problem.draw_from_start()
        for _ in range(2):
            trainer.step(**problem.data())
        states.append([*problem.teacher.state_dict().values(), torch.get_rng_state()])
    assert same(*states)


@pytest.mark.parametrize("teacher", ["counter", "own_norm"])
def test_micro_batches_of_a_teacher_with_buffers(teacher: str) -> None:
    """Each micro-batch is replayed from the buffers of its own pass."""
    problem = with_teacher(TEACHERS[teacher])
    parts = twin(problem.teacher)
    expected: reference.Tree = {}
    problem.draw_from_start()
    student = problem.student
    inner = torch.optim.SGD(student.parameters(), lr=0.3)
    x_l, y_l = problem.labeled
    theta = dict(student.named_parameters())
    phi = dict(parts.named_parameters())
    logs = [parts(problem.unlabeled[i : i + 3]).log_softmax(-1) for i in (0, 3)]
    q = torch.cat(logs).exp()
    g = torch.autograd.grad(
        reference.cross_entropy(q, student(problem.unlabeled)).mean(), list(theta.values()), create_graph=True
    )
    moved = {name: p - 0.3 * d for (name, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(torch.func.functional_call(student, moved, (x_l,)), y_l)
    expected = dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))
    before = {name: p.detach().clone() for name, p in problem.teacher.named_parameters()}
    outer_optimizer = torch.optim.SGD(problem.teacher.parameters(), lr=1.0)
    metapl.BilevelTrainer(
        **problem.networks(),
        mode="forward",
        inner_optimizer=inner,
        outer_optimizer=outer_optimizer,
        teacher_losses=(),
        accumulate=2,
    ).step(**problem.data())
    change = {name: before[name] - p.detach() for name, p in problem.teacher.named_parameters()}
    assert error(change, expected) < 1e-9
    assert same(list(parts.buffers()), list(problem.teacher.buffers()))


# ----------------------------------------------------------------------------------------------------- randomness


class Noisy(nn.Module):
    """Multiplies its features by random numbers from a source of its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.body, self.head, self.source = nn.Linear(16, 6), nn.Linear(6, CLASSES), source
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        if self.source == "random":
            noise = torch.tensor([random.random() for _ in range(6)], dtype=h.dtype)
        elif self.source == "numpy":
            noise = torch.from_numpy(np.random.rand(6)).to(h)  # noqa: NPY002 - the legacy generator is what is tested
        elif self.source == "generator":
            noise = torch.rand(6, generator=self.generator, dtype=h.dtype)
        else:  # as another kernel would draw its mask
            noise = torch.rand(6, dtype=h.dtype) if torch.is_grad_enabled() else torch.rand(7, dtype=h.dtype)[1:]
        return self.head(h * noise)


SOURCES = ["random", "numpy", "generator", "kernel"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", [mode for mode in REPLAYING if mode != "difference_one_sided"])
def test_random_numbers_of_a_students_own_are_refused(mode: str, source: str) -> None:
    torch.manual_seed(5)
    check_refused(case(Noisy(source).double()), mode, "does not return the same outputs.*generator of the module")


class Detaching(nn.Module):
    """Draws whether a branch learns, by a source of its own: the outputs are the same, and the gradient is another."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body, self.branch = nn.Linear(16, 6, bias=bias), nn.Linear(6, 6, bias=bias)
        self.head, self.draws = nn.Linear(6, CLASSES), random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        branch = self.branch(h)
        return self.head(h + (branch if self.draws.random() < 0.5 else branch.detach()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_every", [1, 2])
@pytest.mark.parametrize("own_forward", [False, True])
def test_a_gradient_that_is_drawn_by_another_source_is_refused(keep_every: int, bias: bool, own_forward: bool) -> None:
    torch.manual_seed(5)
    problem = case(Detaching(bias).double())
    if own_forward:  # of the instance, as compiled passes have one
        problem.student.forward = problem.student.forward  # type: ignore[method-assign]
    with pytest.raises(metapl.MetaplError, match="does not have the same gradient"):
        metapl.hypergradient(
            problem.teacher,
            problem.student,
            labeled=problem.labeled,
            unlabeled=metapl.Lookahead([problem.unlabeled] * 6),
            mode=metapl.feedback.Forward(keep_every=keep_every),
            inner_optimizer=torch.optim.SGD(problem.student.parameters(), lr=0.1),
        )


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(len(x), 4, 4)).mean(1))


@pytest.mark.parametrize("keep_every", [1, 2])
def test_a_gradient_that_is_nothing_but_rounding_is_not_refused(keep_every: int) -> None:
    """Of a student that is its teacher; attention runs by another kernel in a replay."""
    torch.manual_seed(5)
    teacher = Attending().double()
    problem = case(copy.deepcopy(teacher), teacher)
    given = {"labeled": problem.labeled, "unlabeled": metapl.Lookahead([problem.unlabeled] * 4)}
    found = [
        metapl.hypergradient(
            problem.teacher,
            problem.student,
            **given,
            mode=mode,
            inner_optimizer=torch.optim.SGD(problem.student.parameters(), lr=0.1),
        ).grads
        for mode in ("unrolled", metapl.feedback.Forward(keep_every=keep_every))
    ]
    assert error(found[1], found[0]) < 1e-9


@pytest.mark.parametrize("source", SOURCES)
def test_a_one_sided_difference_refuses_them_as_well(source: str) -> None:
    torch.manual_seed(5)
    check_refused(case(Noisy(source).double()), "difference_one_sided", "generator of the module|not of one function")


@pytest.mark.parametrize("source", ["random", "numpy", "generator"])
def test_random_numbers_of_a_teachers_own_are_refused_where_it_is_recomputed(source: str) -> None:
    torch.manual_seed(5)
    problem = case(mlp().double(), Noisy(source).double())
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward", recompute_teacher=True)
    before = everything(problem)
    with pytest.raises(metapl.MetaplError, match=r"teacher does not return the same outputs.*recompute_teacher"):
        trainer.step(**problem.data())
    assert same(before, everything(problem))


class Masks(nn.Module):
    """Notes the dropout masks of its passes."""

    def __init__(self, name: str, log: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.note = lambda mask: log.append((name, mask))  # a list in an attribute would be state, and put back

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones(len(x), 16, dtype=x.dtype))
        self.note(mask)
        return self.head(self.net(x.flatten(1)).tanh() * mask)


@pytest.mark.parametrize("mode", ["forward", "difference", "loss_difference", "reinforce", "unrolled"])
def test_masks_of_different_passes_are_independent(mode: str) -> None:
    """Of the student's inner pass, its outer pass and the teacher's, in this step and the next."""
    log: list[tuple[str, Tensor]] = []
    torch.manual_seed(5)
    problem = case(Masks("student", log).double(), Masks("teacher", log).double())
    x_l, y_l = problem.labeled
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=mode)
    for _ in range(3):
        trainer.step(labeled=(x_l[:6], y_l[:6]), unlabeled=problem.unlabeled)
    distinct = torch.unique(torch.stack([mask.flatten() for _, mask in log]), dim=0)
    # A step has four: inner, outer, and the teacher's on both batches. Replays have those of what they replay.
    assert len(distinct) == 3 * 4
    assert abs(float(torch.corrcoef(distinct).triu(1).abs().max())) < 0.6
    if mode == "loss_difference":  # L(θ) and L(θ′) under the same mask
        assert torch.equal(log[2][1], log[3][1])


# ------------------------------------------------------------------- forward and backward passes of two functions


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def jvp(ctx: Any, x: Tensor) -> Tensor:
        return x


def through_no_grad(h: Tensor) -> Tensor:
    """Straight-through rounding."""
    with torch.no_grad():
        change = (4 * h).round() / 4 - h
    return h + change


class Quantized(nn.Module):
    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.quantize = nn.Linear(16, 6), nn.Linear(6, CLASSES), quantize

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.quantize(self.body(x.flatten(1)).tanh()))


QUANTIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": through_no_grad,
    "detach": lambda h: h + ((8 * h).tanh() - h).detach(),
    "rounding": lambda h: h + ((4 * h).round() / 4 - h).detach(),
    "backward": _Sign.apply,
    "gradient_hook": lambda h: _hooked(h, lambda g: g.clamp(-1e-3, 1e-3)),
    "scaling_hook": lambda h: _hooked(h, lambda g: 0.5 * g),
}


RIGHT = {("forward", "no_grad"), ("forward", "detach"), ("forward", "rounding"), ("forward", "backward")}


def _hooked(h: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    if h.requires_grad:
        h.register_hook(hook)
    return h


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("mode", [*EXACT, "difference_one_sided", "reinforce_per_example"])
def test_a_backward_pass_of_its_own(mode: str, kind: str) -> None:
    torch.manual_seed(5)
    problem = case(Quantized(QUANTIZED[kind]).double())
    plain_mode = "forward" if mode == "reinforce_per_example" else mode
    if mode == "unrolled" or (plain_mode, kind) in RIGHT:
        check_exact(problem, mode)
    else:
        check_refused(
            problem, mode, "not of one function|does not return the same outputs|a tensor of its forward that changes"
        )


@pytest.mark.parametrize("mode", [*EXACT, "reinforce_per_example"])
def test_hooks_on_parameters(mode: str) -> None:
    """Those that change gradients are differentiated through, or refused; those that only look are no matter."""
    torch.manual_seed(5)
    problem, seen = case(mlp().double()), []
    for p in problem.student.parameters():
        p.register_hook(lambda g: seen.append(g.detach()))
    inner = RULE.build(problem.student)
    kind = "score" if mode == "reinforce_per_example" else "soft"
    problem.draw_from_start()
    expected = reference.pseudo_labels(**problem.networks(), **problem.data(), rule=RULE.rule, kind=kind)
    problem.draw_from_start()
    got = metapl.hypergradient(**problem.networks(), **problem.data(), mode=mode, inner_optimizer=inner)
    assert error(got.grads, expected.grads) < TOLERANCE.get(mode, 1e-9)
    assert len(seen) == 4, "called by the inner pass, once for each parameter"
    hook = problem.student[1].weight.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
    if mode == "unrolled":
        check_hooked(problem, lambda g: g.clamp(-1e-2, 1e-2))
    else:
        check_refused(problem, mode, "hook on its parameter 1.weight that changes gradients")
    hook.remove()


def check_hooked(problem: Toy, hook: Callable[[Tensor], Tensor]) -> None:
    unhooked = mlp().double()
    unhooked.load_state_dict(problem.student.state_dict())

    def rule(params: reference.Tree, grads: reference.Tree, state: Any) -> Any:
        return RULE.rule(params, {**grads, "1.weight": hook(grads["1.weight"])}, state)

    data = {"teacher": problem.teacher, "student": unhooked, **problem.data()}
    expected = reference.pseudo_labels(**data, rule=rule)
    assert error(found(problem, "unrolled").grads, expected.grads) < 1e-9


@pytest.mark.parametrize("mode", ANYWHERE)
def test_hooks_after_the_gradient_has_been_accumulated_are_refused(mode: str) -> None:
    problem = case(mlp().double())
    problem.student[3].bias.register_post_accumulate_grad_hook(lambda p: None)
    check_refused(problem, mode, "3.bias has a hook.*register_hook")
