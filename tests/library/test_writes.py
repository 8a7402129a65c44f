"""Students that move state in forward, and students that write to their weights: moved once, or refused in time.

The reference is double backward on the module itself, written out: inner passes move its state one after another, the
labeled pass sees what they left.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, mlp, product, toy
from reference import error
from replays import ALL, put, twin
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError

RULE = OPTIMISERS["torch_sgd_nesterov"]
TYPES = [torch.float32, torch.float64]
REGISTRIES = {*vars(nn.Module())} - {"training"}


def case(student: nn.Module, dtype: torch.dtype, teacher: nn.Module | None = None) -> Toy:
    base = toy("mlp", rows=6, dtype=dtype)
    labeled = base.labeled[0][:6], base.labeled[1][:6]
    return Toy(teacher or base.teacher, student.to(dtype), labeled, base.unlabeled, 0)


def ahead(problem: Toy, steps: int) -> Any:
    """The inner batch, or several of them."""
    x = problem.unlabeled
    return x if steps == 1 else metapl.Lookahead([x + 0.1 * i for i in range(steps)])


def state_of(*networks: nn.Module) -> list[Any]:
    """A copy of all that networks hold: parameters, buffers, which are there, and attributes."""
    found: list[Any] = []
    for network in networks:
        for part in network.modules():
            tables = part._parameters, part._buffers, {n: v for n, v in vars(part).items() if n not in REGISTRIES}
            found += [(name, value) for table in tables for name, value in table.items()]
            found += [
                sorted(part._non_persistent_buffers_set),
                list(part._modules),
                ["hooks", len(part._forward_hooks)],
            ]
    kept = {id(t): t.detach().clone() for t in _tensors(found)}
    return copy.deepcopy(found, kept)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple | set | deque):
        return [t for element in value for t in _tensors(element)]
    return [t for element in value.values() for t in _tensors(element)] if isinstance(value, dict) else []


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple | deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    return bool(a == b)


def plainly(problem: Toy, steps: int, kind: str) -> tuple[reference.Tree, list[Any]]:
    """The teacher's gradient, and the student's state after its inner passes; ``kind``: ``"soft"`` or ``"score"``."""
    teacher, student = twin(problem.teacher), twin(problem.student)
    phi = dict(teacher.named_parameters())
    theta = {n: p for n, p in student.named_parameters() if p.requires_grad}
    own, state = dict(theta), None
    leaves, spoken = [], []
    for x in ahead(problem, steps).batches if steps > 1 else [problem.unlabeled]:
        put(student, theta)
        z = student(x)
        log_q = teacher(x).log_softmax(-1)
        if kind == "score":
            drawn = torch.multinomial(log_q.detach().exp(), 1)
            leaves.append(torch.ones(len(z), dtype=z.dtype).requires_grad_())
            inner = (leaves[-1] * F.cross_entropy(z, drawn[:, 0], reduction="none")).mean()
            spoken.append(log_q.gather(-1, drawn)[:, 0])
        else:
            leaves.append(log_q.detach().exp().requires_grad_())
            inner = reference.cross_entropy(leaves[-1], z).mean()
            spoken.append(log_q.exp())
        g = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
        theta, state = RULE.rule(theta, dict(zip(theta, g, strict=True)), state)
    put(student, own)
    after = state_of(student)
    put(student, theta)
    outer = F.cross_entropy(student(problem.labeled[0]), problem.labeled[1])
    told = torch.autograd.grad(outer, leaves)
    total = sum((t * q).sum() for t, q in zip(told, spoken, strict=True))
    return dict(zip(phi, torch.autograd.grad(total, list(phi.values())), strict=True)), after


# ------------------------------------------------------------------------------------------------------------ state


class Moving(nn.Module):
    """A network whose features are scaled by state that each pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        return self.head(h * self.factor(h.detach()))

    def factor(self, h: Tensor) -> Any:
        raise NotImplementedError


def frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=False)


class Average(Moving):
    """A frozen parameter that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.average = frozen(6)

    def factor(self, h: Tensor) -> Any:
        self.average.mul_(0.8).add_(0.5)
        return self.average.clone()


class AverageInTheGraph(Average):
    """The graph of a pass saves the parameter itself."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.by_data = by_data

    def factor(self, h: Tensor) -> Any:
        with torch.no_grad():
            (self.average.data if self.by_data else self.average).mul_(0.8).add_(0.5)
        return self.average


class AverageByData(Average):
    def factor(self, h: Tensor) -> Any:
        self.average.data = self.average.data * 0.8 + 0.5
        return self.average.clone()


class AverageInADetachedView(Average):
    def factor(self, h: Tensor) -> Any:
        self.average.data[2:].mul_(0.5)
        return self.average.clone()


class AverageExchanged(Average):
    def factor(self, h: Tensor) -> Any:
        self.average = nn.Parameter(self.average * 0.8 + 0.5, requires_grad=False)
        return self.average


class Statistics(Moving):
    """Running statistics in frozen parameters, which batch norm's operator does not say that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.var = frozen(6), frozen(6)

    def factor(self, h: Tensor) -> Any:
        F.batch_norm(torch.ones_like(h).cumsum(0), self.mean, self.var, training=True)
        return self.mean.clone()


class Counted(Moving):
    """A batch norm whose statistics are read after it has counted, and which holds more than these."""

    def __init__(self, read: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.read = nn.BatchNorm1d(6, affine=False), read

    def factor(self, h: Tensor) -> Any:
        return self.read(self.norm, self.norm(torch.ones_like(h).cumsum(0)))


def _then_by_statistics(norm: nn.BatchNorm1d, h: Tensor) -> Any:
    return 1 + h * (norm.running_var + norm.eps).rsqrt() - norm.running_mean


def _momentum_decays(norm: nn.BatchNorm1d, h: Tensor) -> Any:
    norm.momentum *= 0.5
    return 1 + norm.running_mean.clone()


def _has_a_buffer(norm: nn.BatchNorm1d, h: Tensor) -> Any:
    norm.seen = h.mean(0) if getattr(norm, "seen", None) is None else 0.5 * norm.seen
    return norm.seen


def _changes_mode(norm: nn.BatchNorm1d, h: Tensor) -> Any:
    norm.train(not norm.training)
    return 1 + h


NORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "count": lambda norm, h: norm.num_batches_tracked.to(h.dtype).clone(),
    "mean": lambda norm, h: 1 + norm.running_mean.clone(),
    "then by statistics": _then_by_statistics,
    "momentum decays": _momentum_decays,
    "has a buffer": _has_a_buffer,
    "changes mode": _changes_mode,
}


class Packed(Moving):
    """Views of one buffer, each written to or read through another."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ones(2, 6, dtype=torch.float64))
        if attribute:
            self.mean = [self.packed[0]]
        else:
            self.register_buffer("row", self.packed[0])

    def _apply(self, move: Any, recurse: bool = True) -> Any:
        """To another type of number, with what shares memory."""
        super()._apply(move, recurse)
        if "row" in self._buffers:
            self.row = self.packed[0]
        else:
            self.mean = [self.packed[0]]
        return self

    def factor(self, h: Tensor) -> Any:
        (self.row if "row" in self._buffers else self.mean[0]).mul_(0.5).add_(1)
        return self.packed.sum(0)


class MovedBackward(Moving):
    """State that a hook moves in the backward pass."""

    def __init__(self, frozen_one: bool) -> None:
        super().__init__()
        if frozen_one:
            self.average = frozen(6)
        else:
            self.register_buffer("average", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        if h.requires_grad:
            h.register_hook(self.move)
        return self.head(h * self.average.clone())

    def move(self, g: Tensor) -> None:
        self.average.data.mul_(0.8).add_(0.5)


class LateHook(Moving):
    """A hook that the first pass registers, and one that it removes."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.head.register_forward_hook(lambda module, given, z: 3 * z)

    def factor(self, h: Tensor) -> Any:
        if not self.ready:
            self.ready = True
            self.body.register_forward_hook(lambda module, given, z: 2 * z)
        else:
            self.head._forward_hooks.clear()
        return 1.0


class MissingBuffer(Moving):
    """A buffer that is None until the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", None)

    def factor(self, h: Tensor) -> Any:
        self.m = torch.ones(6, dtype=h.dtype) if self.m is None else 0.5 * self.m
        return self.m


class LateBuffer(Moving):
    """A buffer that the first pass registers."""

    def factor(self, h: Tensor) -> Any:
        if not hasattr(self, "m"):
            self.register_buffer("m", torch.ones(6, dtype=h.dtype), persistent=False)
        self.m.data.mul_(0.5)
        return self.m.clone()


class Attribute(Moving):
    def __init__(self, start: Any, move: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.part.state, self.move = start, move

    def factor(self, h: Tensor) -> Any:
        if isinstance(self.part.state, Tensor):
            self.part.state = self.part.state.to(h.dtype)
        self.part.state, factor = self.move(self.part.state, h)
        return factor


class MadeLate(Moving):
    def factor(self, h: Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls


def _append(values: Any, h: Tensor) -> Any:
    values.append(float(len(values) + 1))
    return values, sum(values)


def _in_place(t: Tensor, h: Tensor) -> Any:
    return t.mul_(0.5), t.clone()


def _nested(held: dict[str, Any], h: Tensor) -> Any:
    held["deep"][0].append(1.0)
    held["t"].mul_(0.5)
    return held, len(held["deep"][0]) * held["t"].to(h.dtype)


def _known(held: set[int], h: Tensor) -> Any:
    held.add(len(held))
    return held, len(held)


ATTRIBUTES: dict[str, tuple[Any, Callable[[Any, Tensor], Any]]] = {
    "number": (0, lambda n, h: (n + 1, n + 1.0)),
    "fraction": (1.0, lambda a, h: (0.5 * a, a)),
    "flag": (False, lambda b, h: (not b, 2.0 if b else 1.0)),
    "text": ("a", lambda s, h: (s + "a", float(len(s)))),
    "none": (None, lambda a, h: (2.0 if a is None else 3.0, 1.0 if a is None else a)),
    "tuple": ((1, 2.0), lambda a, h: ((a[0] + 1, a[1]), a[0] * a[1])),
    "list": ([1.0], _append),
    "deque": (deque([1.0], maxlen=2), _append),
    "set": ({0}, _known),
    "tensor": (torch.ones(6), lambda t, h: (0.5 * t, t)),
    "tensor in place": (torch.ones(6), _in_place),
    "nested": ({"t": torch.ones(6), "deep": ([1.0],)}, _nested),
}

MOVING: dict[str, Callable[[], nn.Module]] = {
    "frozen": Average,
    "frozen by .data": AverageByData,
    "view of frozen": AverageInADetachedView,
    "statistics": Statistics,
    "views in buffers": lambda: Packed(False),
    "views in attributes": lambda: Packed(True),
    "buffer moved backward": lambda: MovedBackward(False),
    "frozen moved backward": lambda: MovedBackward(True),
    "late hook": LateHook,
    "missing buffer": MissingBuffer,
    "late buffer": LateBuffer,
    "late attribute": MadeLate,
    **{f"norm: {name}": lambda name=name: Counted(NORMS[name]) for name in NORMS},
    **{f"attribute: {name}": lambda name=name: Attribute(*copy.deepcopy(ATTRIBUTES[name])) for name in ATTRIBUTES},
}

NAMED, EACH_WAY = [kind for kind in MOVING if ":" not in kind], ["forward", "difference", "unrolled", "none"]

WRITTEN = ("frozen", "frozen by .data", "view of frozen", "statistics", "frozen moved backward")
"""Frozen parameters that are written to, by which the graphs of earlier steps would be changed."""

BOUND = {torch.float64: {"difference": 1e-4, "": 1e-9}, torch.float32: {"difference": 2e-2, "": 1e-4}}
SOFT = ("unrolled", "forward", "difference", "difference_one_sided")


@pytest.mark.parametrize(
    ("mode", "steps", "dtype", "kind"),
    [
        *product(ALL, [1], TYPES, MOVING, usual=[*EACH_WAY, 1, torch.float64, *NAMED]),
        *product(["forward", "unrolled", "none"], [3], TYPES, MOVING, usual=[torch.float64, *MOVING]),
    ],
    ids=str,
)
def test_state_moves_once(mode: str, steps: int, dtype: torch.dtype, kind: str) -> None:
    """By the inner passes, in order; the gradient is of the passes that were, and a call moves nothing."""
    torch.manual_seed(5)
    problem = case(MOVING[kind](), dtype)
    given: dict[str, Any] = {"labeled": problem.labeled, "unlabeled": ahead(problem, steps), "mode": ALL[mode]}
    if (mode, steps) == ("unrolled", 3) and kind in WRITTEN:
        refused(problem, mode, steps, r"frozen parameter.*mode=\"forward\", which is as exact")
        return
    problem.draw_from_start()
    expected, after = plainly(problem, steps, "soft" if mode in (*SOFT, "none") else "score")
    before = state_of(problem.teacher, problem.student)
    problem.draw_from_start()
    inner = RULE.build(problem.student)
    found = metapl.hypergradient(**problem.networks(), **given, inner_optimizer=inner)
    assert alike(before, state_of(problem.teacher, problem.student))
    if mode in SOFT or "per_example" in mode:
        assert error(found.grads, expected) < BOUND[dtype]["difference" if "difference" in mode else ""]
    weights = {name for name, p in problem.student.named_parameters() if p.requires_grad}
    problem.draw_from_start()
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=given.pop("mode"), inner_optimizer=inner)
    trainer.step(**given)
    moved, left = state_of(problem.student), {n.rpartition(".")[2] for n in weights}
    assert alike([v for v in moved if v[:1] and v[0] not in left], [v for v in after if v[:1] and v[0] not in left])


def refused(problem: Toy, mode: str, steps: int, match: str, **options: Any) -> None:
    """By both calls, before anything moved."""
    inner = RULE.build(problem.student)
    given = {"labeled": problem.labeled, "unlabeled": ahead(problem, steps)}
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode], inner_optimizer=inner, **options)
    for call in (trainer.hypergradient, trainer.step):
        problem.draw_from_start()
        before = state_of(problem.teacher, problem.student), torch.get_rng_state()
        with pytest.raises(MetaplError, match=match):
            call(**given)
        assert alike(before, (state_of(problem.teacher, problem.student), torch.get_rng_state()))
    assert trainer.steps_done == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", ["forward", "none"])
def test_state_of_micro_batches(mode: str, dtype: torch.dtype) -> None:
    """Each is replayed from the state of its own pass; the labeled batch is seen with what the last one left."""
    torch.manual_seed(5)
    problem = case(Average(), dtype)
    twins = [twin(problem.teacher), twin(problem.student)]
    z = torch.cat([twins[1](x) for x in problem.unlabeled.chunk(2)])
    q = twins[0](problem.unlabeled).softmax(-1)
    leaf = q.detach().requires_grad_()
    theta = {n: p for n, p in twins[1].named_parameters() if p.requires_grad}
    g = torch.autograd.grad(reference.cross_entropy(leaf, z).mean(), list(theta.values()), create_graph=True)
    after = twins[1].average.clone()
    new, _ = RULE.rule(theta, dict(zip(theta, g, strict=True)), None)
    put(twins[1], new)
    outer = torch.stack(
        [F.cross_entropy(twins[1](x), y) for x, y in zip(*(t.chunk(2) for t in problem.labeled), strict=True)]
    ).mean()
    phi = dict(twins[0].named_parameters())
    told = torch.autograd.grad(outer, leaf)[0]
    expected = dict(zip(phi, torch.autograd.grad((told * q).sum(), list(phi.values())), strict=True))
    trainer = metapl.BilevelTrainer(
        **problem.networks(), mode=mode, inner_optimizer=RULE.build(problem.student), accumulate=2
    )
    before = state_of(problem.student)
    found = trainer.hypergradient(**problem.data())
    assert alike(before, state_of(problem.student))
    if mode == "forward":
        assert error(found.grads, expected) < BOUND[dtype][""]
    trainer.step(**problem.data())
    assert torch.equal(problem.student.average, after)


@pytest.mark.parametrize("kind", MOVING)
def test_a_step_that_fails_puts_state_back(kind: str) -> None:
    torch.manual_seed(5)
    problem = case(MOVING[kind](), torch.float64)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    trainer.step(**problem.data())
    before = state_of(problem.teacher, problem.student)
    poor = torch.full_like(problem.labeled[0], torch.nan), problem.labeled[1]
    with pytest.raises(MetaplError):
        trainer.step(poor, problem.unlabeled)
    assert alike(before, state_of(problem.teacher, problem.student))


TEACHERS: dict[str, Callable[[], nn.Module]] = {
    **{n: MOVING[n] for n in ("frozen", "frozen by .data", "missing buffer", "attribute: list")},
    "in the graph": lambda: AverageInTheGraph(False),
    "in the graph by .data": lambda: AverageInTheGraph(True),
}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("mode", ["forward", "reinforce", "unrolled"])
def test_recomputing_a_teacher_moves_its_state_once(mode: str, kind: str) -> None:
    ends = []
    for recompute in (False, True):
        torch.manual_seed(5)
        problem = case(mlp(), torch.float64, TEACHERS[kind]().double())
        outer = torch.optim.SGD([p for p in problem.teacher.parameters() if p.requires_grad], lr=0.5)
        trainer = metapl.BilevelTrainer(
            **problem.networks(), mode=mode, outer_optimizer=outer, recompute_teacher=recompute, teacher_losses=()
        )
        before = state_of(problem.teacher)
        grads = trainer.hypergradient(**problem.data()).grads
        assert alike(before, state_of(problem.teacher))
        ends.append(list(grads.values()))
        for _ in range(2):
            trainer.step(**problem.data())
        ends.append(state_of(problem.teacher, problem.student))
    assert alike(ends[:2], ends[2:])


class PartMadeLate(Moving):
    def factor(self, h: Tensor) -> Any:
        if not hasattr(self, "norm"):
            self.norm = nn.BatchNorm1d(6, affine=False, dtype=h.dtype)
        return 1 + self.norm(h)


@pytest.mark.parametrize("mode", ALL)
def test_a_submodule_that_forward_makes_is_refused(mode: str) -> None:
    refused(case(PartMadeLate(), torch.float64), mode, 1, r"the student makes its submodule norm \(of PartMadeLate\)")


@pytest.mark.parametrize("mode", ALL)
def test_a_frozen_parameter_that_is_exchanged_is_refused(mode: str) -> None:
    refused(
        case(AverageExchanged(), torch.float64), mode, 1, r"the student writes to its frozen parameter average.*buffer"
    )


class SharedMemory(Moving):
    """A frozen parameter beside a learned one in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.ParameterList([frozen(CLASSES)])

    def factor(self, h: Tensor) -> Any:
        self.head.bias.data.mul_(0.9)
        return 1.0


@pytest.mark.parametrize("mode", ALL)
def test_a_write_to_a_weight_beside_a_frozen_parameter_is_refused(mode: str) -> None:
    student = SharedMemory().double()
    memory = torch.cat([student.head.bias.data, student.kept[0].data])
    student.head.bias.data, student.kept[0].data = memory.chunk(2)
    refused(case(student, torch.float64), mode, 1, "the student writes to its parameter head.bias")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_teacher_that_writes_to_what_its_graph_reads_is_refused(steps: int) -> None:
    problem = case(mlp(), torch.float64, AverageInTheGraph(False).double())
    outer = torch.optim.SGD([p for p in problem.teacher.parameters() if p.requires_grad], lr=0.5)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward", outer_optimizer=outer)
    before = state_of(problem.teacher, problem.student)
    with pytest.raises(MetaplError, match=r"the teacher's graph has saved a tensor.*clone\(\)"):
        trainer.step(problem.labeled, ahead(problem, steps))
    assert alike(before, state_of(problem.teacher, problem.student))


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


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", ["unrolled", "forward", "reinforce_per_example"])
def test_a_momentum_encoder_is_a_constant_to_the_derivative(mode: str, dtype: torch.dtype) -> None:
    """Forward mode would go through its update, and reverse mode does not."""
    torch.manual_seed(5)
    problem = case(Momentum(), dtype)
    problem.draw_from_start()
    expected, _ = plainly(problem, 1, "score" if mode == "reinforce_per_example" else "soft")
    problem.draw_from_start()
    inner = RULE.build(problem.student)
    found = metapl.hypergradient(**problem.networks(), **problem.data(), mode=mode, inner_optimizer=inner)
    assert error(found.grads, expected) < BOUND[dtype][""]
