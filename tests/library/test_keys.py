"""What a graph holds for: each change after which a compiled or stacked step has to be another.

Weights of both networks are those of a trainer that is not compiled.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from captures import without_inductor
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError
from metapl.functional import recorded, stack, training
from metapl.problems import EqualWeights

SETTINGS = types.SimpleNamespace(factor=1.0)


class Kind(enum.Enum):
    PLAIN = 1
    DOUBLED = 2


KIND = Kind.PLAIN
FACTOR = torch.ones(())
DEFAULT = [1.0]


class Config:
    factor = 1.0

    def __init__(self, x: float = 1.0) -> None:
        self.x = x


CONFIG = Config()


class Scaled(nn.Module):
    """A part that scales by what it reads where ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.config = Config()
        self.tensor = torch.ones(8)
        self.counts = {"n": 0}
        self.mean = torch.ones(8)

    @property
    def from_property(self) -> float:
        return CONFIG.x

    @staticmethod
    def from_static_method() -> float:
        return CONFIG.x

    def from_default(self, numbers: list[float] = DEFAULT) -> float:
        return numbers[0]

    def factor(self, x: Tensor) -> Any:
        """Return what the inputs are multiplied by."""
        factors: dict[str, Callable[[], Any]] = {
            "a global object": lambda: CONFIG.x,
            "a namespace": lambda: SETTINGS.factor,
            "a class": lambda: Config.factor,
            "an enumeration": lambda: 2.0 if KIND is Kind.DOUBLED else 1.0,
            "a global tensor": lambda: FACTOR,
            "a property": lambda: self.from_property,
            "a static method": self.from_static_method,
            "a default": self.from_default,
            "an attribute's attribute": lambda: self.config.x,
            "a tensor in an attribute": lambda: self.tensor,
        }
        return factors[self.kind]()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(x)


def change(part: Scaled, to: float) -> None:
    """Let the part read another number, where it reads it."""
    global KIND, FACTOR
    if part.kind in ("a global object", "a property", "a static method"):
        CONFIG.x = to
    elif part.kind == "a namespace":
        SETTINGS.factor = to
    elif part.kind == "a class":
        Config.factor = to
    elif part.kind == "an enumeration":
        KIND = Kind.DOUBLED if to == 2.0 else Kind.PLAIN
    elif part.kind == "a global tensor":
        FACTOR = torch.tensor(to)
    elif part.kind == "a default":
        DEFAULT[0] = to
    elif part.kind == "an attribute's attribute":
        part.config.x = to
    else:
        part.tensor = torch.full((8,), to)


KINDS = [
    "a global object",
    "a namespace",
    "a class",
    "an enumeration",
    "a global tensor",
    "a property",
    "a static method",
    "a default",
    "an attribute's attribute",
    "a tensor in an attribute",
]


def network(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), *parts, nn.Tanh(), nn.Linear(8, 3))


def batches() -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    return (torch.randn(12, 4), torch.arange(12) % 3), torch.randn(12, 4)


def trainers(build: Callable[[], nn.Module], **options: Any) -> list[metapl.BilevelTrainer]:
    """Return a trainer that is compiled, and one that is not, of equal networks."""
    pair = []
    for compile in (True, False):
        torch.manual_seed(0)
        pair.append(
            metapl.BilevelTrainer(
                network(), build(), "forward", compile=compile, verify=False, **options
            )
        )
    return pair


def agree(pair: list[metapl.BilevelTrainer]) -> None:
    """Take a step by both, and compare the weights."""
    outer, inner = batches()
    for trainer in pair:
        trainer.step(outer, inner)
    for role in ("student", "teacher"):
        one, two = (getattr(trainer, role).state_dict() for trainer in pair)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_recorded_anew_for_what_a_forward_reads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    pair = trainers(lambda: network(Scaled(kind)))
    for factor in (2.0, 1.0):
        for trainer in pair:
            change(trainer.student[1], factor)
        agree(pair)


@pytest.mark.filterwarnings("ignore:a step is recorded for the third time")
def test_an_object_that_comes_back_with_another_number_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    pair = trainers(lambda: network(Scaled("an attribute's attribute")))
    agree(pair)
    parts = [trainer.student[1] for trainer in pair]
    first = [part.config for part in parts]
    for part in parts:
        part.config = Config()
    agree(pair)
    for part, config in zip(parts, first, strict=True):
        config.x = 3.0
        part.config = config
    agree(pair)


def test_settings_of_the_trainer_that_change_are_another_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    pair = trainers(network)
    losses = [metapl.CrossEntropy()]
    for trainer in pair:
        trainer.teacher_losses = losses
    agree(pair)
    losses[0] = metapl.CrossEntropy(label_smoothing=0.5)
    agree(pair)


@pytest.mark.parametrize("setting", ["momentum", "weight_decay"])
@pytest.mark.filterwarnings("ignore:a step is recorded for the third time. which numbers")
def test_a_setting_that_leaves_zero_or_becomes_it_is_another_step(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    pair = trainers(network)
    for trainer in pair:
        for optimizer in (trainer.inner_optimizer, trainer.outer_optimizer):
            optimizer.param_groups[0].update(momentum=0.0, nesterov=False, weight_decay=0.0)
    for value in (0.0, 0.5, 0.0, 0.3):
        for trainer in pair:
            for optimizer in (trainer.inner_optimizer, trainer.outer_optimizer):
                optimizer.param_groups[0][setting] = value
        agree(pair)
        agree(pair)


def test_a_hook_that_is_replaced_and_what_one_reads_are_another_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    pair = trainers(network)
    factors = [2.0]
    hooks = [t.student.register_forward_hook(lambda m, i, o: 2 * o) for t in pair]
    agree(pair)
    for hook in hooks:
        hook.remove()
    for trainer in pair:
        trainer.student.register_forward_hook(lambda m, i, o: factors[0] * o / 4)
    agree(pair)
    factors[0] = 5.0
    agree(pair)


class Tripled(nn.Module):
    """A layer of which training is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * (3 if self.training else 1)


def frozen(network: nn.Module) -> nn.Module:
    return network.requires_grad_(requires_grad=False)


class WithModule(EqualWeights):
    """Cross-entropy beside a network that the problem holds."""

    factors: ClassVar = [1.0]

    def __init__(self, beside: nn.Module) -> None:
        self.beside = beside

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(outputs + self.beside(x), y, reduction="none")
        return signal.value * self.factors[0] * losses


@pytest.mark.parametrize("is_described", [True, False])
@pytest.mark.parametrize("way", ["tasks", "a path", "scores"])
def test_the_mode_of_a_module_that_a_problem_holds_is_another_graph(
    way: str, is_described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    student = network()
    problem = WithModule(frozen(Tripled()))
    if not is_described:
        student.register_forward_hook(lambda m, i, o: 1.5 * o)
    (x, y), _ = batches()
    # Three tasks of four rows.
    tasks = x.view(3, 4, 4), y.view(3, 4)
    one = tasks[0][0], tasks[1][0]

    def found(*, fast: bool) -> Tensor:
        sgd = torch.optim.SGD(student.parameters(), lr=0.3)
        if way == "scores":
            options: dict[str, Any] = {"steps": 6, "batch_size": 4, "verify": False}
            return metapl.attribute(
                student,
                (x, y),
                one,
                optimizer=sgd,
                problem=problem,
                compile=fast,
                progress=False,
                generator=torch.Generator().manual_seed(0),
                **options,
            ).scores

        def gradient(outer: Any, inner: Any, **options: Any) -> Tensor:
            start = metapl.hypergradient(
                None,
                student,
                outer=outer,
                inner=inner,
                problem=problem,
                inner_optimizer=sgd,
                wrt="start",
                verify=False,
                **options,
            ).start
            return start["0.weight"]

        if way == "a path":
            return gradient(one, metapl.Lookahead([one] * 2), compile=fast)
        if fast:
            return gradient(tasks, tasks, tasks=True)
        return torch.stack([gradient(task, task) for task in zip(*tasks, strict=True)]).mean(0)

    for is_training in (False, True):
        problem.beside.train(is_training)
        torch.testing.assert_close(found(fast=True), found(fast=False), rtol=1e-3, atol=1e-6)


def test_graphs_that_are_made_for_another_number_are_compared_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    compared: list[Any] = []
    take = training.eager_gradient

    def counted(*arguments: Any) -> Any:
        compared.append(arguments)
        return take(*arguments)

    monkeypatch.setattr(training, "eager_gradient", counted)
    student = network()
    problem = WithModule(frozen(Tripled()))
    (x, y), _ = batches()
    counts = []
    monkeypatch.setattr(WithModule, "factors", [1.0])
    for factor in (1.0, 1.0, 2.0, 2.0):
        problem.factors[0] = factor
        metapl.hypergradient(
            None,
            student,
            outer=(x, y),
            inner=metapl.Lookahead([(x, y)]),
            problem=problem,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.3),
            wrt="start",
            compile=True,
            verify=False,
        )
        counts.append(len(compared))
    assert counts == [1, 1, 2, 2]


def test_a_hook_on_an_optimizers_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    compiled = trainers(network)[0]
    outer, inner = batches()
    compiled.step(outer, inner)
    compiled.outer_optimizer.register_step_post_hook(lambda *arguments: None)
    with pytest.raises(MetaplError, match="a hook on an optimizer's step"):
        compiled.step(outer, inner)


@pytest.mark.parametrize("label", [7, -1, -100])
def test_a_label_out_of_range_is_refused_and_moves_nothing(
    label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    compiled = trainers(network)[0]
    (x, y), inner = batches()
    compiled.step((x, y), inner)
    before = [p.detach().clone() for p in compiled.student.parameters()]
    wrong = y.clone()
    wrong[0] = label
    with pytest.raises(MetaplError, match="labels reach outside 0..2"):
        compiled.step((x, wrong), inner)
    assert all(map(torch.equal, before, compiled.student.parameters()))
    step, state = compiled.functional()
    with pytest.raises(MetaplError, match=f"the labels are .*{label}"):
        step(state, (x, wrong), inner)
    step(state, (x, y), inner)
    _, report = step(state, (x, wrong), inner)
    assert bool(report.flag.isnan())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counts["n"] += 1
        return x * max(0.0, 1 - 0.01 * self.counts["n"])


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + x.detach().abs().mean(0)
        return x / self.mean


@pytest.mark.parametrize(("build", "name"), [(Counting, "counts"), (Averaging, "mean")])
def test_state_that_a_network_keeps_in_python_is_refused(
    build: Callable[[], nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    compiled = trainers(lambda: network(build()))[0]
    with pytest.raises(MetaplError, match=f"1.{name}.* changes in a step"):
        compiled.step(*batches())


class Smoothing(nn.Module):
    """A part whose first pass makes what later ones read."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        self.mean = 0.5 * (mean + getattr(self, "mean", mean))
        return x - self.mean


class KeepingFirst(nn.Module):
    """A part that keeps the scale of the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self.kept:
            self.kept["scale"] = x.detach().std(0)
        return x / self.kept["scale"]


class Rotating(nn.Module):
    """A part that fills a cache with what no batch changes."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "angles"):
            self.angles = torch.arange(x.shape[1]) / 10
        return x * self.angles.cos()


@pytest.mark.parametrize(("build", "name"), [(Smoothing, "mean"), (KeepingFirst, "kept")])
def test_what_a_first_step_makes_and_later_ones_read_is_refused(
    build: Callable[[], nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_inductor(monkeypatch)
    compiled = trainers(lambda: network(build()))[0]
    before = [p.detach().clone() for p in compiled.student.parameters()]
    with pytest.raises(MetaplError, match=f"1.{name} is made by its first step"):
        compiled.step(*batches())
    assert not vars(compiled.student[1]).get(name)
    assert all(map(torch.equal, before, compiled.student.parameters()))


def test_what_a_look_ahead_makes_and_later_ones_read_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    compiled = trainers(lambda: network(KeepingFirst()), lookahead=2)[0]
    outer, inner = batches()
    with pytest.raises(MetaplError, match=r"1\.kept is made by its first step"):
        compiled.step(outer, metapl.Lookahead([inner, inner + 1]))


@pytest.mark.parametrize("build", [Counting, Averaging, Smoothing, KeepingFirst])
def test_state_that_a_network_keeps_in_python_is_refused_in_stacks(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    trainer = metapl.BilevelTrainer(network(), network(build()), "forward", verify=False)
    step, state = trainer.functional()
    before = dict(vars(trainer.student[1]))
    with pytest.raises(
        MetaplError, match=r"a network's 1\..* (changes|is made) (in a step|by its)"
    ):
        torch.func.vmap(step, in_dims=(0, None, None))(stack([state, state]), *batches())
    assert vars(trainer.student[1]) == before


@pytest.mark.parametrize("build", [Counting, Smoothing, KeepingFirst])
def test_state_that_a_network_keeps_in_python_is_refused_in_recorded_functions(
    build: Callable[[], nn.Module],
) -> None:
    net = network(build())

    def gradient(params: dict[str, Tensor], x: Tensor) -> Any:
        out = torch.func.functional_call(net, params, (x,)).sum()
        return torch.autograd.grad(out, list(params.values()))

    with pytest.raises(MetaplError, match="by itself and recorded, on the same draws"):
        recorded(gradient)(dict(net.named_parameters()), batches()[1])


def test_a_cache_that_a_pass_fills_is_recorded() -> None:
    """It stays empty: once it is full, it is a tensor that no argument holds."""
    net, other = network(Rotating()), network(Rotating())
    other.load_state_dict(net.state_dict())

    def gradient(net: nn.Module, params: dict[str, Tensor], x: Tensor) -> Any:
        out = torch.func.functional_call(net, params, (x,)).square().sum()
        return torch.autograd.grad(out, list(params.values()))

    x = batches()[1]
    step = recorded(partial(gradient, net))
    for _ in range(2):
        found = step(dict(net.named_parameters()), x)
        torch.testing.assert_close(found, gradient(other, dict(other.named_parameters()), x))


def test_a_cache_that_a_pass_fills_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    pair = trainers(lambda: network(Rotating()))
    for _ in range(2):
        agree(pair)


def test_a_tensor_that_is_no_argument_is_compiled() -> None:
    """By Inductor, which needs its shape and its type."""
    pair = trainers(lambda: network(Scaled("a tensor in an attribute")))
    agree(pair)


class Judging(metapl.PseudoLabels):
    """A loss by a module that the problem holds."""

    def __init__(self, judge: nn.Module) -> None:
        super().__init__()
        vars(self)["judge"] = judge

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        return super().outer_loss(vars(self)["judge"](outputs), batch)


def test_a_module_that_the_problem_holds_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    pair = [trainers(network, problem=Judging(nn.Dropout(0.0)))[number] for number in (0, 1)]
    agree(pair)
    for trainer in pair:
        vars(trainer.problem)["judge"].p = 1.0
        vars(trainer.problem)["judge"].eval()
    agree(pair)


@pytest.mark.parametrize("what", ["mode", "hook", "part"])
def test_a_stacked_step_looks_at_modes_hooks_and_parts(what: str) -> None:
    torch.manual_seed(0)
    student = network(nn.BatchNorm1d(8))
    step, state = metapl.BilevelTrainer(network(), student, verify=False).functional()
    mapped = torch.func.vmap(step, (0, None, None), randomness="same")
    outer, inner = batches()
    mapped(stack([state, state]), outer, inner)
    if what == "mode":
        student.eval()
    elif what == "hook":
        student[0].register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    else:
        student[2] = nn.ReLU()
    expected, _ = step(state, outer, inner)
    found, _ = mapped(stack([state, state]), outer, inner)
    for name, t in expected.student.params.items():
        torch.testing.assert_close(found.student.params[name][0], t)


SCALE = 2.0


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


def test_a_recorded_function_is_recorded_anew_for_its_variables() -> None:
    global SCALE
    function = recorded(scaled)
    x = torch.ones(3)
    assert torch.equal(function(x), 2 * x)
    SCALE = 5.0
    assert torch.equal(function(x), 5 * x)
    config = Config(2.0)
    by_closure = recorded(lambda x: x * config.x)
    assert torch.equal(by_closure(x), 2 * x)
    config.x = 4.0
    assert torch.equal(by_closure(x), 4 * x)


def test_a_variable_that_is_deleted_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PASSING", 3.0)
    function = recorded(lambda x: x * globals().get("PASSING", 1.0) if "PASSING" else x)
    read = recorded(reads_passing)
    x = torch.ones(3)
    function(x)
    read(x)
    monkeypatch.delitem(globals(), "PASSING")
    assert torch.equal(read(x), x)


def reads_passing(x: Tensor) -> Tensor:
    try:
        return x * PASSING  # type: ignore[name-defined]
    except NameError:
        return x * 1.0
