"""What a network holds beside its parameters: buffers of every kind, counters, caches and merged weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import VALIDATION, Counting, batches, network, same
from torch import Tensor, nn

import metapl
from metapl.metrics import predict_logits
from metapl.training.beside import Beside


class Counts(nn.Module):
    """A number that a pass moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return x * (1 + 0.05 * self.passes)


class Centres(nn.Module):
    """A moving mean outside of the state: a buffer that is not persistent, one made in the first pass, a plain tensor,
    or in the state, in a tensor that a pass exchanges for another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mean = kind, torch.zeros(5)
        if kind in ("transient", "persistent"):
            del self.mean
            self.register_buffer("mean", torch.zeros(5), persistent=kind == "persistent")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "late" and "mean" not in self._buffers:
            del self.mean
            self.register_buffer("mean", torch.zeros(5), persistent=False)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Merged(nn.Linear):
    """Low-rank additions that evaluation adds to the weight, as adapters of language models do."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode: bool = True) -> Merged:
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z if self.merged else z + x @ self.down.T @ self.up.T


class Caches(nn.Module):
    """A table that the first pass makes and the later ones read."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, 5)
        return x * self.table


class Warms(nn.Module):
    """A first value that a later pass replaces by None, and a container of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.warm_up: float | None = 0.1
        self.noted: dict[Any, Any] = {"seen": [], "mean": (torch.zeros(5), 0)}
        self.also = nn.Identity()
        self.also.noted = self.noted

    def forward(self, x: Tensor) -> Tensor:
        mean, passes = self.noted["mean"]
        if self.training:
            mean = mean.lerp(x.detach().mean(0), 0.1)
            self.noted["mean"] = mean, passes + 1
            self.also.noted["seen"].append(float(x.sum()))
            self.warm_up = None if passes > 2 else self.warm_up
        return x * (1 + (self.warm_up or 0)) - self.also.noted["mean"][0] + 1e-2 * len(self.noted["seen"])


class Aliased(nn.Module):
    """A buffer that is not persistent, which a part of the network reads by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5), persistent=False)
        self.read = nn.Identity()
        self.read.mean = self.mean

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.read.mean


class Described(nn.Module):
    """A state of more than tensors, weights of whole numbers, and one buffer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {"rows": 0, "last": (0.0, None)}
        self.scale = nn.Parameter(torch.arange(5, dtype=torch.int8), requires_grad=False)
        self.register_buffer("mean", torch.zeros(5))
        self.alias = self.mean

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = {"rows": self.seen["rows"] + len(x), "last": (float(x.sum()), None)}
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x * self.scale - self.alias + 1e-3 * self.seen["rows"]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "counts": Counts,
    **{kind: (lambda kind=kind: Centres(kind)) for kind in ("transient", "late", "plain", "persistent")},
    "caches": Caches,
    "warms": Warms,
    "aliased": Aliased,
    "described": Described,
}


def trainer(part: str, seed: int = 0) -> metapl.BilevelTrainer:
    torch.manual_seed(seed)
    student = nn.Sequential(PARTS[part](), nn.Linear(5, 3))
    teacher = network(0.0)
    inner = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9)
    return metapl.BilevelTrainer(teacher, student, "forward", inner_optimizer=inner)


@pytest.mark.parametrize("part", PARTS)
def test_a_fit_that_failed_ends_as_one_that_did_not(part: str, tmp_path: Path) -> None:
    (labeled, unlabeled), ends = batches(6), []

    def fit(one: metapl.BilevelTrainer, folder: Path, data: Any = labeled, **options: Any) -> None:
        one.fit(
            data, unlabeled, steps=6, out=folder, save_every=2, validation=VALIDATION, validate_every=3,
            ema_decay=0.9, progress=False, say=lambda text: None, **options,
        )  # fmt: skip
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        ends.append([*one.student.state_dict().values(), one.student.eval()(x).detach()])

    whole, stopped, later = trainer(part), trainer(part), trainer(part)
    fit(whole, tmp_path / "whole")

    def fail() -> None:
        raise RuntimeError("the lights went out")

    with pytest.raises(metapl.MetaplError, match="lights"):
        fit(stopped, tmp_path / "pieces", Counting(labeled, 4, fail))
    fit(later, tmp_path / "pieces", resume=True)
    assert same(*ends)


@pytest.mark.parametrize("part", ["counts", "transient", "late", "plain", "warms", "aliased"])
def test_the_best_student_is_whole(part: str) -> None:
    """A student that is put back has what it held beside its state when it was the best."""
    one, seen = trainer(part), list[Tensor]()

    def earliness(outputs: Tensor, batch: Any) -> float:
        seen.append(outputs.clone())
        return float(len(seen))

    found = one.fit(
        *batches(6), steps=6, validation=VALIDATION, metric=earliness, mode="min", validate_every=2, progress=False
    )
    assert found.value is not None
    assert torch.equal(predict_logits(one.student, [VALIDATION])[0], seen[int(found.value) - 1])
    assert not torch.equal(seen[int(found.value) - 1], seen[-1])


class Number(int):
    """A number with a life of its own."""


OTHERS: dict[str, Callable[[], Any]] = {
    "a number of a class": lambda: Number(3),
    "a lock": threading.Lock,
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a tensor of a graph": lambda: torch.ones(3, requires_grad=True) * 2,
    "a list with a lock": lambda: [1, threading.Lock()],
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_objects_of_other_kinds_are_left_alone(kind: str) -> None:
    """They are in no checkpoint, and loading one does not touch them."""
    part = Counts()
    beside, part.other = Beside(part), OTHERS[kind]()
    part.passes, own = 2, part.other
    changed = beside.changed()
    assert changed == {"passes": 2}
    part.passes = 5
    beside.load(changed)
    assert part.passes == 2
    assert part.other is own


def test_merged_weights_are_parted_again_after_an_evaluation() -> None:
    layer = Merged()
    model = nn.Sequential(layer, nn.Linear(3, 3).eval())
    before = layer.weight.clone()
    predict_logits(model, [(torch.randn(4, 5), torch.arange(4) % 3)])
    assert not layer.merged
    torch.testing.assert_close(layer.weight, before)
    assert [part.training for part in model] == [True, False]


class Outer(nn.Sequential):
    """A network whose train() is its own."""

    def train(self, mode: bool = True) -> Outer:
        return super().train(mode)


@pytest.mark.parametrize("kind", [nn.Sequential, Outer])
def test_a_layer_that_stays_merged_is_merged_after_an_evaluation(kind: type[nn.Sequential]) -> None:
    """Its network goes back to training mode and wakes it on the way."""
    layer = Merged()
    model = kind(layer, nn.Linear(3, 3))
    layer.eval()
    weight = layer.weight.clone()
    predict_logits(model, [(torch.randn(4, 5), torch.arange(4) % 3)])
    assert layer.merged
    torch.testing.assert_close(layer.weight, weight)
    assert [model.training, *(part.training for part in model)] == [True, False, True]


def test_what_a_first_evaluation_makes_is_trained_with_afterwards() -> None:
    one = trainer("caches")
    predict_logits(one.student, [VALIDATION])
    (labeled, unlabeled) = batches(1)
    one.step(labeled[0], unlabeled[0])
    table = one.student[0].table  # type: ignore[index]
    assert isinstance(table, Tensor)
    assert not table.is_inference()
