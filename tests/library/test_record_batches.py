"""Batches that are dataclasses.

Right as the tuple of the same tensors is, and no class is registered for it.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from problems_zoo import same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import metapl
from metapl import MetaplError
from metapl.execution.batch import (
    digest,
    leaves_of,
    length,
    map_tensors,
    micro_batches,
    plain,
    to_device,
)
from metapl.problems import Table


@dataclass
class Plain:
    x: Tensor
    y: Tensor
    numbers: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    x: Tensor
    y: Tensor
    numbers: Tensor
    name: str = "frozen"
    scale: float = 1.0
    missing: Tensor | None = None


@dataclass(slots=True)
class Labeled:
    y: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Nested:
    inputs: Any  # a dict, a tuple or a tokenizer's output
    labeled: Labeled
    names: list[str] = field(default_factory=list)

    @property
    def x(self) -> Tensor:
        return self.inputs["x"]

    @property
    def y(self) -> Tensor:
        return self.labeled.y

    @property
    def numbers(self) -> Tensor:
        return self.labeled.numbers


@dataclass
class Derived(Plain):
    """A subclass whose ``__post_init__`` changes what it is given.

    It keeps more than its fields.
    """

    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.doubled, self.x = 2 * self.x, 4 * self.x
        self.also_x = self.x / 4

    @cached_property
    def count(self) -> int:
        return len(self.y)


@dataclass
class OfArrays:
    x: Any
    y: Any
    numbers: Any


class Named(NamedTuple):
    x: Tensor
    y: Tensor
    numbers: Tensor


def derived(x: Tensor, y: Tensor, numbers: Tensor) -> Derived:
    batch = Derived(x / 2, y, numbers)
    assert batch.count == len(x)  # kept in the object
    return batch


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "plain": Plain,
    "frozen": lambda x, y, numbers: Frozen(x=x, y=y, numbers=numbers),
    "nested": lambda x, y, numbers: Nested({"x": x}, Labeled(y, numbers), ["a", "b"]),
    "nested, of a tokenizer": lambda x, y, numbers: Nested(UserDict(x=x), Labeled(y, numbers)),
    "derived": derived,
    "named": Named,
}


def read(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(batch, Derived):
        assert batch.count == len(batch.x) == len(batch.also_x)
        assert torch.equal(batch.doubled, 2 * batch.also_x)
        assert torch.equal(batch.doubled, batch.x / 2)
        return 2 * batch.also_x, batch.y, batch.numbers
    return batch if type(batch) in (tuple, list) else (batch.x, batch.y, batch.numbers)


class Weighed(metapl.BilevelProblem):
    """A weight from a table for each example of the inner batch."""

    def student_input(self, batch: Any) -> Any:
        return read(batch)[0]

    outer_input = student_input

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def signal(
        self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(read(batch)[2]).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, read(batch)[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, read(batch)[1])


def rows(seed: int, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=draw), torch.randperm(12, generator=draw)[:count]


def trainer(**options: Any) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    table = Table(torch.linspace(-1, 1, 12)).double()
    student = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return metapl.BilevelTrainer(table, student, problem=Weighed(), **options)


def weights(of: metapl.BilevelTrainer) -> list[Tensor]:
    assert of.teacher is not None
    return [p.detach() for module in (of.teacher, of.student) for p in module.parameters()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"accumulate": 4, "mode": "difference"}], ids=str
)
def test_steps_are_those_on_tuples(form: str, options: dict[str, Any]) -> None:
    """Bit for bit, with verification at the first one."""
    ends = []
    for make in (lambda *tensors: tensors, FORMS[form]):
        bilevel = trainer(**options)
        for step in range(3):
            bilevel.step(outer=make(*rows(2 * step)), inner=make(*rows(2 * step + 1)))
        ends.append(weights(bilevel))
    assert same(*ends)
    assert not torch.equal(ends[0][0], weights(trainer())[0])


@pytest.mark.parametrize("form", FORMS)
def test_look_aheads_know_another_batch(form: str) -> None:
    make = FORMS[form]
    bilevel = trainer()
    given: dict[str, Any] = {
        "outer": make(*rows(0)),
        "problem": Weighed(),
        "inner_optimizer": bilevel.inner_optimizer,
    }
    mode = metapl.feedback.Forward(keep_every=2)
    batches = [make(*rows(1 + k)) for k in range(5)]
    expected, found = (
        metapl.hypergradient(
            bilevel.teacher,
            bilevel.student,
            **given,
            mode=mode,
            inner=metapl.Lookahead(of, steps=5),
        )
        for of in (batches, lambda k: make(*rows(1 + k)))
    )
    assert same([*expected.grads.values()], [*found.grads.values()])
    calls = []

    def another(k: int) -> Any:
        calls.append(k)
        return make(*rows(1 + k + (10 if k == 2 and calls.count(2) > 1 else 0)))

    with pytest.raises(MetaplError, match="another batch for step 2 when it was called again"):
        metapl.hypergradient(
            bilevel.teacher,
            bilevel.student,
            **given,
            mode=mode,
            inner=metapl.Lookahead(another, steps=5),
        )


@pytest.mark.parametrize("form", FORMS)
def test_what_is_done_with_a_batch(form: str) -> None:
    """It goes to a device, is cut and known whole.

    It stays as it is, and PyTorch knows nothing of its class.
    """
    batch = FORMS[form](*rows(0))
    before = copy.deepcopy(batch)
    on_meta = to_device(batch, "meta")
    assert type(on_meta) is type(batch)
    assert {t.device.type for t in leaves_of(on_meta) if isinstance(t, Tensor)} == {"meta"}
    assert len(leaves_of(on_meta)) == len(leaves_of(plain(batch))) >= 3
    assert length(batch) == 8
    pieces = micro_batches(batch, 4, "outer")
    assert [type(piece) for piece in pieces] == [type(batch)] * 4
    for whole, parts in zip(read(batch), zip(*map(read, pieces), strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert digest(batch) == digest(before)
    assert digest(plain(batch)) != digest(plain(FORMS[form](*rows(1))))
    assert same([*read(batch)], [*read(before)])
    assert pytree.tree_leaves(Plain(*rows(0)))[0].__class__ is Plain
    with pytest.raises(
        MetaplError, match="the outer batch has 8 examples; expected a multiple of accumulate=3"
    ):
        micro_batches(batch, 3, "outer")


def test_what_is_no_tensor_stays_in_each_micro_batch() -> None:
    @dataclass
    class Mixed:
        x: Tensor
        count: Tensor  # one number
        name: str
        nothing: None
        of: type

    parts = micro_batches(Mixed(torch.arange(4), torch.tensor(4), "a", None, Tensor), 2, "outer")
    assert [(p.x.tolist(), int(p.count), p.name, p.nothing, p.of) for p in parts] == [
        ([0, 1], 4, "a", None, Tensor),
        ([2, 3], 4, "a", None, Tensor),
    ]
    with pytest.raises(MetaplError, match="tensors in an object of type SimpleNamespace"):
        micro_batches((torch.arange(4), SimpleNamespace(y=torch.arange(4))), 2, "outer")
    one = Plain(*rows(0))
    assert map_tensors(lambda t: t, one) is one  # nothing has changed


def test_a_digest_is_the_same_in_another_process() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_record_batches import FORMS, digest, rows\n"
        "print([int(digest(FORMS[form](*rows(0)))) for form in ('plain', 'frozen', 'nested', "
        "'derived')])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(
        [int(digest(FORMS[form](*rows(0)))) for form in ("plain", "frozen", "nested", "derived")]
    )


def test_a_batch_that_carries_a_gradient_is_refused_by_its_field() -> None:
    batch = Nested({"x": rows(0)[0].requires_grad_()}, Labeled(*rows(0)[1:]))
    with pytest.raises(MetaplError, match=r"outer\.inputs\['x'\] requires a gradient"):
        trainer().step(outer=batch, inner=Plain(*rows(1)))


def test_a_student_that_changes_its_input_is_seen() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(0.5))

    student = InPlace()
    bilevel = metapl.BilevelTrainer(Table(torch.zeros(12)).double(), student, problem=Weighed())
    inner = Plain(*rows(1))
    before = inner.x.clone()
    with pytest.raises(MetaplError, match="a batch is changed in place"):
        bilevel.step(outer=Plain(*rows(0)), inner=inner)
    assert torch.equal(inner.x, before)


@pytest.mark.parametrize("form", FORMS)
def test_fits_are_those_on_tuples(form: str) -> None:
    """Of lists of batches, and of one in memory; with validation, and a look ahead."""
    ends = []
    for make in (lambda *tensors: tensors, FORMS[form]):
        bilevel = trainer(lookahead=2, accumulate=2)
        outer, inner = ([make(*rows(10 * i + k)) for k in range(3)] for i in range(2))
        found = bilevel.fit(
            outer,
            inner,
            steps=4,
            metric="loss",
            validation=make(*rows(50)) if make is FORMS[form] else [make(*rows(50))],
        )
        ends.append([*weights(bilevel), torch.tensor(found.value)])
        ends[-1].append(bilevel.predict([make(*rows(51))]))
        ends[-1].append(torch.tensor(bilevel.evaluate([make(*rows(52))], metric="loss").value))
    assert found.metric == "loss"
    assert same(*ends)
    if form == "derived":  # rows of an object that __post_init__ has made
        return
    ends = []
    for make in (lambda *tensors: tensors, FORMS[form]):
        bilevel = trainer()
        bilevel.fit(make(*rows(0)), make(*rows(1)), steps=5, batch_size=3)
        ends.append(weights(bilevel))
    assert same(*ends)


def test_arrays_in_memory_become_tensors_of_the_weights() -> None:
    ends = []
    for kind in (OfArrays, Plain):
        bilevel = trainer()
        outer, inner = rows(0), rows(1)
        if kind is OfArrays:
            outer, inner = (
                [t.numpy().astype(np.float32 if t.is_floating_point() else np.int32) for t in of]
                for of in (outer, inner)
            )
        else:
            outer, inner = (
                [t.float().double() if t.is_floating_point() else t for t in of]
                for of in (outer, inner)
            )
        bilevel.fit(kind(*outer), kind(*inner), steps=3, batch_size=4)
        ends.append(weights(bilevel))
    assert same(*ends)
    with pytest.raises(MetaplError, match="examples in memory and batch_size=None"):
        trainer().fit(Plain(*rows(0)), Plain(*rows(1)), steps=3)


def test_a_network_that_takes_the_dataclass() -> None:
    """As its one argument, in all passes, those of a difference in another precision included."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, batch: Any) -> Tensor:
            return self.layer(batch.x)

    class Whole(Weighed):
        def student_input(self, batch: Any) -> Any:
            return batch

        outer_input = student_input

    torch.manual_seed(0)
    student = Reads()
    table = Table(torch.linspace(-1, 1, 12))
    given: dict[str, Any] = {
        "outer": Plain(*rows(0)),
        "inner": Frozen(**dict(zip(["x", "y", "numbers"], rows(1), strict=True))),
    }
    given = {
        name: map_tensors(lambda t: t.float() if t.is_floating_point() else t, batch)
        for name, batch in given.items()
    }
    inner = torch.optim.SGD(student.parameters(), lr=0.5)
    exact, differences, parts = (
        metapl.hypergradient(
            table,
            student,
            **given,
            problem=Whole(),
            mode=mode,
            inner_optimizer=inner,
            accumulate=parts,
        )
        for mode, parts in (("forward", 1), ("difference", 1), ("forward", 2))
    )
    (expected,) = exact.grads.values()
    assert expected.norm() > 1e-4
    for found, close in ((differences, 1e-2), (parts, 1e-4)):
        assert torch.dist(expected, next(iter(found.grads.values()))) < close * expected.norm()
