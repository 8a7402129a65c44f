"""What a captured function is captured anew for: all that it reads and that is no tensor."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from captures import without_inductor
from torch import Tensor, nn

from metapl.functional.capture import Captured
from metapl.functional.comparison import copy_with_strides, rows_repeated
from metapl.functional.kinds import Held
from metapl.problems.losses import log_of_shares

FACTOR = 2.0
FACTORS = {"of a dict": 3.0}


def helper() -> float:
    return FACTOR


def edited_helper() -> float:
    return 2 * FACTOR


@dataclass
class Options:
    factor: float = 5.0
    factors: list[float] = field(default_factory=lambda: [7.0])


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.75


class Term:
    def __init__(self, weight: float) -> None:
        self.weight = weight


class Scale(nn.Module):
    """Factors in all places from which a forward may read one."""

    of_class = 1.125

    def __init__(self) -> None:
        super().__init__()
        self.terms = [Term(0.5), Term(1.5)]
        self.slotted = Slotted()
        self.space = types.SimpleNamespace(factor=0.875)
        self.queue = deque([1.375])
        self.array = numpy.array([0.625])
        self.bytes = bytearray([2])
        self.factor = 1.5
        self.options = Options()
        self.by_name = {"deep": {"factor": 1.25}}
        self.weight = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        numbers = (
            self.factor
            * helper()
            * FACTORS["of a dict"]
            * self.options.factor
            * self.options.factors[0]
            * self.by_name["deep"]["factor"]
            * self.of_class
            * sum(term.weight for term in self.terms)
            * self.slotted.factor
            * self.space.factor
            * self.queue[0]
            * float(self.array[0])
            * self.bytes[0]
        )
        return x * numbers * self.weight


def change_attribute(scale: Scale) -> None:
    scale.factor = 2.5


def change_global(scale: Scale) -> None:
    globals()["FACTOR"] = 4.0


def change_entry_of_global(scale: Scale) -> None:
    FACTORS["of a dict"] = 6.0


def change_dataclass(scale: Scale) -> None:
    scale.options.factor = 10.0


def change_list(scale: Scale) -> None:
    scale.options.factors[0] = 14.0


def change_nested_dict(scale: Scale) -> None:
    scale.by_name["deep"]["factor"] = 2.5


def change_class(scale: Scale) -> None:
    type(scale).of_class = 2.25


def change_object_in_list(scale: Scale) -> None:
    scale.terms[0].weight = 4.0


def change_slot(scale: Scale) -> None:
    scale.slotted.factor = 3.5


def change_namespace(scale: Scale) -> None:
    scale.space.factor = 1.75


def change_deque(scale: Scale) -> None:
    scale.queue[0] = 2.75


def change_array(scale: Scale) -> None:
    scale.array[0] = 1.25


def change_bytes(scale: Scale) -> None:
    scale.bytes[0] = 3


def change_code(scale: Scale) -> None:
    helper.__code__ = edited_helper.__code__


def change_tensor(scale: Scale) -> None:
    scale.weight = torch.tensor(0.75)


def change_tensor_in_place(scale: Scale) -> None:
    scale.weight.fill_(0.75)


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    monkeypatch.setitem(FACTORS, "of a dict", 3.0)
    monkeypatch.setattr(Scale, "of_class", 1.125)
    monkeypatch.setattr(helper, "__code__", helper.__code__)


@pytest.mark.parametrize(
    "change",
    [
        change_attribute,
        change_global,
        change_entry_of_global,
        change_dataclass,
        change_list,
        change_nested_dict,
        change_class,
        change_object_in_list,
        change_slot,
        change_namespace,
        change_deque,
        change_array,
        change_bytes,
        change_code,
        change_tensor,
        change_tensor_in_place,
    ],
)
def test_what_a_module_reads_counts(
    change: Callable[[Scale], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = without_inductor(monkeypatch)
    scale = Scale()
    captured: Captured[Any] = Captured(lambda x: [scale(x)], torch.device("cpu"), [scale])
    x = torch.arange(3.0)
    for _ in range(2):
        torch.testing.assert_close(captured(x), [scale(x)])
    assert len(graphs) == 1
    change(scale)
    for _ in range(2):
        torch.testing.assert_close(captured(x), [scale(x)])
    # A tensor is an argument of the graph, which need not be made anew for its values.
    assert len(graphs) == (1 if change is change_tensor_in_place else 2)


def test_what_the_next_call_is_given_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = without_inductor(monkeypatch)

    def moved(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return {"sum": carry["sum"] + x, "same": carry["same"]}, x.sum()

    captured: Captured[Any] = Captured(moved, torch.device("cpu"), holds_first=True)
    # An expanded tensor, whose strides no later carry has.
    expected = {"sum": torch.zeros(()).expand(3, 2), "same": torch.ones(2)}
    carry = Held.of(expected)
    for number in range(4):
        x = torch.full((3, 2), float(number))
        carry, total = captured(carry, x)
        expected, expected_total = moved(expected, x)
        torch.testing.assert_close((carry.value, total), (expected, expected_total))
        torch.testing.assert_close(carry["same"], expected["same"])
    assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore:a step is recorded for the third time")
def test_an_object_in_the_place_of_another_is_looked_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    scale = Scale()
    captured: Captured[Any] = Captured(lambda x: [scale(x)], torch.device("cpu"), [scale])
    x = torch.arange(3.0)
    for options in (None, Options(1.5), Options(2.5)):
        if options is not None:
            scale.options = options
        torch.testing.assert_close(captured(x), [scale(x)])
        scale.options.factor = 3 * scale.options.factor
        torch.testing.assert_close(captured(x), [scale(x)])


def test_the_third_capture_names_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    scale = Scale()
    captured: Captured[Any] = Captured(lambda x: [scale(x)], torch.device("cpu"), [scale])
    x = torch.arange(3.0)
    captured(x)
    scale.factor = 2.5
    captured(x)
    scale.factor = 3.5
    with pytest.warns(UserWarning, match=r"factor was 2\.5 and is 3\.5"):
        captured(x)


def test_a_variable_around_a_function_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    without_inductor(monkeypatch)
    factor = 2.0

    def times(x: Tensor) -> Tensor:
        return factor * x

    captured: Captured[Any] = Captured(times, torch.device("cpu"), [times])
    assert float(captured(torch.ones(()))) == 2.0
    factor = 3.0
    assert float(captured(torch.ones(()))) == 3.0


def test_shares_of_classes_are_kept_from_no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is made while a step is captured has no value."""
    without_inductor(monkeypatch)
    shares = (0.25, 0.625, 0.125)
    cpu = torch.device("cpu")
    captured: Captured[Any] = Captured(lambda x: x + log_of_shares(shares, x.dtype, cpu), cpu)
    expected = torch.tensor(shares).log()
    torch.testing.assert_close(captured(torch.zeros(3)), expected)
    torch.testing.assert_close(log_of_shares(shares, torch.float32, cpu), expected)


class Lazy(nn.Module):
    """A module that makes a tensor in its first pass, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(len(x), dtype=x.dtype)
        return x + self.kept


def test_a_tensor_that_a_pass_keeps_has_a_value_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_inductor(monkeypatch)
    lazy = Lazy()
    captured: Captured[Any] = Captured(lazy.forward, torch.device("cpu"), [lazy])
    x = torch.ones(3)
    expected = torch.tensor([1.0, 2.0, 3.0])
    for _ in range(2):
        assert torch.equal(captured(x), expected)
        assert torch.equal(Lazy()(x), expected)
    assert torch.equal(lazy(x), expected)


@pytest.mark.parametrize(
    "t",
    [
        torch.arange(24.0).view(4, 6)[:, 1:4],
        torch.arange(24.0).view(4, 6).T[1:5:2],
        torch.arange(6.0).expand(4, 6)[:, ::2],
        torch.empty(0, 3),
        torch.tensor(2.0),
    ],
    ids=["columns", "rows of a transposed", "expanded", "empty", "a number"],
)
def test_a_copy_lies_in_memory_as_the_tensor_for_which_a_graph_was_made(t: Tensor) -> None:
    copy = copy_with_strides(t)
    assert copy.stride() == t.stride()
    assert torch.equal(copy, t)
    assert t.numel() == 0 or copy.data_ptr() != t.data_ptr()
    assert rows_repeated(t).stride() == t.stride()
