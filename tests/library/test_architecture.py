"""A compiled training is found again by what was compiled.

It serves what is equal, and nothing that computes something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from captures import as_functions, without_inductor
from reference import error
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import metapl
from metapl import Lookahead
from metapl.functional import graphs
from metapl.functional.architecture import BareCopier, Describer, Undescribed, description_of
from metapl.problems import EqualWeights


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Capture without Inductor, with graphs of the test alone, and return them."""
    monkeypatch.setattr(graphs, "_CACHE", {})
    return without_inductor(monkeypatch)


@dataclass
class Settings:
    scale: float = 0.5
    widths: list[int] = field(default_factory=lambda: [6, 3])


SHIFT = 0.1


class Student(nn.Module):
    """A network with all that a description has to tell apart.

    It has a part under two names, an activation, a setting in a dataclass, a number of the class,
    and reads one of its module.
    """

    power = 1.0

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.settings = Settings(scale)
        self.activation = partial(F.gelu, approximate="tanh")
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.parts = nn.ModuleList([self.last, self.last])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.activation(self.first(x)))
        return self.power * self.settings.scale * self.parts[1](hidden) + SHIFT


class Other(Student):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).tanh()


def batch(number: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(number + 100)
    return torch.randn(8, 4, generator=draw, dtype=torch.float64), torch.arange(8) % 3


def student(seed: int = 0, kind: Any = Student, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    network: nn.Module = kind(**options).double()
    return network


def gradient(
    network: nn.Module, problem: Any = None, rule: Any = torch.optim.SGD, compile: bool = True
) -> Tensor:
    """Return the feedback of two steps and the gradient in the start, as one tensor."""
    optimizer = rule(network.parameters(), lr=0.3)
    result = metapl.hypergradient(
        None,
        network,
        outer=batch(-1),
        inner=Lookahead(batch, steps=2),
        problem=problem or EqualWeights(),
        inner_optimizer=optimizer,
        wrt="start",
        compile=compile,
    )
    tensors = (*result.feedback, *result.start.values())
    return torch.cat([t.flatten() for t in tensors])


def assert_is_eager(compiled: Tensor, network: nn.Module, *arguments: Any) -> None:
    """Compare a gradient with the one of the eager road."""
    expected = gradient(network, *arguments, compile=False)
    assert error({"h": compiled}, {"h": expected}) < 1e-9


def met_by_dynamo(first: nn.Module) -> nn.Module:
    """Return another student that torch.compile has left marks on."""
    network = student(2)
    torch.compile(network, backend="eager")(batch(0)[0])
    assert any(vars(p) for p in network.parameters())
    return network


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda first: first,
    "a copy": copy.deepcopy,
    "another one": lambda first: student(1),
    "one that torch.compile has met": met_by_dynamo,
}


def test_another_student_of_the_architecture_compiles_nothing(
    traced: list[GraphModule],
) -> None:
    first = student()
    gradient(first)
    for make in SAME.values():
        network = make(first)
        weights = {name: t.clone() for name, t in network.state_dict().items()}
        compiled_before = len(traced)
        assert_is_eager(gradient(network), network)
        assert error(weights, network.state_dict()) == 0
        assert len(traced) == compiled_before
    assert len(graphs._CACHE) == 1


def test_a_problem_that_counts_its_calls_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    as_functions(monkeypatch)
    network = student()
    problem = Counting()
    for _ in range(2):
        gradient(network, problem)
    with pytest.warns(UserWarning, match="for the third time: the problem differs .*calls"):
        gradient(network, problem)
    gradient(network, problem)


@dataclass
class Counting(EqualWeights):
    calls: int = 0

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        loss: Tensor = super().outer_loss(outputs, batch)
        return loss


def test_two_uses_of_a_student_without_a_description_are_both_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their graphs are known by identity; those of another student make room."""
    as_functions(monkeypatch)
    network = student()
    hooked(network)
    problem = EqualWeights()
    rules = (torch.optim.SGD, torch.optim.Adam)
    for rule in rules:
        gradient(network, problem, rule)
    keys_before = {*graphs._CACHE}
    for rule in rules:
        assert_is_eager(gradient(network, problem, rule), network, problem, rule)
    assert {*graphs._CACHE} == keys_before
    assert len(keys_before) == 2
    other = student()
    hooked(other)
    with pytest.warns(UserWarning, match="graphs serve the same objects alone"):
        gradient(other, problem)
    assert len(graphs._CACHE) == 1


def hooked(network: Any) -> None:
    network.first.register_forward_hook(lambda module, inputs, outputs: 1.5 * outputs)


def shadowed(network: Any) -> None:
    network.forward = lambda x: 3 * Student.forward(network, x)


def untied(network: Any) -> None:
    network.parts[1] = copy.deepcopy(network.last)


def tied(network: Any) -> None:
    network.norm.bias = network.first.bias


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a flag": lambda network: network.norm.eval(),
    "all flags": lambda network: network.eval(),
    "a frozen part": lambda network: network.first.requires_grad_(requires_grad=False),
    "a hook": hooked,
    "a number": lambda network: setattr(network.norm, "eps", 0.5),
    "a number in a dataclass": lambda network: setattr(network.settings, "scale", 2.0),
    "a function": lambda network: setattr(network, "activation", torch.tanh),
    "a function's argument": lambda network: setattr(
        network, "activation", partial(F.gelu, approximate="none")
    ),
    "a lambda": lambda network: setattr(network, "activation", lambda x: x.sin()),
    "another lambda": lambda network: setattr(network, "activation", lambda x: x.cos()),
    "a tensor": lambda network: setattr(network, "power", torch.tensor(2.0, dtype=torch.float64)),
    "a method of its own": shadowed,
    "a part in the place of two": untied,
    "tied weights": tied,
    "a part more": lambda network: setattr(
        network, "last", nn.Sequential(network.last, nn.Linear(3, 3).double())
    ),
    "another part": lambda network: setattr(network, "norm", nn.LayerNorm(6).double()),
}


@pytest.mark.filterwarnings("ignore:recorded again")
def test_what_computes_something_else_is_never_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without Dynamo, whose guards would find many of these too."""
    as_functions(monkeypatch)
    monkeypatch.setattr(graphs, "MOST_CACHED", 100)
    gradient(student())
    for name, change in CHANGES.items():
        network = student()
        keys_before = {*graphs._CACHE}
        change(network)
        assert_is_eager(gradient(network), network)
        assert {*graphs._CACHE} - keys_before, name
    # One that is not changed is served by what was made for the first, not for a changed one.
    unchanged = student(1)
    keys_before = {*graphs._CACHE}
    assert_is_eager(gradient(unchanged), unchanged)
    assert {*graphs._CACHE} == keys_before


@pytest.mark.parametrize(
    "owner",
    [
        "method",
        pytest.param("class", marks=pytest.mark.long),
        pytest.param("module", marks=pytest.mark.long),
    ],
)
def test_what_a_class_and_its_module_hold_counts(
    owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = student()
    gradient_before = gradient(network)
    if owner == "class":
        monkeypatch.setattr(Student, "power", 2.0)
    elif owner == "module":
        monkeypatch.setitem(globals(), "SHIFT", torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64))
    else:
        monkeypatch.setattr(Student, "forward", lambda self, x: self.last(self.first(x).sin()))
    gradient_after = gradient(network)
    assert error({"h": gradient_after}, {"h": gradient_before}) > 1e-3
    assert_is_eager(gradient_after, network)


@pytest.mark.parametrize("compile", [False, True])
def test_what_a_file_holds_counts_for_tasks_too(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = student()
    tasks = [batch(number) for number in range(3)]
    stacked = tuple(torch.stack(part) for part in zip(*tasks, strict=True))
    for shift in (0.1, torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)):
        monkeypatch.setitem(globals(), "SHIFT", shift)
        options: dict[str, Any] = {
            "problem": EqualWeights(),
            "inner_optimizer": torch.optim.SGD(network.parameters(), lr=0.3),
            "wrt": "start",
        }
        found = metapl.hypergradient(
            None, network, outer=stacked, inner=stacked, tasks=True, compile=compile, **options
        )
        one_by_one = [
            metapl.hypergradient(None, network, outer=task, inner=task, **options).start
            for task in tasks
        ]
        for name, t in found.start.items():
            mean = torch.stack([start[name] for start in one_by_one]).mean(0)
            torch.testing.assert_close(t, mean, rtol=1e-9, atol=1e-12)


def test_another_class_problem_rule_and_type_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    as_functions(monkeypatch)
    gradient(student())
    changed = EqualWeights()
    gradient(student(), changed)
    assert len(graphs._CACHE) == 1
    # A graph was made of this problem before it is changed.
    changed.temperature = 3.0
    cases: list[tuple[Any, ...]] = [
        (student(kind=Other),),
        (student(), changed),
        (student(), EqualWeights()),
        (student(), None, partial(torch.optim.SGD, momentum=0.9)),
        (student(), None, partial(torch.optim.Adam, eps=1e-2)),
        (student(), None, sgd_in_groups),
        (student().eval(),),
    ]
    for arguments in cases:
        assert_is_eager(gradient(*arguments), *arguments)


def sgd_in_groups(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return SGD with a param group for each parameter."""
    return torch.optim.SGD([{"params": [p]} for p in params], lr=lr)


READ = student()


def penalty() -> Any:
    """Return the squared weights of a student that is read by its name."""
    return sum(p.square().sum() for p in READ.parameters())


class ReadsByName(EqualWeights):
    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(outputs, signal, batch, params) + 0.1 * penalty()


def test_a_loss_that_reads_the_student_by_a_global_name_is_of_that_student(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bare copy in its place would leave the weights of the start in the loss."""
    as_functions(monkeypatch)
    assert_is_eager(gradient(READ, ReadsByName()), READ, ReadsByName())

    def problem_with_penalty_on(network: nn.Module) -> Any:
        class ReadsByClosure(EqualWeights):
            def inner_loss(
                self, outputs: Tensor, signal: Any, batch: Any, params: Any = None
            ) -> Tensor:
                decay: Any = sum(p.square().sum() for p in network.parameters())
                return super().inner_loss(outputs, signal, batch, params) + 0.1 * decay

        return ReadsByClosure()

    for seed in (0, 1):
        network = student(seed)
        problem = problem_with_penalty_on(network)
        assert_is_eager(gradient(network, problem), network, problem)


def test_a_bare_copy_holds_nothing_and_shares_what_was_shared() -> None:
    network: Any = student()
    bare = BareCopier([network]).module(network)
    assert {t.device.type for t in (*bare.parameters(), *bare.buffers())} == {"meta"}
    assert bare.parts[0] is bare.parts[1] is bare.last
    assert bare.parts is not network.parts
    assert bare.settings == network.settings
    assert bare.settings is not network.settings
    assert [*bare.state_dict()] == [*network.state_dict()]
    network.settings.widths.append(9)
    assert bare.settings.widths == [6, 3]


UNLIKE: list[tuple[Any, Any]] = [
    (1, 1.0),
    (True, 1),
    (0.0, -0.0),
    ("1", 1),
    ([1], (1,)),
    ({"a": 1}, {"a": 2}),
    (torch.float32, torch.float64),
    (Settings(), Settings(widths=[1])),
    (F.relu, F.gelu),
    (lambda x: x, lambda x: 2 * x),
    (lambda x, by=1: by * x, lambda x, by=2: by * x),
]


@pytest.mark.parametrize("number", range(len(UNLIKE)))
def test_descriptions_tell_values_apart(number: int) -> None:
    a, b = UNLIKE[number]
    assert description_of(a) == description_of(copy.deepcopy(a))
    assert description_of(a) != description_of(b)


@pytest.mark.parametrize(
    "value", [torch.ones(2), nn.Linear(1, 1), object(), student, [torch.Generator()]]
)
def test_what_has_no_description_says_so(value: Any) -> None:
    def closure(x: Any) -> Any:
        return x + value

    with pytest.raises(Undescribed):
        description_of(closure)
    # A function without a closure has a description.
    if value is not student:
        with pytest.raises(Undescribed):
            description_of(value)


def test_parts_that_networks_share_are_told_from_parts_of_their_own() -> None:
    shared = nn.Linear(3, 3)
    other_layer = nn.Linear(3, 3)
    together = Describer([nn.Sequential(shared), nn.Sequential(shared)]).networks
    apart = Describer([nn.Sequential(shared), nn.Sequential(other_layer)]).networks
    assert together != apart


class WithNetwork(EqualWeights):
    """A problem that holds a frozen network, of which its inner loss is made."""

    def __init__(self, seed: int, kind: Any = nn.Tanh) -> None:
        torch.manual_seed(seed)
        self.frozen = nn.Sequential(nn.Linear(3, 3), kind(), nn.Linear(3, 1)).double()
        self.frozen.requires_grad_(requires_grad=False)

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        of_network = self.frozen(outputs).square().squeeze(1)
        return super().inner_loss(outputs, signal, batch, params) + signal.value * of_network


class WithPart(metapl.BilevelProblem):
    """A problem that holds a layer: the teacher's for its outer loss, the student's for the inner.

    Args:
        part: the layer.
        of_teacher: whose it is.
    """

    def __init__(self, part: nn.Module, *, of_teacher: bool) -> None:
        self.part = part
        self.of_teacher = of_teacher

    def signal(self, teacher: Any, batch: Any, *outputs: Any, **options: Any) -> metapl.Signal:
        return metapl.Signal(teacher(batch[0]).softmax(1)[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        if not self.of_teacher:
            losses = losses + self.part.weight.square().mean()
        return signal.value * losses

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        if self.of_teacher:
            outputs = self.part.weight.mean().exp() * outputs
        return nn.functional.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("of_teacher", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_part_of_a_network_that_a_problem_holds_compiles_once(
    of_teacher: bool, steps: int, traced: list[GraphModule]
) -> None:
    """With other networks it is the part of these, at its own values."""
    for seed in range(3):
        torch.manual_seed(seed)
        networks = [
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2)
        ]
        teacher, learner = networks
        problem = WithPart((teacher if of_teacher else learner)[0], of_teacher=of_teacher)
        labeled = torch.randn(6, 4).double(), torch.arange(6) % 3
        inner = metapl.Lookahead([labeled] * steps) if steps > 1 else labeled
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9)
        hypergradient = partial(
            metapl.hypergradient,
            teacher,
            learner,
            outer=labeled,
            inner=inner,
            problem=problem,
            inner_optimizer=optimizer,
        )
        compiled = hypergradient(compile=True)
        for name, g in hypergradient(mode="unrolled").grads.items():
            torch.testing.assert_close(compiled.grads[name], g, rtol=1e-9, atol=1e-13)
        if seed == 0:
            made = len(traced)
    assert made > 0
    assert len(traced) == made


class WithClosure(nn.Module):
    """A network whose forward is a closure over itself, a number and a frozen network."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)
        frozen = nn.Linear(4, 6).double().requires_grad_(requires_grad=False)
        self.run = lambda x: scale * self.last(frozen(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        run: Any = self.run
        return run(x)


def test_modules_that_a_problem_holds_compile_once_and_have_their_own_values(
    traced: list[GraphModule],
) -> None:
    problem = WithNetwork(0)
    first = gradient(student(), problem)
    compiled_before = len(traced)
    for seed in (0, 1, 2):
        network, problem = student(seed), WithNetwork(seed)
        assert_is_eager(gradient(network, problem), network, problem)
    with torch.no_grad():
        problem.frozen[0].weight *= 2
    after = gradient(network, problem)
    assert_is_eager(after, network, problem)
    assert error({"h": after}, {"h": first}) > 1e-3
    assert len(traced) == compiled_before
    relu = WithNetwork(0, nn.ReLU)
    assert_is_eager(gradient(student(), relu), student(), relu)
    assert len(traced) > compiled_before


def test_a_network_with_a_closure_compiles_once(traced: list[GraphModule]) -> None:
    gradient(student(kind=WithClosure, scale=0.5))
    compiled_before = len(traced)
    for seed in (1, 2):
        network = student(seed, kind=WithClosure, scale=0.5)
        assert_is_eager(gradient(network), network)
    assert len(traced) == compiled_before
    network = student(kind=WithClosure, scale=2.0)
    assert_is_eager(gradient(network), network)
    assert len(traced) > compiled_before


class WithTensor(EqualWeights):
    """A problem that holds a tensor, which has no description."""

    def __init__(self) -> None:
        self.weights = torch.ones(2)


def test_a_second_compiling_says_what_could_not_be_described(traced: list[GraphModule]) -> None:
    network = student()
    problem = WithTensor()
    compiled_of: list[int] = []
    for case in (problem, problem):
        gradient(network, problem=case)
        compiled_of.append(len(traced))
    assert compiled_of[0] == compiled_of[1], "the same objects again compile nothing"
    with pytest.warns(UserWarning, match=r"WithTensor or a network holds .* Tensor"):
        gradient(network, problem=WithTensor())
    assert len(traced) > compiled_of[1]


def test_a_second_compiling_says_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="metapl")
    for temperature in (2.0, 3.0):
        problem = EqualWeights()
        problem.temperature = temperature
        gradient(student(), problem)
    assert "recorded again, which takes seconds: the problem differs" in caplog.text
    assert "'temperature'" in caplog.text
