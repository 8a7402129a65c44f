"""Networks of unusual build on the pure road.

Right, with the user's network whole afterwards, or one line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import everything, toy
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError
from metapl.functional import compiled, graphs, stack, unstack
from metapl.problems import EqualWeights, ExampleWeights, Table

ROWS, RATE = 6, 0.3


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run plain functions, or no Inductor where a test's name says that it is captured."""
    monkeypatch.setattr(graphs, "_CACHE", {})
    if "captured" in request.node.name:
        monkeypatch.setattr(compiled, "backend_of", lambda device: {"backend": "aot_eager"})
    else:
        monkeypatch.setattr(torch, "compile", lambda function, **how: function)


class Head(nn.Module):
    """A part of a backbone under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self.head = self.model[2]

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.model[1](self.model[0](x)))
        return hidden


class Repeated(nn.Module):
    """One block three times, with statistics and a frozen part; the second name comes first."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        block[1].weight.requires_grad_(requires_grad=False)
        self.used = block[0]
        self.blocks = nn.ModuleList([block, block, block])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + self.used(x)
        return self.last(x)


class Backbone(nn.Module):
    """A backbone that is an attribute too, whose own parts are tied by a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.backbone = nn.ModuleDict({"first": self.a, "second": self.b})
        self.net = nn.Sequential(
            self.backbone["first"], nn.Tanh(), self.backbone["second"], nn.Linear(4, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.b(x)[:, :3]


class Tied(nn.Module):
    """Tied tensors of different parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


NETWORKS: list[Callable[[], nn.Module]] = [Head, Repeated, Backbone, Tied]
built_oddly = pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)


def network(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().double()


def batches(seed: int = 1) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(ROWS, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(ROWS) % 3
    return {"outer": (x, labels), "inner": (u, labels.flip(0), torch.arange(ROWS))}


def by_hand(student: nn.Module, outer: Any, inner: Any) -> tuple[Tensor, nn.Module]:
    """Return the feedback on weights of 1/2, and the student after that step.

    It is by double backward through one step of SGD.
    """
    moved = copy.deepcopy(student)
    weights = torch.full((ROWS,), 0.5, dtype=torch.float64, requires_grad=True)
    losses = weights * F.cross_entropy(moved(inner[0]), inner[1], reduction="none")
    learned = [p for p in moved.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(losses.mean(), learned, create_graph=True)
    after = copy.deepcopy(student)
    after(inner[0])  # which moves the statistics
    at = [p for p in after.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, g in zip(at, gradients, strict=True):
            p -= RATE * g
    judged = copy.deepcopy(after)
    reached = [p for p in judged.parameters() if p.requires_grad]
    v = torch.autograd.grad(F.cross_entropy(judged(outer[0]), outer[1]), reached)
    slope = sum((g * v_i).sum() for g, v_i in zip(gradients, v, strict=True))
    (h,) = torch.autograd.grad(RATE * slope, weights)
    return h, after


def trainer(student: nn.Module, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    given: dict[str, Any] = {"problem": ExampleWeights(), "verify": False}
    given["inner_optimizer"] = torch.optim.SGD(student.parameters(), lr=RATE)
    return metapl.BilevelTrainer(
        Table(torch.zeros(ROWS, dtype=torch.float64)), student, mode, **given | options
    )


class Whole:
    """A network's parts and tensors, which a call is to leave as they are."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.places = self.read()
        self.values = [t.clone() for t in self.tensors()]

    def tensors(self) -> list[Tensor]:
        return [*self.student.parameters(), *self.student.buffers()]

    def read(self) -> list[tuple[str, int, type]]:
        parameters = self.student.named_parameters(remove_duplicate=False)
        buffers = self.student.named_buffers(remove_duplicate=False)
        return [(name, id(t), type(t)) for name, t in (*parameters, *buffers)]

    def check(self, *, moved: bool = False) -> None:
        assert self.read() == self.places
        copy.deepcopy(self.student)
        if not moved:
            assert all(
                torch.equal(t, was) for t, was in zip(self.tensors(), self.values, strict=True)
            )


@built_oddly
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_a_pure_step_is_right_and_leaves_the_network_whole(
    build: Callable[[], nn.Module], mode: str
) -> None:
    student, data = network(build), batches()
    expected, after = by_hand(student, **data)
    made, whole = trainer(student, mode), Whole(student)
    step, state = made.functional()
    state, report = step(state, **data)
    whole.check()
    assert error({"h": report.feedback}, {"h": expected}) < (
        1e-6 if mode == "difference" else 1e-12
    )
    assert (
        error(state.student.params, {n: p for n, p in after.named_parameters() if p.requires_grad})
        < 1e-12
    )
    made.step(**data)  # of the same optimizer: its parameters are the network's
    whole.check(moved=True)
    assert error(dict(student.state_dict()), dict(after.state_dict())) < 1e-12


@built_oddly
def test_stacked_steps_are_single_ones(build: Callable[[], nn.Module]) -> None:
    student, data = network(build), batches()
    others = network(build, seed=7)
    whole = Whole(student)
    (step, first), (_, second) = (trainer(net).functional() for net in (student, others))
    states = [first, second]
    found, reports = torch.func.vmap(step, in_dims=(0, None, None))(
        stack(states), data["outer"], data["inner"]
    )
    whole.check()
    for number, net in enumerate((student, others)):
        expected, after = by_hand(net, **data)
        assert error({"h": reports.feedback[number]}, {"h": expected}) < 1e-12
        params = {n: p for n, p in after.named_parameters() if p.requires_grad}
        assert error(unstack(found)[number].student.params, params) < 1e-12


@pytest.mark.parametrize("how", ["plain", pytest.param("captured", marks=pytest.mark.long)])
@pytest.mark.parametrize("build", [Repeated, Backbone], ids=lambda build: build.__name__)
def test_compiled_steps_and_paths_are_right(build: Callable[[], nn.Module], how: str) -> None:
    student, data = network(build), batches()
    expected, after = by_hand(student, **data)
    whole, inner = Whole(student), torch.optim.SGD(student.parameters(), lr=RATE)
    table = Table(torch.zeros(ROWS, dtype=torch.float64))
    given: Any = {"problem": ExampleWeights(), "inner_optimizer": inner, "mode": "forward", **data}
    found = metapl.hypergradient(table, student, compile=True, **given)
    assert error({"h": found.feedback}, {"h": expected}) < 1e-12
    whole.check()
    (x, y), train = data["outer"], data["inner"][:2]
    rows: Any = {"optimizer": inner, "steps": 3, "batch_size": ROWS, "progress": False}
    pure, eager = (
        metapl.attribute(student, train, (x, y), compile=on, **rows).scores for on in (True, False)
    )
    assert error({"scores": pure}, {"scores": eager}) < 1e-9
    whole.check()
    report = trainer(student, compile=True).step(**data)
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12
    assert error(dict(student.state_dict()), dict(after.state_dict())) < 1e-12
    whole.check(moved=True)


@built_oddly
def test_a_teacher_of_such_parts_is_right_and_whole(build: Callable[[], nn.Module]) -> None:
    """Its gradient is that of the eager road, which is compared with double backward elsewhere."""
    ends = []
    for is_pure in (False, True):
        teacher, student = network(build), network(Head, seed=3)
        optimizers = [torch.optim.SGD(net.parameters(), lr=RATE) for net in (student, teacher)]
        given: Any = dict(zip(("inner_optimizer", "outer_optimizer"), optimizers, strict=True))
        made = metapl.BilevelTrainer(teacher, student, "forward", verify=False, **given)
        whole, (x, y) = Whole(teacher), batches()["outer"]
        if is_pure:
            step, state = made.functional()
            state, _ = step(state, (x, y), x)
            whole.check()
            ends.append(state.teacher.params)
        else:
            made.step((x, y), x)
            ends.append({n: p for n, p in teacher.named_parameters() if p.requires_grad})
    assert error(ends[1], ends[0]) < 1e-12


class Filled(nn.Module):
    """A buffer that the first pass fills."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", None)
        self.mean: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean(0).detach()
        found: Tensor = self.layer(x - self.mean)
        return found


def test_a_buffer_that_a_pure_pass_fills_has_to_be_there_before() -> None:
    """The state of a step has no place for it.

    L(θ′) would be taken with a buffer of the outer batch.
    """
    student = network(Filled)
    made, whole = trainer(student), Whole(student)
    step, state = made.functional()
    with pytest.raises(
        MetaplError,
        match=r"^the student makes a buffer .*\(mean\).* run the network once on a batch",
    ):
        step(state, **batches())
    whole.check()
    student(batches()["inner"][0])
    with pytest.raises(MetaplError, match=r"functional\(\) again"):
        step(state, **batches())
    expected, _ = by_hand(student, **batches())
    step, state = made.functional()
    state, report = step(state, **batches())
    assert "mean" in state.student.state
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12


class Kept(nn.Module):
    """A forward that keeps a tensor of a pass for later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 3), dict[int, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        features = self.kept.setdefault(len(x), self.layer(x).tanh())
        return self.layer(x) + features.mean(0)


class Started(nn.Linear):
    """A forward that begins by a write to its weights."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "text"),
    [(Kept, "keeps a tensor of a pass"), (Started, "writes in a pass to its weights")],
)
def test_a_pass_that_keeps_tensors_or_writes_weights_is_named(
    build: Callable[[], nn.Module], text: str
) -> None:
    step, state = trainer(network(build)).functional()

    def two_steps() -> None:
        moved, _ = step(state, **batches())
        step(moved, **batches())

    with pytest.raises(MetaplError, match=f"^the student {text}.*; expected a registered buffer"):
        two_steps()


# ---------------------------------------------------------------------------- what has no pure form


class Slopes(nn.Module):
    """A forward that has the derivative of its outputs in its inputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "torch.func":
            slopes = torch.func.grad(lambda x: self.net(x).sum())(x)
        else:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                (slopes,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        found: Tensor = self.net(x) + slopes[:, :3]
        return found


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * x.cos()


class SineWithContext(Sine):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class WithOperation(nn.Module):
    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.a, self.b, self.operation = nn.Linear(4, 8), nn.Linear(8, 3), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation.apply(self.a(x)))


class Heads(nn.Module):
    """Three heads in one call, stacked by ``torch.stack`` or by ``stack_module_state``.

    The latter detaches them.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body = how, nn.Linear(4, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        heads: list[Any] = [*self.heads]
        if self.how == "torch.stack":
            stacked = {
                name: torch.stack([getattr(head, name) for head in heads])
                for name in ("weight", "bias")
            }
        else:
            stacked = torch.func.stack_module_state(heads)[0]
        hidden = self.body(x).tanh()
        outputs = torch.vmap(
            lambda params: torch.func.functional_call(heads[0], params, (hidden,))
        )(stacked)
        found: Tensor = outputs.mean(0)
        return found


IMPURE: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "autograd.grad": (lambda: Slopes("autograd"), lambda: Slopes("torch.func"), "torch.func.grad"),
    "a function of autograd": (
        lambda: WithOperation(Sine), lambda: WithOperation(SineWithContext), "setup_context"),
    "stack_module_state": (
        lambda: Heads("stack_module_state"), lambda: Heads("torch.stack"), "torch.stack"),
}  # fmt: skip


@pytest.mark.parametrize("what", IMPURE)
def test_what_torch_func_cannot_transform_is_said_with_what_to_write_instead(what: str) -> None:
    """Of ``functional()``, of a student and of a teacher.

    And what the line proposes is right there.
    """
    impure, instead, proposed = IMPURE[what]
    student, data = network(impure), batches()
    whole = Whole(student)
    step, state = trainer(student).functional()
    with pytest.raises(MetaplError, match=rf"^the student .*{proposed}") as said:
        step(state, **data)
    assert "\n" not in str(said.value)
    whole.check()
    teacher, (x, y) = network(impure), data["outer"]
    step, state = metapl.BilevelTrainer(
        teacher, network(Head), "forward", verify=False
    ).functional()
    with pytest.raises(MetaplError, match=rf"^the teacher .*{proposed}"):
        step(state, (x, y), x)
    other = network(instead)
    expected, _ = by_hand(other, **data)
    step, state = trainer(other).functional()
    assert error({"h": step(state, **data)[1].feedback}, {"h": expected}) < 1e-12


@pytest.mark.parametrize("how", ["plain", pytest.param("captured", marks=pytest.mark.long)])
@pytest.mark.parametrize("what", IMPURE)
def test_compiled_one_line_ends_with_leave_compile_out(what: str, how: str) -> None:
    student, data = network(IMPURE[what][0]), batches()
    whole, inner = Whole(student), torch.optim.SGD(student.parameters(), lr=RATE)
    (x, y), train = data["outer"], data["inner"][:2]
    table = Table(torch.zeros(ROWS, dtype=torch.float64))
    given: Any = {"problem": ExampleWeights(), "inner_optimizer": inner, **data}
    rows: Any = {"optimizer": inner, "steps": 2, "batch_size": ROWS, "progress": False}
    calls: list[Callable[[], Any]] = [
        lambda: metapl.hypergradient(table, student, compile=True, **given),
        lambda: metapl.attribute(student, train, (x, y), compile=True, **rows),
    ]
    if what != "stack_module_state" or how == "plain":  # a whole step of it is captured, and right
        calls.append(lambda: trainer(student, compile=True, inner_optimizer=inner).step(**data))
    random = torch.get_rng_state()
    for call in calls:
        with pytest.raises(MetaplError, match=r"leave compile out\.$") as said:
            call()
        assert "\n" not in str(said.value)
        whole.check()
        assert torch.equal(random, torch.get_rng_state())


# ------------------------------------------------------------------------------ under torch.compile


def by_function(student: nn.Module) -> nn.Module:
    made: Any = REAL_COMPILE(student, backend="aot_eager")
    return made


def by_method(student: nn.Module) -> nn.Module:
    student.compile(backend="aot_eager")
    return student


def in_part(student: Any) -> nn.Module:
    student[0] = REAL_COMPILE(student[0], backend="aot_eager")
    return student


REAL_COMPILE: Any = torch.compile
WRAPPINGS = {"torch.compile": by_function, "compile()": by_method, "a part": in_part}


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_network_under_torch_compile_is_refused_at_the_door(wrapping: str, who: str) -> None:
    case = toy("mlp")
    plain = metapl.BilevelTrainer(**case.networks(), mode="none", verify=False)
    networks: dict[str, Any] = case.networks()
    networks[who] = WRAPPINGS[wrapping](networks[who])
    before, (x, y) = everything(case), case.labeled
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    given: Any = {**networks, "labeled": case.labeled, "unlabeled": case.unlabeled}
    rows: Any = {"optimizer": inner, "steps": 2, "batch_size": len(x), "progress": False}
    calls: list[Callable[[], Any]] = [
        lambda: metapl.check_gradient(**given, inner_optimizer=inner),
        lambda: metapl.BilevelTrainer(**networks, mode="none", verify=False).functional(),
        lambda: metapl.BilevelTrainer(**networks, mode="none", compile=True),
    ]
    for mode in metapl.MODES:
        if mode != "none":
            calls.append(lambda mode=mode: metapl.BilevelTrainer(**networks, mode=mode))  # type: ignore[misc]
            calls.append(
                lambda mode=mode: metapl.hypergradient(**given, mode=mode, inner_optimizer=inner)
            )  # type: ignore[misc]
    if who == "student":
        calls.append(lambda: metapl.attribute(networks["student"], (x, y), (x, y), **rows))
    for call in calls:
        with pytest.raises(
            MetaplError, match=rf"^the {who} is under torch.compile.*plain module, and compile=True"
        ):
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(case), strict=True))
    assert plain.student is case.student


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_without_feedback_a_compiled_network_trains(wrapping: str) -> None:
    """Nothing is differentiated there but by plain backward passes."""
    ends = []
    for wrap in (WRAPPINGS[wrapping], lambda network: network):
        case = toy("mlp")
        networks: dict[str, Any] = {name: wrap(net) for name, net in case.networks().items()}
        made = metapl.BilevelTrainer(**networks, mode="none")
        for _ in range(2):
            made.step(case.labeled, case.unlabeled)
        ends.append(everything(case))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_the_plain_module_and_compile_are_what_the_line_proposes() -> None:
    student, data = network(Head), batches()
    with pytest.raises(MetaplError, match="compile=True"):
        trainer(by_function(student))
    expected, _ = by_hand(student, **data)
    report = trainer(student, compile=True).step(**data)
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12
    ahead = Lookahead([data["inner"][:2]])
    with pytest.raises(MetaplError, match=r"under torch\.compile"):
        metapl.hypergradient(
            None,
            by_method(network(Head)),
            outer=data["outer"],
            inner=ahead,
            problem=EqualWeights(),
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
        )


class NamesTheStudent(ExampleWeights):
    """A penalty on the weights of a student that it reads by a closure."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        vars(self)["penalty"] = lambda: torch.stack(
            [p.square().sum() for p in student.parameters()]
        ).sum()

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return super().outer_loss(outputs, batch) + 0.5 * vars(self)["penalty"]()


def test_the_eager_step_of_a_compiled_one_reads_the_copy_by_a_closure_too() -> None:
    """Else L(θ′) of the copy has the penalty of θ, and the compiled step is refused."""
    student, data = network(Head), batches()
    table = Table(torch.zeros(ROWS, dtype=torch.float64))
    inner = torch.optim.SGD(student.parameters(), lr=RATE)
    options: Any = {"problem": NamesTheStudent(student), "inner_optimizer": inner, "compile": True}
    made = metapl.BilevelTrainer(table, student, "forward", **options)
    before = [p.detach().clone() for p in student.parameters()]
    for _ in range(2):
        made.step(**data)
    assert not any(map(torch.equal, before, student.parameters()))
