"""Students of unusual kinds whose gradient must be right, and whose state a step moves once.

The reference is double backward on the module itself, written out: the inner passes move its state one after another,
and the pass on the labeled batch sees what they left. State is what the contract says: buffers and frozen parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, mlp, toy
from reference import error
from replays import put, twin
from test_bits import GRAPH, TANGENT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl import Lookahead, MetaplError

RULE = OPTIMISERS["torch_sgd_nesterov"]

# ------------------------------------------------------------------------------------------------------------ students


class Moving(nn.Module):
    """Features that are scaled by state, which each pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)
        self.average = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        return self.head(h * self.factor(h.detach()))

    def factor(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.8).add_(0.5)
        return self.average.clone()


class ByData(Moving):
    def factor(self, h: Tensor) -> Tensor:
        self.average.data = self.average.data * 0.8 + 0.5
        return self.average.clone()


class Statistics(Moving):
    """A running mean in a frozen parameter, which batch norm's operator writes to."""

    def factor(self, h: Tensor) -> Tensor:
        F.batch_norm(torch.ones_like(h).cumsum(0), self.average, self.var, training=True)
        return self.average.clone()

    def __init__(self) -> None:
        super().__init__()
        self.var = nn.Parameter(torch.ones(6), requires_grad=False)


class Counted(Moving):
    """The count of a batch norm, which it reads after the norm has counted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False)

    def factor(self, h: Tensor) -> Tensor:
        self.norm(torch.ones_like(h).cumsum(0))
        return self.norm.num_batches_tracked.to(h.dtype) + self.norm.running_mean.clone()


class Momentum(nn.Module):
    """The features of a second encoder, which follows the weights of the first without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.head = nn.Linear(16, 6), nn.Linear(12, CLASSES)
        self.slow = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, online in zip(self.slow.parameters(), self.online.parameters(), strict=True):
                slow.lerp_(online, 0.3)
        x = x.flatten(1)
        return self.head(torch.cat([self.online(x).tanh(), self.slow(x).tanh()], 1))


class Padded(nn.Module):
    """An encoder whose padded rows enter the output: in eval mode without a graph PyTorch would take a fused path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(len(x), 4, dtype=torch.bool)
        mask[:, 3] = True
        return self.head(self.encoder(x.flatten(1, 2), src_key_padding_mask=mask).mean(1))


class Spectral(nn.Module):
    """A complex buffer, as those of rotary embeddings, or a complex weight."""

    def __init__(self, kind: type[Tensor] = nn.Buffer) -> None:
        super().__init__()
        self.w = kind(torch.randn(16, 16, dtype=torch.complex128) / 4)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.flatten(1).to(self.w.dtype) @ self.w).abs())


class Slopes(nn.Module):
    """A student that differentiates in its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.energy = mlp(), nn.Linear(16, CLASSES)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        z = self.body(x)
        (slopes,) = torch.autograd.grad(z.logsumexp(-1).sum(), x, create_graph=True)
        return z + self.energy(slopes.flatten(1))


class Narrow(nn.Module):
    """A float64 network that computes its middle in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).float().tanh().softmax(-1)
        return self.head(16 * h.to(self.head.weight.dtype))


def watched() -> nn.Module:
    """With hooks that only look."""
    network = mlp()
    network[1].register_forward_hook(lambda module, given, output: None)
    network[3].register_full_backward_hook(lambda module, given, got: None)
    return network


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "frozen average": Moving,
    "frozen average by .data": ByData,
    "frozen statistics": Statistics,
    "count of a norm": Counted,
    "momentum encoder": Momentum,
    "padding in eval mode": lambda: Padded().eval(),
    "complex buffer": Spectral,
    "complex weight": lambda: Spectral(nn.Parameter),
    "slopes in its input": Slopes,
    "float32 inside": Narrow,
    "hooks that look": watched,
}
MODES: dict[str, tuple[Any, int, float]] = {  # the estimator, the steps ahead, and the greatest relative error
    "unrolled": ("unrolled", 1, 1e-9),
    "forward by tangent": (TANGENT, 1, 1e-9),
    "forward by graph": (GRAPH, 1, 1e-9),
    "forward, three steps": ("forward", 3, 1e-9),
    "reinforce_per_example": ("reinforce_per_example", 1, 1e-9),
    "difference": ("difference", 1, 1e-4),
}
COARSE = {"float32 inside": 3e-2}
WRITTEN = ("frozen average", "frozen average by .data", "frozen statistics", "momentum encoder")
MAY_BE_REFUSED = [
    *(("momentum encoder", mode) for mode in MODES if mode != "unrolled"),
    *((kind, "forward by graph") for kind in WRITTEN),  # which may have saved what is written to
]
"""Forward mode and a move go through what is computed without a gradient, where reverse mode does not."""


def case(student: nn.Module, teacher: nn.Module | None = None) -> Toy:
    base = toy("mlp", rows=6)
    labeled = base.labeled[0][:6], base.labeled[1][:6]
    return Toy(teacher or base.teacher, student.double(), labeled, base.unlabeled, 0)


def plain() -> Toy:
    """The same whenever it is built."""
    torch.manual_seed(5)
    return case(mlp())


def ahead(problem: Toy, steps: int) -> list[Tensor]:
    return [problem.unlabeled + 0.1 * i for i in range(steps)]


def state_of(*networks: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers and of the frozen parameters."""
    found = {}
    for number, network in enumerate(networks):
        held = [*network.named_buffers(), *((n, p) for n, p in network.named_parameters() if not p.requires_grad)]
        found |= {f"{number}.{name}": t.detach().clone() for name, t in held}
    return found


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@sdpa_kernel(SDPBackend.MATH)
def plainly(problem: Toy, steps: int, sampled: bool) -> tuple[reference.Tree, dict[str, Tensor]]:
    """The teacher's gradient, and the student's state after its inner passes."""
    teacher, student = twin(problem.teacher), twin(problem.student)
    phi = dict(teacher.named_parameters())
    theta = {n: p for n, p in student.named_parameters() if p.requires_grad}
    state, leaves, spoken = None, [], []
    for x in ahead(problem, steps):
        put(student, theta)
        z = student(x)
        log_q = teacher(x).log_softmax(-1)
        if sampled:
            drawn = reference.drawn(log_q.exp())
            leaves.append(torch.ones(len(z), dtype=z.dtype).requires_grad_())
            inner = (leaves[-1] * F.cross_entropy(z, drawn, reduction="none")).mean()
            spoken.append(log_q.gather(-1, drawn[:, None])[:, 0])
        else:
            leaves.append(log_q.detach().exp().requires_grad_())
            inner = reference.cross_entropy(leaves[-1], z).mean()
            spoken.append(log_q.exp())
        g = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        theta, state = RULE.rule(theta, dict(zip(theta, g, strict=True)), state)
    after = state_of(student)
    put(student, theta)
    outer = F.cross_entropy(student(problem.labeled[0]), problem.labeled[1])
    told = torch.autograd.grad(outer, leaves)
    total = sum((t * q).sum() for t, q in zip(told, spoken, strict=True))
    return dict(zip(phi, torch.autograd.grad(total, list(phi.values())), strict=True)), after


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_right_and_state_moves_once(mode: str, kind: str) -> None:
    torch.manual_seed(5)
    estimator, steps, tolerance = MODES[mode]
    problem = case(STUDENTS[kind]())
    batches: Any = ahead(problem, steps)[0] if steps == 1 else Lookahead(ahead(problem, steps))

    def trainer_of(problem: Toy, verify: bool = False) -> metapl.BilevelTrainer:
        inner = RULE.build(problem.student)
        return metapl.BilevelTrainer(
            **problem.networks(), mode=estimator, inner_optimizer=inner, teacher_losses=(), verify=verify
        )

    if (kind, mode) in MAY_BE_REFUSED:
        try:
            with warnings.catch_warnings(action="ignore"):  # what is allowed is right
                trainer_of(copy.deepcopy(problem), verify=True).step(problem.labeled, batches)
        except MetaplError:
            return
    problem.draw_from_start()
    expected, after = plainly(problem, steps, mode == "reinforce_per_example")
    trainer, before = trainer_of(problem), state_of(problem.teacher, problem.student)
    problem.draw_from_start()
    found = trainer.hypergradient(problem.labeled, batches)
    assert error(found.grads, expected) < max(tolerance, COARSE.get(kind, 0.0))
    assert alike(before, state_of(problem.teacher, problem.student)), "a gradient moves nothing"
    problem.draw_from_start()
    trainer.step(problem.labeled, batches)
    torch.testing.assert_close(state_of(problem.student), after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["forward", "none"])
def test_micro_batches_move_state_one_after_another(mode: str) -> None:
    """Each is replayed from the state of its own pass; the labeled batch is seen with what the last one left."""
    torch.manual_seed(5)
    problem = case(Moving())
    teacher, student = twin(problem.teacher), twin(problem.student)
    z = torch.cat([student(x) for x in problem.unlabeled.chunk(2)])
    q = teacher(problem.unlabeled).softmax(-1)
    leaf = q.detach().requires_grad_()
    theta = {n: p for n, p in student.named_parameters() if p.requires_grad}
    g = torch.autograd.grad(reference.cross_entropy(leaf, z).mean(), list(theta.values()), create_graph=True)
    after = state_of(student)
    put(student, RULE.rule(theta, dict(zip(theta, g, strict=True)), None)[0])
    pairs = zip(*(t.chunk(2) for t in problem.labeled), strict=True)
    outer = torch.stack([F.cross_entropy(student(x), y) for x, y in pairs]).mean()
    phi = dict(teacher.named_parameters())
    total = (torch.autograd.grad(outer, leaf)[0] * q).sum()
    expected = dict(zip(phi, torch.autograd.grad(total, list(phi.values())), strict=True))
    trainer = metapl.BilevelTrainer(
        **problem.networks(), mode=mode, inner_optimizer=RULE.build(problem.student), accumulate=2
    )
    found = trainer.hypergradient(**problem.data())
    if mode == "forward":
        assert error(found.grads, expected) < 1e-9
    trainer.step(**problem.data())
    assert alike(state_of(problem.student), after)


@pytest.mark.parametrize("kind", [Moving, ByData, Counted])
@pytest.mark.parametrize("mode", ["forward", "reinforce", "unrolled"])
def test_recomputing_a_teacher_moves_its_state_once(mode: str, kind: Callable[[], nn.Module]) -> None:
    ends = []
    for recompute in (False, True):
        torch.manual_seed(5)
        problem = case(mlp(), kind().double())
        outer = torch.optim.SGD([p for p in problem.teacher.parameters() if p.requires_grad], lr=0.5)
        trainer = metapl.BilevelTrainer(
            **problem.networks(), mode=mode, outer_optimizer=outer, recompute_teacher=recompute, teacher_losses=()
        )
        for _ in range(2):
            trainer.step(**problem.data())
        ends.append({**state_of(problem.teacher), **dict(problem.teacher.named_parameters())})
    assert alike(*ends)


# ----------------------------------------------------------------------------------------------- no cause for an alarm


@pytest.mark.parametrize("mode", [metapl.feedback.Difference(), metapl.feedback.Difference(one_sided=True)], ids=str)
def test_a_small_network_of_relus_trains_by_differences(mode: Any) -> None:
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


class Casting(nn.Module):
    """A float32 body whose head runs in bfloat16, by a cast inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 3).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).tanh().to(torch.bfloat16)).float()


@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_half_precision_inside_is_taken(mode: str) -> None:
    base, student = toy("mlp", dtype=torch.float32), Casting()
    metapl.BilevelTrainer(base.teacher, student, mode, verify=False).step(**base.data())


@pytest.mark.parametrize("steps", [1, 3])
def test_an_inner_loss_may_read_the_students_weights(steps: int) -> None:
    """As they are in each step: a penalty whose weight the teacher says."""

    class Penalized(metapl.PseudoLabels):
        def inner_loss(self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None) -> Tensor:
            decay = torch.stack([p.square().sum() for p in params.values()]).sum()
            return super().inner_loss(outputs, signal, batch) + signal.value[:, 0] * decay

    problem = plain()
    unlabeled = Lookahead(ahead(problem, steps)) if steps > 1 else problem.unlabeled
    found = {}
    for mode in ("unrolled", "forward"):
        for kind in (Penalized(), metapl.PseudoLabels()):
            inner = RULE.build(problem.student)
            given = {"labeled": problem.labeled, "unlabeled": unlabeled, "inner_optimizer": inner}
            found[mode, type(kind)] = metapl.hypergradient(**problem.networks(), **given, mode=mode, problem=kind).grads
    assert error(found["forward", Penalized], found["unrolled", Penalized]) < 1e-9
    assert error(found["forward", Penalized], found["forward", metapl.PseudoLabels]) > 1e-3


# ------------------------------------------------------------------------------------------ what changes between steps


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_partly_frozen_student_can_be_thawed() -> None:
    """With the default optimizer; what is frozen stays, even where a stale gradient lies on it."""
    problem = plain()
    frozen, free = problem.student[1], problem.student[3]
    frozen.requires_grad_(False)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    frozen.weight.grad = torch.ones_like(frozen.weight)
    before = values(problem.student)
    trainer.step(**problem.data())
    assert torch.equal(frozen.weight, before["1.weight"])
    assert not torch.equal(free.weight, before["3.weight"])
    frozen.requires_grad_(True)
    trainer.step(**problem.data())
    assert not torch.equal(frozen.weight, before["1.weight"])


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_layer_is_thawed_by_add_param_group_and_refused_without(who: str) -> None:
    """The step is then that of a trainer built on the whole network, where there is no momentum."""
    ends = []
    for late in (True, False):
        problem = plain()
        network = problem.networks()[who]
        layers = [p for p in network.parameters() if not late or p.shape[0] == 3]
        network[1].requires_grad_(not late)
        optimizer = torch.optim.SGD(layers, lr=0.2)
        options: dict[str, Any] = {"inner_optimizer" if who == "student" else "outer_optimizer": optimizer}
        trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward", **options)
        if late:
            network[1].requires_grad_(True)
            before = values(problem.teacher), values(problem.student)
            with pytest.raises(MetaplError):
                trainer.step(**problem.data())
            assert all(map(alike, before, (values(problem.teacher), values(problem.student))))
            optimizer.add_param_group({"params": list(network[1].parameters())})
        trainer.step(**problem.data())
        ends.append({**values(problem.teacher), **{f"s.{n}": p for n, p in values(problem.student).items()}})
    assert error(*ends) < 1e-14


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_head_that_is_replaced_is_refused(who: str) -> None:
    """Its weights are in no optimizer."""
    problem = plain()
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    problem.networks()[who][3] = nn.Linear(6, CLASSES).double()
    before = values(problem.teacher), values(problem.student)
    with pytest.raises(MetaplError):
        trainer.step(**problem.data())
    assert all(map(alike, before, (values(problem.teacher), values(problem.student))))


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.Adam])
def test_a_learning_rate_may_be_a_tensor(build: Any) -> None:
    ends = []
    for rate in (0.125, torch.tensor(0.125)):
        problem = plain()
        inner, outer = build(problem.student.parameters(), lr=rate), build(problem.teacher.parameters(), lr=rate)
        trainer = metapl.BilevelTrainer(
            **problem.networks(), mode="forward", inner_optimizer=inner, outer_optimizer=outer
        )
        for _ in range(2):
            trainer.step(**problem.data())
        ends.append({**values(problem.teacher), **{f"s.{n}": p for n, p in values(problem.student).items()}})
    assert error(*ends) < 1e-6


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_a_teacher_may_have_sparse_gradients() -> None:
    ids = torch.randint(0, 10, (9, 4), generator=torch.Generator().manual_seed(0))
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        teacher, student = Words(sparse), Words(False)
        outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
        metapl.BilevelTrainer(teacher, student, "difference", outer_optimizer=outer).step(
            (ids[:5], torch.arange(5) % 3), ids[5:]
        )
        ends.append(values(teacher))
    assert error(*ends) < 1e-6


def test_over_several_steps_a_student_may_have_sparse_gradients() -> None:
    ids = torch.randint(0, 10, (9,), generator=torch.Generator().manual_seed(0))
    ends = []
    for mode, sparse in (("forward", True), ("unrolled", True), ("unrolled", False)):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Embedding(10, 3)).double()
        student = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Tanh(), nn.Linear(4, 3)).double()
        inner = torch.optim.SGD(student.parameters(), lr=0.1)
        trainer = metapl.BilevelTrainer(teacher, student, mode, lookahead=3, inner_optimizer=inner)
        trainer.step((ids[:5], torch.arange(5) % 3), Lookahead([ids[5:]] * 3))
        ends.append(values(teacher))
    assert error(ends[0], ends[2]) < 1e-12
    assert error(ends[1], ends[2]) < 1e-12


def test_a_step_takes_gradients_within_no_grad_too() -> None:
    ends = []
    for context in (torch.no_grad(), torch.enable_grad()):
        problem = plain()
        trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
        with context:
            trainer.step(**problem.data())
        ends.append({**values(problem.teacher), **{f"s.{n}": p for n, p in values(problem.student).items()}})
    assert alike(*ends)
