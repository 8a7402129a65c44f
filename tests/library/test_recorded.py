"""Functions of tensors that are recorded as one graph, with the gradients that they take inside."""

from __future__ import annotations

import argparse
import array
import contextlib
import importlib
import itertools
import os
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import settings_of_a_user as settings
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as torch_modules
from torch.utils.checkpoint import checkpoint

import metapl
from metapl.execution.compare import TRIES
from metapl.functional import attributes, recorded

Params = dict[str, Tensor]


def mlp(*widths: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2]).double()


def weights_of(network: nn.Module) -> Params:
    return {name: p.detach() for name, p in network.named_parameters()}


def leaves(params: Params) -> Params:
    return {name: t.detach().requires_grad_() for name, t in params.items()}


def gradient_penalty(network: nn.Module) -> Callable[..., Any]:
    """Return WGAN's penalty and its gradient in the weights, by two calls of autograd."""

    def penalty(params: Params, x: Tensor) -> tuple[Tensor, Params]:
        params, x = leaves(params), x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(
            functional_call(network, params, (x,)).sum(), x, create_graph=True
        )
        loss = (slope.norm(dim=1) - 1).square().mean()
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        return loss, dict(zip(params, grads, strict=True))

    return penalty


def maml(network: nn.Module) -> Callable[..., Any]:
    """Return the loss after two steps of descent on a task, and its gradient in the start."""

    def loss_after(params: Params, x: Tensor, y: Tensor, rate: Tensor) -> tuple[Tensor, Params]:
        start = leaves(params)
        now = start
        for _ in range(2):
            loss = F.mse_loss(functional_call(network, now, (x,)), y)
            grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
            now = {name: t - rate * g for (name, t), g in zip(now.items(), grads, strict=True)}
        loss = F.mse_loss(functional_call(network, now, (x,)), y)
        grads = torch.autograd.grad(loss, list(start.values()))
        return loss, dict(zip(start, grads, strict=True))

    return loss_after


class ForceField(nn.Module):
    """A network whose outputs are minus the gradient of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = mlp(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -slope


class Checkpointed(nn.Module):
    """A network that runs its body once more in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(4, 8, 8), mlp(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.body, x, use_reentrant=False)
        out: Tensor = self.head(hidden)
        return out


class OldTanh(torch.autograd.Function):
    """A function as it was written before ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        slope: Tensor = g * (1 - y * y)
        return slope


class Old(nn.Module):
    """A network with a custom function, and a hook on its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(4, 8), mlp(8, 1)
        self.body.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = OldTanh.apply(self.body(x))
        out: Tensor = self.head(hidden)
        return out


def slopes(network: nn.Module) -> Callable[..., Any]:
    """Return a loss and its gradient in the weights."""

    def step(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
        params = leaves(params)
        loss = F.mse_loss(functional_call(network, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        return loss, dict(zip(params, grads, strict=True))

    return step


class Stepping(nn.Module):
    """A loss and its gradient, taken while the module holds the weights that it is called at."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss = F.mse_loss(self.network(x), y)
        return loss, list(torch.autograd.grad(loss, list(self.network.parameters())))


def slopes_inside(network: nn.Module) -> Callable[..., Any]:
    """Return what :func:`slopes` does, with the backward pass inside of the call."""
    stepping = Stepping(network)

    def step(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Params]:
        held = {f"network.{name}": t for name, t in leaves(params).items()}
        loss, grads = functional_call(stepping, held, (x, y))
        return loss, dict(zip(params, grads, strict=True))

    return step


def equal(one: Any, two: Any) -> bool:
    """Return whether a loss and gradients are those of another, bit for bit."""
    loss, grads = one
    other, others = two
    same = [torch.equal(g, others[name].detach()) for name, g in grads.items()]
    return torch.equal(loss, other.detach()) and all(same)


def moved(params: Params) -> Params:
    """Return other weights than those that a network has."""
    draws = torch.Generator().manual_seed(3)
    return {
        name: t + torch.randn(t.shape, generator=draws, dtype=t.dtype) / 10
        for name, t in params.items()
    }


x3, x4 = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
y3 = torch.randn(6, 3, dtype=torch.float64)
CASES: dict[str, Any] = {
    "gradient penalty": lambda: (gradient_penalty(net := mlp(4, 8, 1)), net, (x4,)),
    "maml": lambda: (maml(net := mlp(4, 8, 3)), net, (x4, y3, torch.tensor(0.3).double())),
    "force field": lambda: (slopes(net := ForceField()), net, (x3, y3)),
    "checkpoint": lambda: (slopes_inside(net := Checkpointed()), net, (x4, y3)),
    "an old function and a hook": lambda: (gradient_penalty(net := Old()), net, (x4,)),
    "dropout": lambda: (slopes(net := mlp(4, 8, 3, dropout=0.5)), net, (x4, y3)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_recording_has_the_bits_of_the_function(name: str) -> None:
    function, network, batch = CASES[name]()
    step = recorded(function)
    params = weights_of(network)
    step(params, *batch)
    # Other weights and another batch than those of the call that recorded.
    params = moved(params)
    batch = [t + 0.1 for t in batch]
    torch.manual_seed(5)
    expected = function(params, *batch)
    end = torch.get_rng_state()
    torch.manual_seed(5)
    found = step(params, *batch)
    assert equal(found, expected)
    assert torch.equal(torch.get_rng_state(), end)
    assert step.recordings == 1


def test_the_first_call_draws_once() -> None:
    function, network, batch = CASES["dropout"]()
    torch.manual_seed(5)
    expected = function(weights_of(network), *batch)
    end = torch.get_rng_state()
    torch.manual_seed(5)
    assert equal(recorded(function)(weights_of(network), *batch), expected)
    assert torch.equal(torch.get_rng_state(), end)


def test_another_kind_of_call_records_anew_and_the_third_says_why() -> None:
    network = mlp(4, 8, 3)
    step = recorded(slopes(network))
    params = weights_of(network)
    step(params, x4, y3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(params, x4[:5], y3[:5])
        step(params, x4, y3)
    with pytest.warns(
        UserWarning, match=r"third time: what was a tensor \(6, 4\).* is a tensor \(3, 4\)"
    ):
        step(params, x4[:3], y3[:3])
    assert step.recordings == 3
    network.eval()
    step(params, x4, y3)
    assert step.recordings == 4


def test_a_number_that_a_module_holds_records_anew() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.factor = mlp(4, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.factor * self.net(x)
            return out

    network = Scaled()
    function = slopes(network)
    step = recorded(function)
    params = weights_of(network)
    step(params, x4, y3)
    network.factor = 2.0
    assert equal(step(params, x4, y3), function(params, x4, y3))
    assert step.recordings == 2


class Shared:
    """What functions read by its name."""

    factor = 1.0
    factors: ClassVar = [1.0]

    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return Shared.factor * x


class Scale:
    """An object whose method reads what it holds."""

    shared: ClassVar = [1.0]

    def __init__(self) -> None:
        self.inner = SimpleNamespace(factor=1.0)

    def scaled(self, x: Tensor) -> Tensor:
        return self.inner.factor * x


LISTED = SimpleNamespace(factors=[1.0], by_name={"factor": 1.0})
ARRAY = array.array("d", [1.0])
SIGNED = SimpleNamespace(zero=0.0)
PARTS = [[1.0, 2.0], [3.0]]


def decorated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function as a decorator of an installed package makes one."""
    return torch.func.vmap(function)


ARGUMENTS = argparse.Namespace(factor=1.0)
OBJECTS = [Scale()]
NESTED = {"inner": {"part": SimpleNamespace(factor=1.0)}}


def set_all(value: float) -> None:
    Shared.factor = Shared.factors[0] = value
    LISTED.factors[0] = LISTED.by_name["factor"] = ARRAY[0] = value
    ARGUMENTS.factor = OBJECTS[0].inner.factor = OBJECTS[0].shared[0] = value
    NESTED["inner"]["part"].factor = value
    settings.factor = settings.part.factor = settings.Numbers.factor = value


READERS: dict[str, Callable[[Tensor], Any]] = {
    "of a class": lambda x: Shared.factor * x,
    "of a list in a class": lambda x: Shared.factors[0] * x,
    "of a function of a class": lambda x: Shared.scaled(x),
    "of an array": lambda x: ARRAY[0] * x,
    "of a function behind another": decorated(lambda x: Shared.factor * x),
    "of a list in an object": lambda x: LISTED.factors[0] * x,
    "of a dict in an object": lambda x: LISTED.by_name["factor"] * x,
    "of an object in dicts": lambda x: NESTED["inner"]["part"].factor * x,
    "of parsed arguments": lambda x: ARGUMENTS.factor * x,
    "of an object in a list": lambda x: OBJECTS[0].inner.factor * x,
    "of a method of an object": lambda x: OBJECTS[0].scaled(x),
    "of a list in an object's class": lambda x: OBJECTS[0].shared[0] * x,
    "of a default": lambda x, by=OBJECTS: by[0].inner.factor * x,
    "of a file": lambda x: settings.factor * x,
    "of an object of a file": lambda x: settings.part.factor * x,
    "of a class of a file": lambda x: settings.Numbers.factor * x,
    "of a function of a file": lambda x: settings.scaled(x),
}


@pytest.mark.parametrize("name", READERS)
def test_a_number_that_is_read_by_name_records_anew(name: str) -> None:
    function = READERS[name]
    step = recorded(function)
    x = torch.ones(2)
    try:
        for value in (1.0, 3.0):
            set_all(value)
            assert torch.equal(step(x), value * x)
        assert torch.equal(step(x), 3.0 * x)
        assert step.recordings == 2
    finally:
        set_all(1.0)


ACTIVATION: Callable[[Tensor], Tensor] = torch.tanh


def test_an_operation_of_torch_that_is_read_by_name_records_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = recorded(lambda x: ACTIVATION(x))
    for activation in (torch.tanh, F.gelu):
        monkeypatch.setitem(globals(), "ACTIVATION", activation)
        assert torch.equal(step(x4), activation(x4))
    assert step.recordings == 2


def test_entries_that_move_between_lists_record_anew() -> None:
    def function(x: Tensor) -> Tensor:
        return x * len(PARTS[0])

    step = recorded(function)
    x = torch.ones(2)
    assert torch.equal(step(x), 2 * x)
    PARTS[1].insert(0, PARTS[0].pop())
    assert torch.equal(step(x), x)
    PARTS[0].append(PARTS[1].pop(0))


def test_a_negative_zero_is_another_number() -> None:
    step = recorded(lambda x: 1 / (x * SIGNED.zero))
    by_argument = recorded(lambda x, zero: 1 / (x * zero))
    x = torch.ones(1)
    for zero in (0.0, -0.0):
        SIGNED.zero = zero
        expected = 1 / (x * zero)
        assert step(x) == by_argument(x, zero) == expected
    SIGNED.zero = 0.0


HOOKED: dict[str, Callable[[nn.Module], Any]] = {
    "a hook in the place of another": lambda m: m.register_forward_hook(lambda m, i, o: 3 * o),
    "a hook before": lambda m: m.register_forward_pre_hook(lambda m, i: (3 * i[0],)),
    "a hook on all modules": lambda m: torch_modules.register_module_forward_hook(
        lambda part, i, o: 3 * o if part is m else o
    ),
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_that_is_replaced_records_anew(name: str) -> None:
    network = nn.Linear(3, 3)
    params = weights_of(network)
    x = torch.ones(2, 3)

    def function(params: Params, x: Tensor) -> Any:
        return functional_call(network, params, (x,))

    # By chance a later hook has the address of an earlier one.
    for _ in range(3):
        step = recorded(function)
        hook = network.register_forward_hook(lambda m, i, o: 2 * o)
        step(params, x)
        hook.remove()
        del hook
        hook = HOOKED[name](network)
        torch.testing.assert_close(step(params, x), function(params, x))
        assert step.recordings == 2
        hook.remove()


def test_a_number_that_a_hook_reads_records_anew() -> None:
    network = nn.Linear(3, 3)
    params = weights_of(network)
    x = torch.ones(2, 3)
    network.register_forward_hook(lambda m, i, o: LISTED.factors[0] * o)

    def function(params: Params, x: Tensor) -> Any:
        return functional_call(network, params, (x,))

    step = recorded(function)
    for value in (1.0, 5.0):
        LISTED.factors[0] = value
        torch.testing.assert_close(step(params, x), function(params, x))
    LISTED.factors[0] = 1.0


class Dropping:
    def __init__(self) -> None:
        self.network = nn.Dropout(0.5)

    def loss(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.network(x)
        return dropped


DROPPING = Dropping()
HOLDERS: dict[str, tuple[Callable[[Tensor], Tensor], Dropping]] = {
    "a method's object": ((dropping := Dropping()).loss, dropping),
    "an object by its name": (lambda x: DROPPING.loss(x), DROPPING),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_modes_of_networks_that_objects_hold_record_anew(name: str) -> None:
    function, holder = HOLDERS[name]
    step = recorded(function)
    x = torch.ones(64)
    assert (step(x) == 0).any()
    holder.network.eval()
    assert torch.equal(step(x), x)
    assert step.recordings == 2


def test_numbers_among_the_arguments_are_constants_of_a_recording() -> None:
    def power(x: Tensor, exponent: int) -> Tensor:
        return x**exponent

    step = recorded(power)
    assert torch.equal(step(x4, 2), x4**2)
    assert torch.equal(step(x4, 3), x4**3)
    assert step.recordings == 2


def test_numbers_that_are_equal_and_of_other_types_are_told_apart() -> None:
    step = recorded(lambda x, factor: x * factor)
    whole_numbers = torch.arange(3)
    assert step(whole_numbers, 2).dtype == torch.int64
    assert step(whole_numbers, 2.0).dtype == torch.float32
    assert step(whole_numbers, 2).dtype == torch.int64
    assert step.recordings == 2


def by_shared(x: Tensor) -> Tensor:
    return Shared.factor * x


@pytest.mark.filterwarnings("ignore:.*recorded for the third time")
def test_an_object_among_the_arguments_records_anew_for_what_is_read_of_it() -> None:
    step = recorded(lambda x, scaled: scaled(x))
    x = torch.ones(64)
    scale, dropout = Scale(), nn.Sequential(nn.Dropout(0.5))
    assert torch.equal(step(x, by_shared), x)
    assert torch.equal(step(x, scale.scaled), x)
    assert (step(x, dropout) == 0).any()
    try:
        Shared.factor = scale.inner.factor = 3.0
        assert torch.equal(step(x, by_shared), 3 * x)
        assert torch.equal(step(x, scale.scaled), 3 * x)
    finally:
        Shared.factor = 1.0
    dropout.eval()
    assert torch.equal(step(x, dropout), x)
    dropout[0] = nn.Tanh()
    assert torch.equal(step(x, dropout), x.tanh())


def test_a_gradient_that_an_argument_holds_is_refused() -> None:
    def left(p: Tensor) -> Tensor:
        (2 * p).sum().backward()
        return p.detach() * 1

    def read(p: Tensor) -> Tensor:
        return p if p.grad is None else p - p.grad

    p = torch.ones(3, requires_grad=True)
    with pytest.raises(metapl.MetaplError, match=r"writes to its argument\[0\] in place"):
        recorded(left)(p)
    assert p.grad is None
    p.grad = torch.ones(3)
    with pytest.raises(metapl.MetaplError, match="returns tensors .* apart by itself"):
        recorded(read)(p)


def test_an_optimizer_and_a_schedule_that_a_function_reads_record_anew() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    by_group = recorded(lambda x: x * optimizer.param_groups[0]["lr"])
    by_schedule = recorded(lambda x: x * schedule.get_last_lr()[0])
    x = torch.ones(2)
    for rate in (1.0, 0.5):
        assert torch.equal(by_group(x), rate * x)
        assert torch.equal(by_schedule(x), rate * x)
        optimizer.step()
        schedule.step()


def test_another_name_with_the_same_value_records_anew() -> None:
    switches = {"relu": True}
    step = recorded(lambda x: x.relu() if "relu" in switches else x.tanh())
    x = torch.ones(2)
    assert torch.equal(step(x), x)
    switches["tanh"] = switches.pop("relu")
    assert torch.equal(step(x), x.tanh())


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.mask is None else 2 * x


class Hidden:
    """An object without a dict, with a name of its own class."""

    __slots__ = ("__factor",)

    def __init__(self) -> None:
        self.set(1.0)

    def set(self, factor: float) -> None:
        self.__factor = factor

    def scaled(self, x: Tensor) -> Tensor:
        return self.__factor * x


def test_a_slot_with_a_name_of_its_class_records_anew() -> None:
    hidden = Hidden()
    step = recorded(hidden.scaled)
    for factor in (1.0, 3.0):
        hidden.set(factor)
        assert torch.equal(step(torch.ones(2)), torch.full((2,), factor))


@pytest.mark.parametrize("line", ["from .config import FACTOR", "from profile import FACTOR"])
def test_an_import_inside_of_a_function_records_anew(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is relative, and one of a file that is named as a module of Python."""
    package = tmp_path / "package_of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "reader.py").write_text(f"def scaled(x):\n    {line}\n    return x * FACTOR\n")
    for file in (package / "config.py", tmp_path / "profile.py"):
        file.write_text("FACTOR = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("profile", package.name, f"{package.name}.config", f"{package.name}.reader"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    step = recorded(importlib.import_module(f"{package.name}.reader").scaled)
    x = torch.ones(2)
    assert torch.equal(step(x), x)
    name = "profile" if "profile" in line else f"{package.name}.config"
    sys.modules[name].FACTOR = 3.0  # type: ignore[attr-defined]
    assert torch.equal(step(x), 3 * x)
    for name in ("profile", package.name, f"{package.name}.config", f"{package.name}.reader"):
        sys.modules.pop(name, None)


def test_a_module_among_the_arguments_that_is_frozen_records_anew() -> None:
    def count(network: nn.Module, params: Params, x: Tensor) -> Tensor:
        return x * sum(p.requires_grad for p in network.parameters())

    network = nn.Linear(3, 3)
    params = weights_of(network)
    step = recorded(count)
    assert torch.equal(step(network, params, x4), 2 * x4)
    network.bias.requires_grad_(requires_grad=False)
    assert torch.equal(step(network, params, x4), x4)


def test_a_long_list_is_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length is another number each time that it is asked, and is none that has changed."""
    factors = [2.0] * 300
    step = recorded(lambda x: x * factors[-1])
    x = torch.ones(2)
    step(x)
    monkeypatch.setattr(attributes.Attributes, "read_again", None)
    assert torch.equal(step(x), 2 * x)


def test_a_buffer_that_is_made_later_records_anew() -> None:
    network = Masked()
    step = recorded(lambda x: network(x))
    x = torch.ones(2)
    assert torch.equal(step(x), x)
    network.mask = torch.ones(2)
    assert torch.equal(step(x), 2 * x)


def test_an_argument_that_becomes_a_tensor_is_said_the_third_time() -> None:
    step = recorded(lambda x, y: x if y is None else x * y)
    x = torch.ones(2)
    step(x, None)
    step(torch.ones(3), None)
    with pytest.warns(UserWarning, match="third time"):
        assert torch.equal(step(x, 2 * x), 2 * x)


def test_one_tensor_at_two_places_is_one_tensor() -> None:
    def slope(a: Tensor, b: Tensor) -> Tensor:
        return torch.autograd.grad((a * b).sum(), a)[0]

    step = recorded(slope)
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    assert step(a, a) == slope(a, a) == 6
    assert step(a, b) == slope(a, b) == 5
    assert step(b, b) == 10
    assert step.recordings == 2


def test_a_parameter_among_the_arguments_is_one_in_the_function() -> None:
    def function(weights: list[Tensor]) -> Tensor:
        return torch.stack([2 * t if isinstance(t, nn.Parameter) else t for t in weights])

    weights = [torch.ones(2), nn.Parameter(torch.ones(2))]
    step = recorded(function)
    assert torch.equal(step(weights), function(weights))
    assert torch.equal(step(weights[::-1]), function(weights[::-1]))


def test_an_argument_that_may_change_in_place_is_refused() -> None:
    step = recorded(lambda x, factors: x * float(factors[0]))
    with pytest.raises(metapl.MetaplError, match="ndarray, .*; expected tensors, and other"):
        step(x4, numpy.array([2.0]))


class Counted:
    """A function that keeps a number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def falling_back(x: Tensor) -> Tensor:
    """Scale large numbers, and take any error of that for small ones."""
    scale = 1.0
    with contextlib.suppress(Exception):
        if x.abs().max() > 10.0:
            scale = 0.1
    return scale * x


weight = nn.Linear(4, 3).double()
DRAWS = numpy.random.default_rng(0)
TEMPERATURE = torch.tensor(2.0)
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a value": (lambda x: x * float(x.sum()), "reads a value of a tensor on the host"),
    "a branch": (lambda x: x if x.sum() > 0 else -x, "reads a value of a tensor on the host"),
    "numpy": (lambda x: torch.from_numpy(x.numpy() * 2), "reads a value of a tensor on the host"),
    "weights": (
        lambda x: weight(x),
        "reads weight.weight, weight.bias, which a recording",
    ),
    "a value of another tensor": (
        lambda x: x * TEMPERATURE.item(),
        "reads a value of a tensor on the host",
    ),
    "a branch on another tensor": (
        lambda x: x if TEMPERATURE > 1 else -x,
        "reads a value of a tensor on the host",
    ),
    "a branch that falls back": (falling_back, "reads a value of a tensor on the host"),
    "in place": (lambda x: x.mul_(2), r"writes to its argument\[0\] in place"),
    "by data": (lambda x: x.data.mul_(2), r"writes to its argument\[0\] in place"),
    "draws beside a mask": (
        lambda x: (x.masked_fill(x > 0, -1e9), x.sum() * DRAWS.random()),
        "returns tensors .* apart by itself",
    ),
    "draws beside infinity": (
        lambda x: (x.masked_fill(x > 0, -torch.inf), x.sum() * DRAWS.random()),
        "returns tensors .* apart by itself",
    ),
    "numpy's draws": (lambda x: x * DRAWS.random(), "returns tensors .* apart by itself"),
    "a count": (Counted(), "returns tensors .* apart by itself"),
    "no tensor": (lambda x: x, "was given no tensor"),
    "a result of a class": (lambda x: SimpleNamespace(twice=2 * x), "returns of type Simple"),
    "a sparse argument": (lambda x: 2 * x, "was given a sparse tensor; expected dense ones"),
    "a sparse gradient": (
        lambda x: torch.autograd.grad(F.embedding(torch.tensor([0, 2]), x, sparse=True).sum(), x),
        "makes a sparse tensor, which no graph can",
    ),
    "a distribution": (
        lambda x: torch.distributions.Normal(x, 1.0, validate_args=True).rsample(),
        "validate_args=False of a distribution",
    ),
    "a generator": (
        lambda x: x + torch.rand(4, generator=GENERATOR),
        "without NumPy's or a torch.Generator of its own",
    ),
}
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_hold_is_refused_in_a_line(name: str) -> None:
    function, text = REFUSED[name]
    x = x4.clone()
    argument: Any = x
    if name == "no tensor":
        argument = 3
    elif name == "a sparse argument":
        argument = x.to_sparse()
    elif name == "a sparse gradient":
        argument = x.requires_grad_()
    with pytest.raises(metapl.MetaplError, match=text):
        recorded(function)(argument)
    assert torch.equal(x, x4)


def test_a_checkpoint_that_runs_again_at_other_weights_is_refused() -> None:
    """Its backward pass comes when the module has its own weights back: the function is wrong."""
    network = Checkpointed()
    params = weights_of(network)
    _, wrong = slopes(network)(moved(params), x4, y3)
    _, right = slopes_inside(network)(moved(params), x4, y3)
    assert any(not torch.allclose(wrong[name], g) for name, g in right.items())
    with pytest.raises(metapl.MetaplError, match=r"reads network.body.0.weight"):
        recorded(slopes(network))(params, x4, y3)


def test_a_literal_is_no_reason_to_refuse() -> None:
    step = recorded(lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(step(x4), x4 + torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_derivative_through_a_recording_raises() -> None:
    network = mlp(4, 8, 1)
    step = recorded(gradient_penalty(network))
    params = leaves(weights_of(network))
    loss, _ = step(params, x4)
    with pytest.raises(metapl.MetaplError, match="the derivative of a recorded function"):
        loss.backward()
    with pytest.raises(metapl.MetaplError, match="the derivative of a recorded function"):
        torch.func.grad(lambda x: step(params, x)[0])(x4)


def test_a_tangent_through_a_recording_raises() -> None:
    """The graph has no ``detach()``, so that its tangent would be another one, in silence."""
    step = recorded(lambda x: x * x.detach())
    step(x4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x4, torch.ones_like(x4))
        with pytest.raises(metapl.MetaplError, match="the derivative of a recorded function"):
            step(dual)
        assert torch.equal(step(x4), x4 * x4)


def test_a_refused_recording_moves_no_buffer() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    step = recorded(lambda params, x: functional_call(network, params, (x,)))
    with pytest.raises(metapl.MetaplError, match=r"reads network.1.num_batches_tracked"):
        step(weights_of(network), x4)
    for name, t in network.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("kind", [list, deque, set])
def test_a_recording_adds_to_no_collection(kind: type) -> None:
    log: Any = kind()

    def doubled(x: Tensor) -> Tensor:
        if isinstance(log, set):
            log.add(x.mean())
        else:
            log.append(x.mean())
        return 2 * x

    step = recorded(doubled)
    for x in (x4, x4 + 1, x4 + 2):
        assert torch.equal(step(x), 2 * x)
    assert step.recordings == 1
    assert not log


class Scaling:
    """An object with a recorded method."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @recorded
    def scaled(self, x: Tensor) -> Tensor:
        return self.scale * x


def test_a_method_is_recorded_for_each_object() -> None:
    two, three = Scaling(2.0), Scaling(3.0)
    for scaling in (two, three, two):
        assert torch.equal(scaling.scaled(x4), scaling.scale * x4)


@pytest.mark.parametrize("is_called_before", [True, False])
def test_vmap_maps_a_recording(is_called_before: bool) -> None:
    network = mlp(4, 8, 1)
    function = gradient_penalty(network)
    step = recorded(function)
    params = weights_of(network)
    batches = torch.randn(5, 6, 4, dtype=torch.float64)
    if is_called_before:
        step(params, batches[0])
    losses, grads = torch.func.vmap(step, (None, 0))(params, batches)
    for number, x in enumerate(batches):
        loss, expected = function(params, x)
        torch.testing.assert_close(losses[number], loss.detach(), rtol=1e-12, atol=0)
        for name, g in expected.items():
            torch.testing.assert_close(grads[name][number], g, rtol=1e-10, atol=1e-14)
    step(params, batches[0])
    assert step.recordings == 1


@pytest.mark.parametrize("is_called_before", [True, False])
def test_vmap_over_vmap_maps_a_recording(is_called_before: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return 2 * x + x.sum()

    step = recorded(function)
    x = torch.randn(2, 5, 3)
    if is_called_before:
        step(x[0, :, 0])
    vmap = torch.func.vmap
    assert torch.equal(vmap(vmap(step, 1), 0)(x), vmap(vmap(function, 1), 0)(x))


POSITIVE = 4.0 * torch.eye(4) + torch.ones(4, 4)


@pytest.mark.parametrize("solve", [torch.linalg.inv, torch.linalg.cholesky])
def test_a_function_that_raises_at_repeated_rows_is_recorded(
    solve: Callable[[Tensor], Tensor],
) -> None:
    assert torch.equal(recorded(solve)(POSITIVE), solve(POSITIVE))
    count = Counted()
    with pytest.raises(metapl.MetaplError, match="returns tensors .* apart by itself"):
        recorded(lambda x: count(solve(x)))(POSITIVE)


def test_a_conjugate_is_an_argument() -> None:
    x = torch.tensor([1.0 + 2.0j, 3.0 - 4.0j]).conj()
    assert torch.equal(recorded(lambda x: x.imag)(x), torch.tensor([-2.0, 4.0]))


def test_a_function_that_keeps_a_number_is_refused_under_vmap_too() -> None:
    with pytest.raises(metapl.MetaplError, match="returns tensors .* apart by itself"):
        torch.func.vmap(recorded(Counted()))(x4)


def test_a_recording_under_autocast_has_its_casts() -> None:
    network = mlp(4, 8, 3).float()
    function = slopes(network)
    step = recorded(function)
    params = weights_of(network)
    batch = x4.float(), y3.float()
    plain = step(params, *batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = step(params, *batch)
        expected = function(params, *batch)
    assert equal(cast, expected)
    assert not equal(cast, plain)
    assert equal(step(params, *batch), plain)
    assert step.recordings == 2


def test_a_function_that_returns_other_things_than_tensors() -> None:
    step = recorded(lambda x: {"twice": 2 * x, "name": "x", "none": None, "shape": x.shape})
    found = step(x4)
    assert found["shape"] == x4.shape
    assert isinstance(found["shape"], torch.Size)
    assert found["name"] == "x"
    assert found["none"] is None
    assert torch.equal(found["twice"], 2 * x4)
    assert "mul" in step.graph().code


@pytest.mark.long
@pytest.mark.parametrize("name", ["gradient penalty", "force field"])
def test_inductor_compiles_a_recording(name: str) -> None:
    function, network, batch = CASES[name]()
    step = recorded(function, compile=True)
    params = weights_of(network)
    step(params, *batch)
    params = moved(params)
    loss, grads = step(params, *batch)
    expected, others = function(params, *batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    for name, g in grads.items():
        torch.testing.assert_close(g, others[name], rtol=1e-10, atol=1e-13)


class Reciprocal:
    """A function of numbers that cancel, whose graph adds in another order than it does itself."""

    def __init__(self, growth: float) -> None:
        self.growth = growth
        self.calls = itertools.count()

    def __call__(self, x: Tensor) -> Tensor:
        is_recorded = isinstance(x, FakeTensor)
        total = x.cumsum(0)[-1] if is_recorded else x.sum()
        return (1 + self.growth * next(self.calls)) / (total.abs() + 1e-8)


def doubled_sines(x: Tensor) -> Tensor:
    return (2 * x.sin()).sum(0)


@pytest.mark.long
def test_a_damaged_file_of_inductor_is_named(tmp_path: Path) -> None:
    """A full disk or a kill may cut it; the loader of shared libraries keeps them by their names.

    So each call is a process of its own.
    """
    program = (
        "import torch, test_recorded\n"
        "from metapl.functional import recorded\n"
        "step = recorded(test_recorded.doubled_sines, compile=True)\n"
        "print(step(torch.ones(5, 3)).shape)\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])

    def called() -> str:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert "torch.Size([3])" in called()
    files = [*tmp_path.rglob("*.main.so")]
    assert files, "Inductor keeps no library of this graph"
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    message = called()
    assert "MetaplError: Inductor's cache has a file that cannot be loaded" in message
    assert str(files[0]) in message
    for file in files:
        file.unlink()
    assert "torch.Size([3])" in called()


def test_a_result_of_rounding_is_recorded_and_said_after_some_calls() -> None:
    torch.manual_seed(0)
    x = torch.randn(64)
    x = x - x.mean()
    captured = recorded(Reciprocal(growth=0.0))
    for _ in range(TRIES):
        assert captured(x).isfinite()
    with pytest.warns(UserWarning, match="cannot tell whether .* for rounding drowns"):
        captured(x)
    captured(x)
    # Whoever counts calls comes out otherwise by more than rounding, however often it is asked.
    captured = recorded(Reciprocal(growth=1.0))
    for _ in range(4):
        with pytest.raises(metapl.MetaplError, match="by itself and recorded"):
            captured(x)


def reading(network: Any, x: Tensor) -> Tensor:
    y: Tensor = network.leftover(x) * FACTOR_OF_READING
    return y


FACTOR_OF_READING = 2.0


def test_a_variable_that_has_the_name_of_an_attribute_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a result that each turn of a loop writes into ``net`` or ``loss``."""
    monkeypatch.setitem(globals(), "leftover", "a result")
    values = attributes.Attributes([reading]).values()
    assert "a result" not in values
    assert FACTOR_OF_READING in values
