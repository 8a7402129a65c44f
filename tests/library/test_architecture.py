"""A compiled training is known again by what was compiled.

It serves what is equal, and nothing that computes else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from reference import error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import metapl
from metapl import Lookahead
from metapl.functional import compiled, graphs
from metapl.functional.architecture import (
    Undescribed,
    bare_copies,
    description_of,
    description_of_networks,
)
from metapl.problems import EqualWeights


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Dynamo, without Inductor, and with graphs of the test alone."""
    monkeypatch.setattr(graphs, "_CACHE", {})
    monkeypatch.setattr(compiled, "backend_of", lambda device: {"backend": "aot_eager"})


@dataclass
class Settings:
    scale: float = 0.5
    widths: list[int] = field(default_factory=lambda: [6, 3])


SHIFT = 0.1


class Student(nn.Module):
    """A part under two names, an activation, a setting in a dataclass, and what the class and its module hold."""

    power = 1.0

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.settings, self.activation = Settings(scale), partial(F.gelu, approximate="tanh")
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
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
    made: nn.Module = kind(**options).double()
    return made


def gradient(
    network: nn.Module, problem: Any = None, rule: Any = torch.optim.SGD, compile: bool = True
) -> Tensor:
    """The weights' scores in each step, as one tensor."""
    optimizer = rule(network.parameters(), lr=0.3)
    found = metapl.hypergradient(
        None,
        network,
        outer=batch(-1),
        inner=Lookahead(batch, steps=2),
        problem=problem or EqualWeights(),
        inner_optimizer=optimizer,
        wrt="start",
        compile=compile,
    )
    return torch.cat([*map(torch.flatten, (*found.feedback, *found.start.values()))])


def refuse_other(found: Tensor, network: nn.Module, *given: Any) -> None:
    """Compare with double backward."""
    expected = gradient(network, *given, compile=False)
    assert error({"h": found}, {"h": expected}) < 1e-9


def graphs_compiled() -> int:
    """Return how many graphs Dynamo has made in this process."""
    count: int = counters["stats"]["unique_graphs"]
    return count


SAME: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda first: first,
    "a copy": copy.deepcopy,
    "another one": lambda first: student(1),
}


def test_another_student_of_the_architecture_compiles_nothing() -> None:
    first = student()
    gradient(first)
    before = graphs_compiled()
    for make in SAME.values():
        network = make(first)
        weights = {name: t.clone() for name, t in network.state_dict().items()}
        refuse_other(gradient(network), network)
        assert error(weights, network.state_dict()) == 0
    assert graphs_compiled() == before
    assert len(graphs._CACHE) == 1


def hooked(network: Any) -> None:
    network.first.register_forward_hook(lambda module, given, outputs: 1.5 * outputs)


def shadowed(network: Any) -> None:
    network.forward = lambda x: 3 * Student.forward(network, x)


def untied(network: Any) -> None:
    network.parts[1] = copy.deepcopy(network.last)


def tied(network: Any) -> None:
    network.norm.bias = network.first.bias


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a flag": lambda network: network.norm.eval(),
    "all flags": lambda network: network.eval(),
    "a frozen part": lambda network: network.first.requires_grad_(False),
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


def test_what_computes_something_else_is_never_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without Dynamo, whose guards would find many of these too."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(graphs, "MOST_CACHED", 100)
    gradient(student())
    for what, change in CHANGES.items():
        network, known = student(), {*graphs._CACHE}
        change(network)
        refuse_other(gradient(network), network)
        assert {*graphs._CACHE} - known, what
    again = student(1)
    known = {*graphs._CACHE}
    refuse_other(gradient(again), again)  # not by what was made for a changed one
    assert {*graphs._CACHE} == known


@pytest.mark.parametrize(
    "where",
    [
        "method",
        pytest.param("class", marks=pytest.mark.long),
        pytest.param("module", marks=pytest.mark.long),
    ],
)
def test_what_a_class_and_its_module_hold_counts(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = student()
    before = gradient(network)
    if where == "class":
        monkeypatch.setattr(Student, "power", 2.0)
    elif where == "module":
        monkeypatch.setitem(globals(), "SHIFT", torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64))
    else:
        monkeypatch.setattr(Student, "forward", lambda self, x: self.last(self.first(x).sin()))
    found = gradient(network)
    assert error({"h": found}, {"h": before}) > 1e-3
    refuse_other(found, network)


def test_another_class_problem_rule_and_type_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    gradient(student())
    changed = EqualWeights()
    gradient(student(), changed)
    assert len(graphs._CACHE) == 1
    changed.temperature = 3.0  # a problem that a graph was made of, changed afterwards
    cases: list[tuple[Any, ...]] = [
        (student(kind=Other),),
        (student(), changed),
        (student(), EqualWeights()),
        (student(), None, partial(torch.optim.SGD, momentum=0.9)),
        (student(), None, partial(torch.optim.Adam, eps=1e-2)),
        (
            student(),
            None,
            lambda p, **given: torch.optim.SGD([{"params": [q]} for q in p], **given),
        ),
        (student().train(False),),
    ]
    for case in cases:
        refuse_other(gradient(*case), *case)


READ = student()


def penalty() -> Any:
    return sum(p.square().sum() for p in READ.parameters())


class ReadsByName(EqualWeights):
    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return super().inner_loss(outputs, signal, batch, params) + 0.1 * penalty()


def test_a_loss_that_reads_the_student_by_a_global_name_is_of_that_student(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bare copy in its place would leave the weights of the start in the loss."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    refuse_other(gradient(READ, ReadsByName()), READ, ReadsByName())

    def enclosing(held: nn.Module) -> Any:
        class ReadsByClosure(EqualWeights):
            def inner_loss(
                self, outputs: Tensor, signal: Any, batch: Any, params: Any = None
            ) -> Tensor:
                decay: Any = sum(p.square().sum() for p in held.parameters())
                return super().inner_loss(outputs, signal, batch, params) + 0.1 * decay

        return ReadsByClosure()

    for seed in (0, 1):
        network = student(seed)
        problem = enclosing(network)
        refuse_other(gradient(network, problem), network, problem)


def test_a_bare_copy_holds_nothing_and_shares_what_was_shared() -> None:
    network: Any = student()
    (bare,) = bare_copies([network])
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
    closure = (lambda held: lambda x: x + held)(value)
    with pytest.raises(Undescribed):
        description_of(closure)
    if value is not student:  # a function without a closure has one
        with pytest.raises(Undescribed):
            description_of(value)


def test_parts_that_networks_share_are_told_from_parts_of_their_own() -> None:
    shared, own = nn.Linear(3, 3), nn.Linear(3, 3)
    together = description_of_networks([nn.Sequential(shared), nn.Sequential(shared)])
    apart = description_of_networks([nn.Sequential(shared), nn.Sequential(own)])
    assert together != apart
