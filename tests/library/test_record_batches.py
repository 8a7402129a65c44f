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
    # A dict, a tuple or a tokenizer's output.
    inputs: Any
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
        self.doubled = 2 * self.x
        self.x = 4 * self.x
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


def tuple_of(x: Tensor, y: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, y, numbers


def derived(x: Tensor, y: Tensor, numbers: Tensor) -> Derived:
    batch = Derived(x / 2, y, numbers)
    # This keeps it in the object.
    assert batch.count == len(x)
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
    if type(batch) in (tuple, list):
        return batch
    return batch.x, batch.y, batch.numbers


class Weighed(metapl.BilevelProblem):
    """A weight from a table for each example of the inner batch."""

    def student_input(self, batch: Any) -> Any:
        x, _, _ = read(batch)
        return x

    outer_input = student_input

    def outer_batch(self, batch: Any) -> Any:
        return batch

    def signal(
        self, teacher: Any, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        _, _, numbers = read(batch)
        return metapl.Signal(teacher(numbers).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Any, batch: Any, params: Any = None) -> Tensor:
        _, labels, _ = read(batch)
        return signal.value * F.cross_entropy(outputs, labels, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        _, labels, _ = read(batch)
        return F.cross_entropy(outputs, labels)


def rows(seed: int, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (count,), generator=generator)
    numbers = torch.randperm(12, generator=generator)[:count]
    return x, labels, numbers


def trainer(**options: Any) -> metapl.BilevelTrainer:
    torch.manual_seed(0)
    table = Table(torch.linspace(-1, 1, 12)).double()
    student = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return metapl.BilevelTrainer(table, student, problem=Weighed(), **options)


def weights(bilevel: metapl.BilevelTrainer) -> list[Tensor]:
    assert bilevel.teacher is not None
    parameters = [*bilevel.teacher.parameters(), *bilevel.student.parameters()]
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 2}, {"accumulate": 4, "mode": "difference"}], ids=str
)
def test_steps_are_those_on_tuples(form: str, options: dict[str, Any]) -> None:
    """Bit for bit, with verification at the first one."""
    ends = []
    for make in (tuple_of, FORMS[form]):
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

    def hypergradient(batches: Any) -> metapl.Hypergradient:
        return metapl.hypergradient(
            bilevel.teacher,
            bilevel.student,
            outer=make(*rows(0)),
            inner=metapl.Lookahead(batches, steps=5),
            problem=Weighed(),
            inner_optimizer=bilevel.inner_optimizer,
            mode=metapl.feedback.Forward(keep_every=2),
        )

    in_list = hypergradient([make(*rows(1 + k)) for k in range(5)])
    by_function = hypergradient(lambda k: make(*rows(1 + k)))
    assert same([*in_list.grads.values()], [*by_function.grads.values()])
    calls = []

    def changing(k: int) -> Any:
        calls.append(k)
        is_second_call = k == 2 and calls.count(2) > 1
        return make(*rows(1 + k + (10 if is_second_call else 0)))

    with pytest.raises(MetaplError, match="for step 2 was another one when it was read again"):
        hypergradient(changing)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_done_with_a_batch(form: str) -> None:
    """It goes to a device, is cut and known whole.

    It stays as it is, and PyTorch knows nothing of its class.
    """
    batch = FORMS[form](*rows(0))
    batch_before = copy.deepcopy(batch)
    on_meta = to_device(batch, "meta")
    assert type(on_meta) is type(batch)
    assert {t.device.type for t in leaves_of(on_meta) if isinstance(t, Tensor)} == {"meta"}
    assert len(leaves_of(on_meta)) == len(leaves_of(plain(batch))) >= 3
    assert length(batch) == 8
    pieces = micro_batches(batch, 4, "outer")
    assert [type(piece) for piece in pieces] == [type(batch)] * 4
    pieces_of_tensors = zip(*map(read, pieces), strict=True)
    for t, pieces_of_t in zip(read(batch), pieces_of_tensors, strict=True):
        assert torch.equal(t, torch.cat(pieces_of_t))
    assert digest(batch) == digest(batch_before)
    assert digest(plain(batch)) != digest(plain(FORMS[form](*rows(1))))
    assert same([*read(batch)], [*read(batch_before)])
    assert pytree.tree_leaves(Plain(*rows(0)))[0].__class__ is Plain
    with pytest.raises(
        MetaplError, match="the outer batch has 8 examples; expected a multiple of accumulate=3"
    ):
        micro_batches(batch, 3, "outer")


def test_what_is_no_tensor_stays_in_each_micro_batch() -> None:
    @dataclass
    class Mixed:
        x: Tensor
        one_number: Tensor
        name: str
        nothing: None
        kind: type

    batch = Mixed(torch.arange(4), torch.tensor(4), "a", None, Tensor)
    first, second = micro_batches(batch, 2, "outer")
    assert first.x.tolist() == [0, 1]
    assert second.x.tolist() == [2, 3]
    for part in (first, second):
        assert (int(part.one_number), part.name, part.nothing, part.kind) == (4, "a", None, Tensor)
    with pytest.raises(MetaplError, match="batch is an object of type SimpleNamespace"):
        micro_batches((torch.arange(4), SimpleNamespace(y=torch.arange(4))), 2, "outer")
    unchanged = Plain(*rows(0))
    assert map_tensors(lambda t: t, unchanged) is unchanged


def test_a_digest_is_the_same_in_another_process() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_record_batches import FORMS, digest, rows\n"
        "print([int(digest(FORMS[form](*rows(0)))) for form in ('plain', 'frozen', 'nested', "
        "'derived')])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    forms = ("plain", "frozen", "nested", "derived")
    assert printed.strip() == str([int(digest(FORMS[form](*rows(0)))) for form in forms])


def test_a_batch_that_carries_a_gradient_is_refused_by_its_field() -> None:
    x, labels, numbers = rows(0)
    batch = Nested({"x": x.requires_grad_()}, Labeled(labels, numbers))
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
    x_before = inner.x.clone()
    with pytest.raises(MetaplError, match="a batch is changed in place"):
        bilevel.step(outer=Plain(*rows(0)), inner=inner)
    assert torch.equal(inner.x, x_before)


@pytest.mark.parametrize("form", FORMS)
def test_fits_are_those_on_tuples(form: str) -> None:
    """Of lists of batches, and of one in memory; with validation, and a look ahead."""
    ends = []
    for make in (tuple_of, FORMS[form]):
        bilevel = trainer(lookahead=2, accumulate=2)
        outer = [make(*rows(k)) for k in range(3)]
        inner = [make(*rows(10 + k)) for k in range(3)]
        validation = make(*rows(50))
        if make is tuple_of:
            validation = [validation]
        result = bilevel.fit(outer, inner, steps=4, metric="loss", validation=validation)
        assert result.metric == "loss"
        predictions = bilevel.predict([make(*rows(51))])
        loss = bilevel.evaluate([make(*rows(52))], metric="loss").value
        ends.append(
            [*weights(bilevel), torch.tensor(result.value), predictions, torch.tensor(loss)]
        )
    assert same(*ends)
    if form == "derived":
        # Rows of an object that __post_init__ has made are other ones.
        return
    ends = []
    for make in (tuple_of, FORMS[form]):
        bilevel = trainer()
        bilevel.fit(make(*rows(0)), make(*rows(1)), steps=5, batch_size=3)
        ends.append(weights(bilevel))
    assert same(*ends)


def test_arrays_in_memory_become_tensors_of_the_weights() -> None:
    def as_array(t: Tensor) -> Any:
        return t.numpy().astype(np.float32 if t.is_floating_point() else np.int32)

    def as_rounded(t: Tensor) -> Tensor:
        return t.float().double() if t.is_floating_point() else t

    of_arrays = trainer()
    of_arrays.fit(
        OfArrays(*map(as_array, rows(0))), OfArrays(*map(as_array, rows(1))), steps=3, batch_size=4
    )
    of_tensors = trainer()
    of_tensors.fit(
        Plain(*map(as_rounded, rows(0))), Plain(*map(as_rounded, rows(1))), steps=3, batch_size=4
    )
    assert same(weights(of_arrays), weights(of_tensors))
    with pytest.raises(MetaplError, match="was given with batch_size=None"):
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

    def in_float(batch: Any) -> Any:
        return map_tensors(lambda t: t.float() if t.is_floating_point() else t, batch)

    torch.manual_seed(0)
    student = Reads()
    table = Table(torch.linspace(-1, 1, 12))
    x, labels, numbers = rows(1)

    def gradient(mode: str, accumulate: int = 1) -> Tensor:
        result = metapl.hypergradient(
            table,
            student,
            outer=in_float(Plain(*rows(0))),
            inner=in_float(Frozen(x=x, y=labels, numbers=numbers)),
            problem=Whole(),
            mode=mode,
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.5),
            accumulate=accumulate,
        )
        (of_table,) = result.grads.values()
        return of_table

    exact = gradient("forward")
    assert exact.norm() > 1e-4
    assert torch.dist(exact, gradient("difference")) < 1e-2 * exact.norm()
    assert torch.dist(exact, gradient("forward", accumulate=2)) < 1e-4 * exact.norm()
