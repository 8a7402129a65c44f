"""Networks of unusual build in a step as a function, stacked and recorded.

A step is right and leaves the user's network as it was, or it ends in one line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from captures import as_functions, without_inductor
from problems_zoo import everything, toy
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import Lookahead, MetaplError
from metapl.functional import graphs, stack, unstack
from metapl.problems import EqualWeights, ExampleWeights, Table

ROWS = 6
RATE = 0.3


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run plain functions, or no Inductor where a test's name says that it is captured."""
    monkeypatch.setattr(graphs, "_CACHE", {})
    if "captured" in request.node.name:
        without_inductor(monkeypatch)
    else:
        as_functions(monkeypatch)


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
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
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
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


NETWORKS: list[Callable[[], nn.Module]] = [Head, Repeated, Backbone, Tied]
built_oddly = pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)


def network(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().double()


def batches(seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x_outer = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    x_inner = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(ROWS) % 3
    return {"outer": (x_outer, labels), "inner": (x_inner, labels.flip(0), torch.arange(ROWS))}


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def by_hand(student: nn.Module, outer: Any, inner: Any) -> tuple[Tensor, nn.Module]:
    """Return the feedback on weights of 1/2, and the student after that step.

    It is by double backward through one step of SGD.
    """
    x_outer, y_outer = outer
    x_inner, y_inner, _ = inner
    start = copy.deepcopy(student)
    weights = torch.full((ROWS,), 0.5, dtype=torch.float64, requires_grad=True)
    losses = weights * F.cross_entropy(start(x_inner), y_inner, reduction="none")
    theta = list(trainable(start).values())
    gradients = torch.autograd.grad(losses.mean(), theta, create_graph=True, materialize_grads=True)

    stepped = copy.deepcopy(student)
    # This pass moves the running statistics, as the inner pass of a step does.
    stepped(x_inner)
    with torch.no_grad():
        for p, g in zip(trainable(stepped).values(), gradients, strict=True):
            p -= RATE * g

    # L(θ′) leaves the running statistics alone, so a copy computes it.
    judged = copy.deepcopy(stepped)
    outer_loss = F.cross_entropy(judged(x_outer), y_outer)
    v = torch.autograd.grad(outer_loss, list(trainable(judged).values()), materialize_grads=True)
    slope = sum((g * v_i).sum() for g, v_i in zip(gradients, v, strict=True))
    (h,) = torch.autograd.grad(RATE * slope, weights)
    return h, stepped


def table_of_weights() -> Table:
    return Table(torch.zeros(ROWS, dtype=torch.float64))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=RATE)


def trainer_of(student: nn.Module, mode: Any = "forward", **options: Any) -> metapl.BilevelTrainer:
    """Return a trainer of one weight per example, by SGD and unverified unless options say more."""
    defaults: dict[str, Any] = {
        "problem": ExampleWeights(),
        "verify": False,
        "inner_optimizer": sgd(student),
    }
    return metapl.BilevelTrainer(table_of_weights(), student, mode, **defaults | options)


class Snapshot:
    """A network's parts and tensors, which a call is to leave as they are."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.places = self.read_places()
        self.values = [t.clone() for t in self.tensors()]

    def tensors(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    def read_places(self) -> list[tuple[str, int, type]]:
        """Return each tensor's name, identity and class, with the tied ones under every name."""
        parameters = self.network.named_parameters(remove_duplicate=False)
        buffers = self.network.named_buffers(remove_duplicate=False)
        return [(name, id(t), type(t)) for name, t in (*parameters, *buffers)]

    def check_places(self) -> None:
        """Assert that the tensors stand where they stood, though values may have moved."""
        assert self.read_places() == self.places
        copy.deepcopy(self.network)

    def check(self) -> None:
        """Assert that places and values are as they were."""
        self.check_places()
        for tensor, value in zip(self.tensors(), self.values, strict=True):
            assert torch.equal(tensor, value)


@built_oddly
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference"])
def test_a_pure_step_is_right_and_leaves_the_network_whole(
    build: Callable[[], nn.Module], mode: str
) -> None:
    student = network(build)
    data = batches()
    expected, stepped = by_hand(student, **data)
    trainer = trainer_of(student, mode)
    snapshot = Snapshot(student)
    step, state = trainer.functional()
    state, report = step(state, **data)
    snapshot.check()
    tolerance = 1e-6 if mode == "difference" else 1e-12
    assert error({"h": report.feedback}, {"h": expected}) < tolerance
    assert error(state.student.params, trainable(stepped)) < 1e-12
    # The eager step has the same optimizer, whose parameters are still the network's.
    trainer.step(**data)
    snapshot.check_places()
    assert error(dict(student.state_dict()), dict(stepped.state_dict())) < 1e-12


@built_oddly
def test_stacked_steps_are_single_ones(build: Callable[[], nn.Module]) -> None:
    students = [network(build), network(build, seed=7)]
    data = batches()
    snapshot = Snapshot(students[0])
    step, first_state = trainer_of(students[0]).functional()
    _, second_state = trainer_of(students[1]).functional()
    stacked_step = torch.func.vmap(step, in_dims=(0, None, None))
    states, reports = stacked_step(stack([first_state, second_state]), data["outer"], data["inner"])
    snapshot.check()
    for number, student in enumerate(students):
        expected, stepped = by_hand(student, **data)
        assert error({"h": reports.feedback[number]}, {"h": expected}) < 1e-12
        assert error(unstack(states)[number].student.params, trainable(stepped)) < 1e-12


@pytest.mark.parametrize("backend", ["plain", pytest.param("captured", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:scores may not say")
@pytest.mark.parametrize("build", [Repeated, Backbone], ids=lambda build: build.__name__)
def test_compiled_steps_and_paths_are_right(build: Callable[[], nn.Module], backend: str) -> None:
    student = network(build)
    data = batches()
    expected, stepped = by_hand(student, **data)
    snapshot = Snapshot(student)
    optimizer = sgd(student)

    gradient = metapl.hypergradient(
        table_of_weights(),
        student,
        **data,
        problem=ExampleWeights(),
        inner_optimizer=optimizer,
        mode="forward",
        compile=True,
    )
    assert error({"h": gradient.feedback}, {"h": expected}) < 1e-12
    snapshot.check()

    attribution: dict[str, Any] = {
        "optimizer": optimizer,
        "steps": 3,
        "batch_size": ROWS,
        "progress": False,
    }
    rows = data["inner"][:2]
    pure = metapl.attribute(student, rows, data["outer"], compile=True, **attribution)
    eager = metapl.attribute(student, rows, data["outer"], compile=False, **attribution)
    assert error({"scores": pure.scores}, {"scores": eager.scores}) < 1e-9
    snapshot.check()

    report = trainer_of(student, compile=True).step(**data)
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12
    assert error(dict(student.state_dict()), dict(stepped.state_dict())) < 1e-12
    snapshot.check_places()


@built_oddly
def test_a_teacher_of_such_parts_is_right_and_whole(build: Callable[[], nn.Module]) -> None:
    """Its gradient is that of the eager road, which is compared with double backward elsewhere."""
    teacher_params = []
    for is_pure in (False, True):
        teacher = network(build)
        student = network(Head, seed=3)
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            "forward",
            inner_optimizer=sgd(student),
            outer_optimizer=sgd(teacher),
            verify=False,
        )
        snapshot = Snapshot(teacher)
        x, y = batches()["outer"]
        if is_pure:
            step, state = trainer.functional()
            state, _ = step(state, (x, y), x)
            snapshot.check()
            teacher_params.append(state.teacher.params)
        else:
            trainer.step((x, y), x)
            teacher_params.append(trainable(teacher))
    eager, pure = teacher_params
    assert error(pure, eager) < 1e-12


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
        outputs: Tensor = self.layer(x - self.mean)
        return outputs


def test_a_buffer_that_a_pure_pass_fills_has_to_be_there_before() -> None:
    """The state of a step has no place for it.

    L(θ′) would be taken with a buffer of the outer batch.
    """
    student = network(Filled)
    trainer = trainer_of(student)
    snapshot = Snapshot(student)
    step, state = trainer.functional()
    with pytest.raises(
        MetaplError,
        match=r"^the student makes a buffer .*\(mean\).* run the network once on a batch",
    ):
        step(state, **batches())
    snapshot.check()
    student(batches()["inner"][0])
    with pytest.raises(MetaplError, match=r"functional\(\) again"):
        step(state, **batches())
    expected, _ = by_hand(student, **batches())
    step, state = trainer.functional()
    state, report = step(state, **batches())
    assert "mean" in state.student.state
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12


class Caching(nn.Module):
    """A forward that keeps a tensor of a pass for later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.features: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        features = self.features.setdefault(len(x), self.layer(x).tanh())
        return self.layer(x) + features.mean(0)


class Writing(nn.Linear):
    """A forward that begins by a write to its weights."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (Caching, "the outer loss depends on the student's layer.weight as it was before"),
        (Writing, "the student writes in a pass"),
    ],
)
def test_a_pass_that_keeps_tensors_or_writes_weights_is_named(
    build: Callable[[], nn.Module], text: str
) -> None:
    step, state = trainer_of(network(build)).functional()

    def two_steps() -> None:
        next_state, _ = step(state, **batches())
        step(next_state, **batches())

    with pytest.raises(MetaplError, match=f"^{text}"):
        two_steps()


# --------------------------------------------------------------------- what torch.func refuses


class Slopes(nn.Module):
    """A forward that has the derivative of its outputs in its inputs."""

    def __init__(self, derivative: str) -> None:
        super().__init__()
        self.derivative = derivative
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.derivative == "torch.func":
            slopes = torch.func.grad(lambda x: self.net(x).sum())(x)
        else:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                (slopes,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        outputs: Tensor = self.net(x) + slopes[:, :3]
        return outputs


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
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 3)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation.apply(self.a(x)))


class Heads(nn.Module):
    """Three heads in one call, stacked by ``torch.stack`` or by ``stack_module_state``.

    The latter detaches them.
    """

    def __init__(self, stacking: str) -> None:
        super().__init__()
        self.stacking = stacking
        self.body = nn.Linear(4, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        heads: list[Any] = [*self.heads]
        if self.stacking == "torch.stack":
            stacked = {
                "weight": torch.stack([head.weight for head in heads]),
                "bias": torch.stack([head.bias for head in heads]),
            }
        else:
            stacked = torch.func.stack_module_state(heads)[0]
        hidden = self.body(x).tanh()

        def head_outputs(params: dict[str, Tensor]) -> Tensor:
            outputs: Tensor = torch.func.functional_call(heads[0], params, (hidden,))
            return outputs

        mean: Tensor = torch.vmap(head_outputs)(stacked).mean(0)
        return mean


class Checkpointed(nn.Module):
    """A part whose forward runs once more in each backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.body, x, use_reentrant=False)
        outputs: Tensor = self.head(hidden)
        return outputs


class Hooked(Head):
    """A forward that goes on in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.model[0].register_forward_hook(lambda module, inputs, outputs: outputs.sin())


REFUSED_BY_TORCH_FUNC: dict[str, Callable[[], nn.Module]] = {
    "autograd.grad": lambda: Slopes("autograd"),
    "a function of autograd": lambda: WithOperation(Sine),
    "stack_module_state": lambda: Heads("stack_module_state"),
    "a checkpoint": Checkpointed,
    "a hook": Hooked,
}


@pytest.mark.parametrize("kind", REFUSED_BY_TORCH_FUNC)
def test_what_torch_func_cannot_transform_is_right_as_a_function_stacked_and_recorded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a student beside double backward by hand, and of a teacher beside the eager step."""
    monkeypatch.undo()
    without_inductor(monkeypatch)
    build = REFUSED_BY_TORCH_FUNC[kind]
    student = network(build)
    data = batches()
    expected, stepped = by_hand(student, **data)
    snapshot = Snapshot(student)
    step, state = trainer_of(student).functional()
    moved, report = step(state, **data)
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12
    assert error(moved.student.params, trainable(stepped)) < 1e-12
    stacked_step = torch.func.vmap(step, in_dims=(0, None, None))
    states, reports = stacked_step(stack([state, moved]), data["outer"], data["inner"])
    snapshot.check()
    again, report_again = step(moved, **data)
    for number, one in enumerate([report, report_again]):
        assert error({"h": reports.feedback[number]}, {"h": one.feedback}) < 1e-12
    assert error(unstack(states)[1].student.params, again.student.params) < 1e-12

    trainer_of(student, compile=True).step(**data)
    assert error(trainable(student), trainable(stepped)) < 1e-12

    teachers = []
    for compile in (False, True):
        teacher = network(build)
        x, y = data["outer"]
        other = network(Head)
        trainer = metapl.BilevelTrainer(teacher, other, "forward", verify=False, compile=compile)
        trainer.step((x, y), x)
        teachers.append(trainable(teacher))
    assert error(*teachers) < 1e-12


@pytest.mark.parametrize("kind", REFUSED_BY_TORCH_FUNC)
def test_what_torch_func_cannot_transform_is_right_in_whole_trainings(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    without_inductor(monkeypatch)
    student = network(REFUSED_BY_TORCH_FUNC[kind])
    data = batches()
    snapshot = Snapshot(student)
    gradients = []
    scores = []
    for compile in (False, True):
        result = metapl.hypergradient(
            table_of_weights(),
            student,
            outer=data["outer"],
            inner=Lookahead([data["inner"]] * 3),
            problem=ExampleWeights(),
            inner_optimizer=sgd(student),
            wrt=("teacher", "start", "lr"),
            compile=compile,
        )
        h = {f"h{number}": t for number, t in enumerate(result.feedback)}
        gradients.append({**result.grads, **result.start, **result.settings, **h})
        attribution = metapl.attribute(
            student,
            data["inner"][:2],
            data["outer"],
            optimizer=sgd(student),
            steps=3,
            batch_size=ROWS,
            compile=compile,
            progress=False,
        )
        scores.append({"scores": attribution.scores})
    assert error(*gradients) < 1e-12
    assert error(*scores) < 1e-12
    snapshot.check()


# ------------------------------------------------------------------------------ under torch.compile


REAL_COMPILE: Any = torch.compile


def by_function(network: nn.Module) -> nn.Module:
    compiled_network: Any = REAL_COMPILE(network, backend="aot_eager")
    return compiled_network


def by_method(network: nn.Module) -> nn.Module:
    network.compile(backend="aot_eager")
    return network


def in_part(network: Any) -> nn.Module:
    network[0] = REAL_COMPILE(network[0], backend="aot_eager")
    return network


WRAPPINGS = {"torch.compile": by_function, "compile()": by_method, "a part": in_part}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_network_under_torch_compile_is_refused_at_the_door(wrapping: str, role: str) -> None:
    case = toy("mlp")
    trainer = metapl.BilevelTrainer(**case.networks(), mode="none", verify=False)
    networks: dict[str, Any] = case.networks()
    networks[role] = WRAPPINGS[wrapping](networks[role])
    tensors_before = everything(case)
    optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1)

    def check_gradient() -> None:
        metapl.check_gradient(**networks, **case.data(), inner_optimizer=optimizer)

    def functional() -> None:
        metapl.BilevelTrainer(**networks, mode="none", verify=False).functional()

    def compiled_trainer() -> None:
        metapl.BilevelTrainer(**networks, mode="none", compile=True)

    def trainer_in(mode: str) -> None:
        metapl.BilevelTrainer(**networks, mode=mode)

    def hypergradient_in(mode: str) -> None:
        metapl.hypergradient(**networks, **case.data(), mode=mode, inner_optimizer=optimizer)

    def attribute() -> None:
        metapl.attribute(
            networks["student"],
            case.labeled,
            case.labeled,
            optimizer=optimizer,
            steps=2,
            batch_size=len(case.labeled[0]),
            progress=False,
        )

    calls: list[Callable[[], None]] = [check_gradient, functional, compiled_trainer]
    for mode in metapl.MODES:
        if mode not in ("none", "direct"):
            calls.append(partial(trainer_in, mode))
            calls.append(partial(hypergradient_in, mode))
    if role == "student":
        calls.append(attribute)
    text = rf"^the {role} is under torch.compile.*plain module .compile=True"
    for call in calls:
        with pytest.raises(MetaplError, match=text):
            call()
    for tensor_before, tensor in zip(tensors_before, everything(case), strict=True):
        assert torch.equal(tensor_before, tensor)
    assert trainer.student is case.student


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_without_feedback_a_compiled_network_trains(wrapping: str) -> None:
    """Nothing is differentiated there but by plain backward passes."""
    tensors = []
    for wrap in (WRAPPINGS[wrapping], lambda network: network):
        case = toy("mlp")
        networks = {name: wrap(net) for name, net in case.networks().items()}
        trainer = metapl.BilevelTrainer(**networks, mode="none")
        for _ in range(2):
            trainer.step(case.labeled, case.unlabeled)
        tensors.append(everything(case))
    wrapped, plain = tensors
    torch.testing.assert_close(wrapped, plain, rtol=1e-9, atol=1e-12)


def test_the_plain_module_and_compile_are_what_the_line_proposes() -> None:
    student = network(Head)
    data = batches()
    with pytest.raises(MetaplError, match="compile=True"):
        trainer_of(by_function(student))
    expected, _ = by_hand(student, **data)
    report = trainer_of(student, compile=True).step(**data)
    assert error({"h": report.feedback}, {"h": expected}) < 1e-12
    with pytest.raises(MetaplError, match=r"under torch\.compile"):
        metapl.hypergradient(
            None,
            by_method(network(Head)),
            outer=data["outer"],
            inner=Lookahead([data["inner"][:2]]),
            problem=EqualWeights(),
            inner_optimizer=sgd(student),
        )


class NamesTheStudent(ExampleWeights):
    """A penalty on the weights of a student that it reads by a closure."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()

        def penalty() -> Tensor:
            return torch.stack([p.square().sum() for p in student.parameters()]).sum()

        # A problem is frozen, so its attribute is written past the dataclass.
        vars(self)["penalty"] = penalty

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return super().outer_loss(outputs, batch) + 0.5 * vars(self)["penalty"]()


def test_the_eager_step_of_a_compiled_one_reads_the_copy_by_a_closure_too() -> None:
    """Else L(θ′) of the copy has the penalty of θ, and the compiled step is refused."""
    student = network(Head)
    data = batches()
    trainer = metapl.BilevelTrainer(
        table_of_weights(),
        student,
        "forward",
        problem=NamesTheStudent(student),
        inner_optimizer=sgd(student),
        compile=True,
    )
    weights_before = [p.detach().clone() for p in student.parameters()]
    for _ in range(2):
        trainer.step(**data)
    for weight_before, weight in zip(weights_before, student.parameters(), strict=True):
        assert not torch.equal(weight_before, weight)
