"""Students and teachers whose passes are hard to run again.

The gradient is that of plain double backward on the module itself: its weights are exchanged by
hand, and hooks, buffers and checkpoints act as they do in training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from problems_zoo import (
    CLASSES,
    OPTIMISERS,
    Toy,
    everything,
    gradient,
    mlp,
    product,
    same,
    toy,
    trainer_for,
    values,
)
from reference import error, own_stream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch_versions import require_torch

import metapl
from metapl.feedback import Difference, Forward

RULE = OPTIMISERS["torch_sgd_nesterov"]

WAYS: dict[str, Any] = {
    "unrolled": "unrolled",
    "graph": Forward(by="graph"),
    "tangent": Forward(by="tangent"),
    "difference": "difference",
    "one_sided": Difference(one_sided=True),
    "per_example": "reinforce_per_example",
}
BY_DIFFERENCE = ("difference", "one_sided")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # Not the seed of the teachers.
    torch.manual_seed(5)


def case(
    student: nn.Module, teacher: nn.Module | None = None, dtype: torch.dtype = torch.float64
) -> Toy:
    """Return a toy problem with this student, and six rows in each batch."""
    base = toy("mlp", dtype=dtype, rows=6)
    inputs, labels, *_ = base.labeled
    if dtype == torch.float64:
        # This leaves complex numbers as they are.
        student = student.double()
    else:
        student = student.to(dtype)
    teacher = base.teacher if teacher is None else teacher
    return Toy(teacher, student, (inputs[:6], labels[:6]), base.unlabeled, 0)


def put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put other tensors in the places of parameters, in each place of one that is held twice."""
    parameters = dict(module.named_parameters())
    tensors_by_id = {id(parameters[name]): t for name, t in tensors.items()}
    for part in module.modules():
        for name, p in part._parameters.items():
            if id(p) in tensors_by_id:
                part._parameters[name] = tensors_by_id[id(p)]


def twin(module: nn.Module) -> nn.Module:
    """Return a copy, of modules too whose weight is an attribute with a graph."""
    copies = {}
    for part in module.modules():
        for t in vars(part).values():
            if isinstance(t, Tensor):
                copies[id(t)] = t.detach().clone()
    return copy.deepcopy(module, copies)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of what a pass may move: buffers, and parameters that are not learned."""
    state = dict(module.named_buffers())
    state |= {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return {name: t.detach().clone() for name, t in state.items()}


@sdpa_kernel(SDPBackend.MATH)
def by_double_backward(
    problem: Toy, kind: str = "soft"
) -> tuple[reference.Tree, dict[str, Tensor]]:
    """Return the teacher's gradient, and the student's state after its inner pass.

    Args:
        kind: ``"soft"``, or ``"score"`` as in the reference.
    """
    teacher = twin(problem.teacher)
    student = twin(problem.student)
    theta = {name: p for name, p in student.named_parameters() if p.requires_grad}
    phi = dict(teacher.named_parameters())
    z = student(problem.unlabeled)
    after_inner = torch.get_rng_state()
    log_q = teacher(problem.unlabeled).log_softmax(-1)
    if kind == "score":
        labels = reference.drawn(log_q.exp())
        signal = torch.ones(len(z), dtype=z.dtype).requires_grad_()
        losses = signal * F.cross_entropy(z, labels, reduction="none")
        spoken = log_q.gather(-1, labels[:, None])[:, 0]
    else:
        signal = log_q.detach().exp().requires_grad_()
        losses = reference.cross_entropy(signal, z)
        spoken = log_q.exp()
    g = torch.autograd.grad(
        losses.mean(), list(theta.values()), create_graph=True, materialize_grads=True
    )
    moved, _ = RULE.rule(theta, dict(zip(theta, g, strict=True)), None)

    # The student as its backward pass leaves it, in which a checkpoint runs again.
    later = twin(student)
    state = state_of(later)
    torch.set_rng_state(own_stream(after_inner))
    put(later, {name: nn.Parameter(p.detach()) for name, p in moved.items()})
    theta_later = {name: p for name, p in later.named_parameters() if p.requires_grad}
    inputs, labels_of_outer, *_ = problem.labeled
    outer = F.cross_entropy(later(inputs), labels_of_outer)
    # Checkpoints run again here, and θ′ is in its place.
    v = torch.autograd.grad(outer, list(theta_later.values()), materialize_grads=True)
    (in_signal,) = torch.autograd.grad(list(moved.values()), signal, v)
    grads = torch.autograd.grad((in_signal * spoken).sum(), list(phi.values()))
    return dict(zip(phi, grads, strict=True)), state


def hypergradient_by(problem: Toy, way: str) -> metapl.Hypergradient:
    return gradient(problem, WAYS[way], inner_optimizer=RULE.build(problem.student))


def check_exact(problem: Toy, way: str) -> None:
    """Check the gradient, that a call moves nothing, and that a step moves the state.

    A step moves it as the one inner pass does.
    """
    bound = 1e-4 if way in BY_DIFFERENCE else 1e-9
    kind = "score" if "per_example" in way else "soft"
    problem.draw_from_start()
    expected, state = by_double_backward(problem, kind)
    problem.draw_from_start()
    tensors_before = everything(problem, generator=False)
    assert error(hypergradient_by(problem, way).grads, expected) < bound
    assert same(tensors_before, everything(problem, generator=False))
    problem.draw_from_start()
    trainer = trainer_for(
        problem, WAYS[way], inner_optimizer=RULE.build(problem.student), teacher_losses=()
    )
    trainer.step(**problem.data())
    state_after_step = state_of(problem.student)
    assert state.keys() == state_after_step.keys()
    assert all(torch.equal(state_after_step[name], t) for name, t in state.items())


class Scaled(nn.Module):
    """Features that are scaled by a state, which each pass moves by ``move(module, features)``."""

    def __init__(
        self, move: Callable[[Any, Tensor], Tensor], *, frozen: bool = False, buffer: bool = True
    ) -> None:
        super().__init__()
        self.body = nn.Linear(16, 6)
        self.head = nn.Linear(6, CLASSES)
        self.move = move
        if frozen:
            self.average = nn.Parameter(torch.ones(6), requires_grad=False)
        elif buffer:
            self.register_buffer("average", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        return self.head(h * self.move(self, h.detach()))


def in_place(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.average.mul_(0.8).add_(h.square().mean(0))
    # The graph of a pass saves it.
    return net.average


def exchanged(net: Any, h: Tensor) -> Tensor:
    net.average = net.average + h.square().mean(0)
    return net.average


def made_late(net: Any, h: Tensor) -> Tensor:
    if not hasattr(net, "average"):
        net.register_buffer("average", torch.ones(6, dtype=h.dtype))
    net.average.mul_(0.8).add_(h.square().mean(0))
    return net.average.clone()


class Checkpointed(nn.Module):
    """Two blocks, each under a checkpoint of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 6)
        self.head = nn.Linear(6, CLASSES)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        return self.head(h)


class Sequences(nn.Module):
    """A layer over the rows of an image."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


class Spectral(nn.Module):
    """A complex buffer, as those of rotary embeddings, or a complex weight."""

    def __init__(self, kind: type[Tensor] = nn.Buffer) -> None:
        super().__init__()
        self.w = kind(torch.randn(16, 16, dtype=torch.complex128) / 4)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.flatten(1).to(self.w.dtype) @ self.w).abs())


class Asking(nn.Sequential):
    """Another function where its weights are no parameters, or are not learned."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self[-1].weight
        is_learned = isinstance(weight, nn.Parameter) and weight.requires_grad
        return super().forward(x) * (1 if is_learned else 2)


def layers(*inside: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), *inside, nn.Linear(6, CLASSES))


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "frozen, moved in place": lambda: Scaled(in_place, frozen=True),
    "buffer moved in place": lambda: Scaled(in_place),
    "buffer exchanged": lambda: Scaled(exchanged),
    "buffer made late": lambda: Scaled(made_late, buffer=False),
    "complex buffer": Spectral,
    "complex weight": lambda: Spectral(nn.Parameter),
    "asks": lambda: Asking(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
    "batch norm": lambda: layers(nn.BatchNorm1d(6), nn.Tanh()),
    "dropout": lambda: layers(nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.2)),
    "encoder layer": lambda: Sequences(
        nn.TransformerEncoderLayer(4, 2, 8, 0.2, "gelu", batch_first=True), 4
    ),
    "checkpoint with norm and dropout": Checkpointed,
}


def built(make: Callable[[], nn.Module], batches: int = 2) -> nn.Module:
    """Return a network after some batches."""
    torch.manual_seed(5)
    network = make().double()
    for _ in range(batches):
        network(torch.randn(5, 1, 4, 4, dtype=torch.float64))
    return network


# What depends on the weights by a constant, in which a difference of outputs has a derivative all
# the same.
DETACHED = {
    "frozen, moved in place",
    "buffer moved in place",
    "buffer exchanged",
    "buffer made late",
}


USUAL = (
    "tangent",
    "batch norm",
    "encoder layer",
    "frozen, moved in place",
    "buffer exchanged",
    "buffer made late",
)


@pytest.mark.parametrize(("way", "student"), product(WAYS, STUDENTS, usual=USUAL))
def test_the_gradient_is_right_and_the_state_moves_once(way: str, student: str) -> None:
    if student == "checkpoint with norm and dropout" and "tangent" in way:
        # Before it, a checkpoint saves its inputs by an autograd.Function that has no jvp.
        require_torch("2.13", "a checkpoint has a forward mode")
    problem = case(built(STUDENTS[student], 0 if "late" in student else 2))
    if student not in DETACHED or way not in BY_DIFFERENCE:
        check_exact(problem, way)


class Counting(nn.Module):
    """Outputs that grow with the number of passes, which is an attribute or a buffer."""

    def __init__(self, *, in_buffer: bool) -> None:
        super().__init__()
        self.network = layers(nn.Tanh())
        if in_buffer:
            self.register_buffer("count", torch.zeros(()))
        else:
            self.count = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.network(x) * (1 + 0.1 * self.count)


def test_a_count_in_an_attribute_is_refused_over_several_steps_and_in_a_buffer_is_right() -> None:
    """``forward`` runs the passes of several steps again.

    ``unrolled`` runs each once, and is right on both.
    """
    steps = 3
    rate = 0.3

    def counting(*, in_buffer: bool) -> Toy:
        torch.manual_seed(5)
        return case(Counting(in_buffer=in_buffer))

    def gradients(mode: str, *, in_buffer: bool) -> dict[str, Tensor]:
        problem = counting(in_buffer=in_buffer)
        result = metapl.hypergradient(
            problem.teacher,
            problem.student,
            outer=problem.labeled,
            inner=metapl.Lookahead([problem.unlabeled] * steps),
            mode=mode,
            inner_optimizer=torch.optim.SGD(problem.student.parameters(), lr=rate),
        )
        return result.grads

    problem = counting(in_buffer=False)
    student = problem.student
    phi = dict(problem.teacher.named_parameters())
    for _ in range(steps):
        theta = dict(student.named_parameters())
        labels = problem.teacher(problem.unlabeled).softmax(-1)
        loss = reference.cross_entropy(labels, student(problem.unlabeled)).mean()
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        put(student, {name: p - rate * d for (name, p), d in zip(theta.items(), g, strict=True)})
    outer = F.cross_entropy(student(problem.labeled[0]), problem.labeled[1])
    expected = dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))

    with pytest.raises(
        metapl.MetaplError, match="register_buffer makes it part of what is rewound"
    ):
        gradients("forward", in_buffer=False)
    assert error(gradients("forward", in_buffer=True), expected) < 1e-9
    assert error(gradients("unrolled", in_buffer=False), expected) < 1e-9


@pytest.mark.parametrize("mode", ["unrolled", "tangent", "difference"])
def test_masks_of_different_passes_are_independent(mode: str) -> None:
    """Of the student's inner pass, its outer pass and the teacher's two, in three steps.

    A replay has the masks of what it replays.
    """
    log: list[Tensor] = []

    class Masks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            log.append(F.dropout(torch.ones(len(x), 16, dtype=x.dtype)))
            return super().forward(x.flatten(1) * log[-1])

    problem = case(Masks(16, CLASSES), Masks(16, CLASSES).double())
    trainer = trainer_for(problem, WAYS[mode])
    for _ in range(3):
        trainer.step(**problem.data())
    distinct = torch.unique(torch.stack([mask.flatten() for mask in log]), dim=0)
    assert len(distinct) == 3 * 4
    assert abs(float(torch.corrcoef(distinct).triu(1).abs().max())) < 0.6


def test_micro_batches_of_a_teacher_with_state() -> None:
    """Each micro-batch is replayed from the state of its own pass."""
    problem = case(mlp(), built(STUDENTS["buffer exchanged"]))
    teacher = twin(problem.teacher)
    student = problem.student
    theta = dict(student.named_parameters())
    phi = dict(teacher.named_parameters())
    halves = problem.unlabeled[:3], problem.unlabeled[3:]
    q = torch.cat([teacher(half).softmax(-1) for half in halves])
    inner_loss = reference.cross_entropy(q, student(problem.unlabeled)).mean()
    g = torch.autograd.grad(inner_loss, list(theta.values()), create_graph=True)
    moved = {name: p - 0.3 * d for (name, p), d in zip(theta.items(), g, strict=True)}
    inputs, labels = problem.labeled
    outer_loss = F.cross_entropy(torch.func.functional_call(student, moved, (inputs,)), labels)
    gradients = torch.autograd.grad(outer_loss, list(phi.values()))
    expected = dict(zip(phi, gradients, strict=True))

    weights_before = values(problem.teacher)
    trainer = trainer_for(
        problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.3),
        outer_optimizer=torch.optim.SGD(problem.teacher.parameters(), lr=1.0),
        teacher_losses=(),
        accumulate=2,
    )
    trainer.step(**problem.data())
    change = {
        name: weights_before[name] - p.detach() for name, p in problem.teacher.named_parameters()
    }
    assert error(change, expected) < 1e-9
    assert same(list(teacher.buffers()), list(problem.teacher.buffers()))


class Quantized(nn.Module):
    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Linear(16, 6)
        self.head = nn.Linear(6, CLASSES)
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.quantize(self.body(x.flatten(1)).tanh()))


def test_a_teacher_that_draws_otherwise_when_it_is_recomputed_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def scaled_by_chance(h: Tensor) -> Tensor:
        return h * torch.rand(6, generator=generator).to(h)

    problem = case(mlp(), Quantized(scaled_by_chance).double())
    trainer = trainer_for(problem, recompute_teacher=True)
    tensors_before = everything(problem)
    with pytest.raises(metapl.MetaplError):
        trainer.step(**problem.data())
    assert same(tensors_before, everything(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["tangent", "difference", "one_sided"])
def test_outputs_that_are_zero_have_a_derivative(way: str, dtype: torch.dtype) -> None:
    """Such are those of a network whose last layer begins with zeros.

    There the move alone has a size.
    """
    student = layers(nn.Tanh())
    nn.init.zeros_(student[-1].weight)
    nn.init.zeros_(student[-1].bias)
    problem = case(student, dtype=dtype)
    expected, _ = by_double_backward(problem)
    assert error(hypergradient_by(problem, way).grads, expected) < 1e-3


def test_a_one_sided_difference_under_autocast_has_no_outputs_of_few_bits() -> None:
    problem = case(layers(nn.Tanh()), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        one_sided = hypergradient_by(problem, "one_sided").grads
        exact = hypergradient_by(problem, "tangent").grads
    assert error(one_sided, exact) < 0.05


@pytest.mark.parametrize("keep_every", [1, 2])
def test_a_gradient_that_is_nothing_but_rounding_is_not_refused(keep_every: int) -> None:
    """The student is its teacher; attention runs by another kernel in a replay."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    teacher = Sequences(layer, 4).double()
    problem = case(copy.deepcopy(teacher), teacher)
    batches = [problem.unlabeled] * 4
    exact = gradient(problem, "unrolled", batches)
    replayed = gradient(problem, Forward(keep_every=keep_every), batches)
    assert error(replayed.grads, exact.grads) < 1e-9


@pytest.mark.parametrize("mode", ["forward", "difference"])
@pytest.mark.parametrize("seed", [39, 56, 61, 69, 84, 120])
def test_slopes_that_cancel_to_rounding_are_no_disagreement(seed: int, mode: str) -> None:
    """Batch normalization takes a bias away.

    A first step of Adam makes its whole direction of such biases.
    """

    def normalized() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    torch.manual_seed(seed)
    teacher = normalized()
    student = normalized()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=torch.optim.Adam(student.parameters(), lr=0.01),
        outer_optimizer=torch.optim.Adam(teacher.parameters(), lr=0.01),
    )
    labeled = (torch.randn(8, 4), torch.arange(8) % 3)
    trainer.step(labeled, torch.randn(8, 4))


def test_a_partly_frozen_student_can_be_thawed() -> None:
    """It has the default optimizer; what is frozen stays, even with a stale gradient on it."""
    problem = case(mlp())
    frozen = problem.student[1]
    free = problem.student[3]
    frozen.requires_grad_(requires_grad=False)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    frozen.weight.grad = torch.ones_like(frozen.weight)
    weights_before = values(problem.student)
    trainer.step(**problem.data())
    assert torch.equal(frozen.weight, weights_before["1.weight"])
    assert not torch.equal(free.weight, weights_before["3.weight"])
    frozen.requires_grad_(requires_grad=True)
    trainer.step(**problem.data())
    assert not torch.equal(frozen.weight, weights_before["1.weight"])


def test_a_teacher_may_have_sparse_gradients() -> None:
    ids = torch.randint(0, 10, (9, 4), generator=torch.Generator().manual_seed(0))
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=sparse), nn.Linear(4, 3))
        student = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 3))
        outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
        trainer = metapl.BilevelTrainer(teacher, student, "difference", outer_optimizer=outer)
        trainer.step((ids[:5], torch.arange(5) % 3), ids[5:])
        ends.append(values(teacher))
    assert error(*ends) < 1e-6


class TakesPlainLayouts(nn.Module):
    """A layer whose rule of forward mode takes contiguous tensors alone.

    That of group norm does on torch 2.12.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.autograd.forward_ad._current_level >= 0:
            raise RuntimeError(
                "view size is not compatible with input tensor's size and stride (at least one "
                "dimension)."
            )
        return x.tanh()


@pytest.mark.parametrize("norm", ["planted", "group_norm"])
def test_a_rule_of_forward_mode_that_refuses_a_layout_gives_way_to_another_order(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that forward mode comes first.
    monkeypatch.setattr("metapl.feedback.forward.SMALL", 0)
    torch.manual_seed(1)
    layer = TakesPlainLayouts() if norm == "planted" else nn.GroupNorm(2, 4)
    convolution = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    student = nn.Sequential(convolution, layer, nn.Flatten(), nn.Linear(64, 3)).double()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
    x_l = torch.randn(5, 3, 4, 4).double().to(memory_format=torch.channels_last)
    x_u = torch.randn(5, 3, 4, 4).double().to(memory_format=torch.channels_last)

    def hypergradient(mode: Any) -> metapl.Hypergradient:
        return metapl.hypergradient(
            teacher,
            student,
            outer=(x_l, torch.arange(5) % 3),
            inner=x_u,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
            mode=mode,
        )

    result = hypergradient("forward")
    assert error(result.grads, hypergradient("unrolled").grads) < 1e-12
    if norm == "planted":
        assert result.order == "double_backward"
        with pytest.raises(metapl.MetaplError, match="contiguous tensors alone"):
            hypergradient(Forward(by="tangent"))
