"""What is saved is the whole state: a resumed run is the run that nobody stopped.

Finetuning in stages freezes, thaws and puts into evaluation while a fit runs; the program that
resumes builds its networks as the first one did.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metapl
from metapl.training.network_settings import changed_by_evaluation, network_settings

STOPPED_IN = 8
CHANGED_IN = 4


def networks() -> list[nn.Sequential]:
    """Return two small networks, the same in each call."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        for _ in range(2)
    ]


def trainer_of(kind: str) -> metapl.BilevelTrainer | metapl.LossTrainer:
    """Return a new trainer, whose student's first layer is frozen."""
    teacher, student = networks()
    student[3].requires_grad_(requires_grad=False)
    if kind == "bilevel":
        return metapl.BilevelTrainer(teacher, student)
    return metapl.LossTrainer(student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1))


def freeze(trainer: Any) -> None:
    trainer.student[0].requires_grad_(requires_grad=False)


def thaw(trainer: Any) -> None:
    trainer.student[3].requires_grad_(requires_grad=True)


def evaluate_norm(trainer: Any) -> None:
    trainer.student[1].eval()


def evaluate_teacher(trainer: Any) -> None:
    next(reversed(trainer.networks.values()))[1].eval()


def drop_less(trainer: Any) -> None:
    trainer.student[2].p = 0.05


def follow_slower(trainer: Any) -> None:
    trainer.student[1].momentum = 0.01


def decay_more(trainer: Any) -> None:
    trainer.schedulable[0].param_groups[0]["weight_decay"] = 0.01


CHANGES = (freeze, thaw, evaluate_norm, evaluate_teacher, drop_less, follow_slower, decay_more)


def fit(kind: str, out: Path, change: Callable[[Any], None], *, stops: bool, **options: Any) -> Any:
    """Fit a new trainer, change it in a step, and perhaps stop; return the trainer."""
    trainer = trainer_of(kind)

    def at_step(step: int, row: dict[str, float], trainer: Any) -> None:
        if step == CHANGED_IN:
            change(trainer)
        if stops and step == STOPPED_IN:
            raise KeyboardInterrupt

    generator = torch.Generator().manual_seed(1)
    labeled = torch.randn(40, 6, generator=generator), torch.arange(40) % 3
    inner = torch.randn(40, 6, generator=generator) if kind == "bilevel" else None
    torch.manual_seed(2)
    trainer.fit(
        labeled,
        inner,
        steps=20,
        batch_size=8,
        out=out,
        save_every=3,
        log_every=1,
        callbacks=[at_step],
        progress=False,
        say=lambda text: None,
        **options,
    )
    return trainer


@cache
def fit_without_change() -> Any:
    with TemporaryDirectory() as folder:
        return fit("bilevel", Path(folder), lambda trainer: None, stops=False)


@pytest.mark.parametrize("kind", ["bilevel", "loss"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_ends_as_one_left_alone(
    kind: str, change: Callable[[Any], None], tmp_path: Path
) -> None:
    whole = fit(kind, tmp_path / "whole", change, stops=False)
    with pytest.raises(KeyboardInterrupt):
        fit(kind, tmp_path / "stopped", change, stops=True)
    resumed = fit(kind, tmp_path / "stopped", change, stops=False, resume=True)
    for role, network in whole.networks.items():
        assert network_settings(network) == network_settings(resumed.networks[role])
        state = resumed.networks[role].state_dict()
        for name, value in network.state_dict().items():
            assert torch.equal(value, state[name]), f"{role}.{name}"
    if kind == "bilevel":
        # The change matters, so that this test can fail.
        assert any(
            not torch.equal(value, whole.networks[role].state_dict()[name])
            for role, network in fit_without_change().networks.items()
            for name, value in network.state_dict().items()
        )


def test_what_a_checkpoint_thaws_is_said(tmp_path: Path) -> None:
    """The program freezes a layer at its start, after the run was begun without."""
    with pytest.raises(KeyboardInterrupt):
        fit("loss", tmp_path, lambda trainer: None, stops=True)
    trainer = trainer_of("loss")
    trainer.student[0].requires_grad_(requires_grad=False)
    trainer.student[1].eval()
    said: list[str] = []
    labeled = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3
    torch.manual_seed(2)
    trainer.fit(
        labeled,
        steps=20,
        batch_size=8,
        out=tmp_path,
        resume="anyway",
        progress=False,
        say=said.append,
    )
    (line,) = [text for text in said if text.startswith("as when it was saved")]
    assert "of the student are trained again: 0.bias, 0.weight; set again: 1.training" in line


@pytest.mark.parametrize("resume", [True, "anyway"])
def test_a_param_group_that_was_added_is_asked_for(resume: Any, tmp_path: Path) -> None:
    def add_group(trainer: Any) -> None:
        trainer.student[3].requires_grad_(requires_grad=True)
        trainer.optimizer.add_param_group({"params": list(trainer.student[3].parameters())})

    def run(**options: Any) -> Any:
        student = networks()[1]
        student[3].requires_grad_(requires_grad=False)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        trainer = metapl.LossTrainer(student, optimizer=optimizer)

        def at_step(step: int, row: Any, trainer: Any) -> None:
            if step == CHANGED_IN and len(trainer.optimizer.param_groups) == 1:
                add_group(trainer)
            if step == STOPPED_IN and "resume" not in options:
                raise KeyboardInterrupt

        if options.pop("adds", False):
            add_group(trainer)
        torch.manual_seed(2)
        trainer.fit(
            (torch.ones(40, 6), torch.arange(40) % 3),
            steps=12,
            batch_size=8,
            out=tmp_path,
            save_every=3,
            log_every=1,
            callbacks=[at_step],
            progress=False,
            say=lambda text: None,
            **options,
        )
        return trainer

    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(metapl.MetaplError, match="add_param_group"):
        run(resume=resume)
    assert run(resume=resume, adds=True).steps_done == 12


def exchange_layer(trainer: Any) -> None:
    trainer.student[2] = nn.AlphaDropout(0.2)


def draw_apart(trainer: Any) -> None:
    trainer.generator = torch.Generator().manual_seed(5)


REFUSED = {
    exchange_layer: "its student.2 is a AlphaDropout, and the trainer's Dropout",
    draw_apart: "one of the two has a generator, and the other has none",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_restored_is_refused_by_name(change: Callable[[Any], None]) -> None:
    trainer = trainer_of("bilevel")
    change(trainer)
    with pytest.raises(metapl.MetaplError, match=REFUSED[change]):
        trainer_of("bilevel").load_state_dict(trainer.state_dict())


def test_a_refused_state_changes_nothing() -> None:
    other = trainer_of("bilevel")
    freeze(other)
    exchange_layer(other)
    trainer = trainer_of("bilevel")
    before = trainer.network_settings()
    with pytest.raises(metapl.MetaplError):
        trainer.load_state_dict(other.state_dict())
    assert trainer.network_settings() == before


# ------------------------------------------------------------------------ state in plain attributes


class Remembering(nn.Module):
    """A network that moves towards what it has seen, which it remembers in an attribute."""

    def __init__(self, holder: str) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.holder = holder
        generator = numpy.random.default_rng(3)
        self._memory: Any = {
            "tensor": torch.zeros(3),
            "dict": {"mean": torch.zeros(3), "seen": 0},
            "list": [torch.zeros(3)],
            "deque": deque([torch.zeros(3)], maxlen=2),
            "array": numpy.zeros(3),
            "number": numpy.float32(0.0),
            "generator": generator,
            "late": None,
            "alias": torch.zeros(3),
            "shared array": numpy.zeros(3),
            "pair key": {},
        }[holder]
        # A second name of the same memory.
        self.view = self._memory
        if holder == "alias":
            self.view = {"all but one": self._memory[1:]}

    def moved(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a part of what is remembered, after it has moved."""
        mean = logits.detach().mean(0)
        if self.holder == "tensor":
            self._memory.mul_(0.9).add_(mean)
        elif self.holder == "late":
            self._memory = mean if self._memory is None else 0.9 * self._memory + mean
        elif self.holder == "alias":
            self._memory.mul_(0.9).add_(mean)
            return self.view["all but one"].sum() * mean
        elif self.holder == "shared array":
            self._memory += mean.numpy()
            return torch.as_tensor(self.view, dtype=torch.float32) * 0.1
        elif self.holder == "pair key":
            self._memory[0, "mean"] = 0.9 * self._memory.get((0, "mean"), 0.0) + mean
            return self._memory[0, "mean"]
        elif self.holder == "dict":
            self._memory["mean"] = 0.9 * self._memory["mean"] + mean
            self._memory["seen"] += 1
            return self._memory["mean"] / self._memory["seen"]
        elif self.holder in ("list", "deque"):
            self._memory.append(0.9 * self._memory[-1] + mean)
            return self._memory[-1] * len(self._memory)
        elif self.holder == "generator":
            return torch.as_tensor(self._memory.normal(size=3), dtype=torch.float32)
        else:
            self._memory = 0.9 * self._memory + numpy.float32(mean.mean())
            return torch.as_tensor(self._memory, dtype=torch.float32)
        remembered: torch.Tensor = self._memory
        return remembered

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        if self.training:
            return logits + 0.1 * self.moved(logits)
        return logits


HOLDERS = (
    *("tensor", "dict", "list", "deque", "array", "number", "generator", "late"),
    *("alias", "shared array", "pair key"),
)


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_a_network_holds_in_an_attribute_is_saved(holder: str, tmp_path: Path) -> None:
    def weights(out: str, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        network = Remembering(holder)
        trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), 0.1))
        fit_and_stop(trainer, tmp_path / out, **options)
        return network.net.weight.detach()

    whole = weights("whole")
    with pytest.raises(KeyboardInterrupt):
        weights("stopped", stops=True)
    assert torch.equal(weights("stopped", resume=True), whole)


def fit_and_stop(
    trainer: Any,
    out: Path,
    *,
    stops: bool = False,
    change: Callable[[int, Any, Any], None] = lambda step, row, trainer: None,
    **options: Any,
) -> None:
    """Fit a trainer for some steps, change it in some, and perhaps stop between two of them."""

    def at_step(step: int, row: Any, trainer: Any) -> None:
        change(step, row, trainer)
        if stops and step == STOPPED_IN:
            raise KeyboardInterrupt

    generator = torch.Generator().manual_seed(1)
    labeled = torch.randn(40, 6, generator=generator), torch.arange(40) % 3
    inner = None
    if isinstance(trainer, metapl.BilevelTrainer):
        inner = torch.randn(40, 6, generator=generator)
    torch.manual_seed(2)
    options = {"say": lambda text: None} | options
    trainer.fit(
        labeled,
        inner,
        steps=20,
        batch_size=8,
        out=out,
        save_every=3,
        log_every=1,
        callbacks=[at_step],
        progress=False,
        **options,
    )


@dataclass
class Rising(metapl.BilevelProblem):
    """A problem whose signal counts more with each step, by a number and by a tensor in a dict."""

    steps: int = 0
    table: dict[str, torch.Tensor] = field(default_factory=lambda: {"level": torch.tensor(0.5)})

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        self.steps += 1
        q = teacher(batch).softmax(-1)
        self.table["level"] = 0.9 * self.table["level"] + 0.1 * q.detach().amax(1).mean()
        return metapl.Signal(q * (1 - 0.5**self.steps) * self.table["level"])

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> torch.Tensor:
        loss: torch.Tensor = -(signal.value * outputs.log_softmax(-1)).sum(-1)
        return loss

    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def test_what_a_problem_holds_in_attributes_is_saved(tmp_path: Path) -> None:
    def weights(out: str, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        student = nn.Linear(6, 3)
        trainer = metapl.BilevelTrainer(
            nn.Linear(6, 3),
            student,
            "forward",
            problem=Rising(),
            teacher_losses=(),
            verify=False,
        )
        fit_and_stop(trainer, tmp_path / out, **options)
        return student.weight.detach()

    whole = weights("whole")
    with pytest.raises(KeyboardInterrupt):
        weights("stopped", stops=True)
    assert torch.equal(weights("stopped", resume=True), whole)


def test_what_no_checkpoint_has_is_named_where_a_fit_is_resumed(tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(Remembering("dict"))
        network[0].hidden = [torch.zeros(3, device="meta")]
        trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), 0.1))
        fit_and_stop(trainer, tmp_path, **options)

    with pytest.raises(KeyboardInterrupt):
        run(stops=True)
    said: list[str] = []
    run(resume=True, say=said.append)
    (line,) = [text for text in said if "not restored" in text]
    assert "the student's 0.hidden (a value in it is a tensor of shape (3,), float32" in line


class Meter:
    """A running mean, as helpers have it."""

    def __init__(self) -> None:
        self.mean = 0.5
        self.count = 0

    def update(self, value: torch.Tensor) -> float:
        self.mean = 0.9 * self.mean + 0.1 * float(value)
        self.count += 1
        return self.mean


@dataclass(slots=True)
class TensorMeter:
    mean: torch.Tensor = field(default_factory=lambda: torch.tensor(0.5))

    def update(self, value: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * value
        return self.mean


class Signalling(metapl.BilevelProblem):
    """A problem whose signal is scaled by what it keeps in one place."""

    def __init__(self, place: str) -> None:
        self.place = place
        generator = torch.Generator().manual_seed(4)
        self.kept: Any = {
            "module": nn.BatchNorm1d(3),
            "module in a list": [nn.BatchNorm1d(3)],
            "mean teacher": nn.Linear(6, 3).requires_grad_(requires_grad=False),
            "object": Meter(),
            "dataclass with slots": TensorMeter(),
            "optimizer": torch.zeros(1, requires_grad=True),
        }[place]
        if place == "mean teacher":
            self.kept.weight.data = torch.randn(3, 6, generator=generator)
        if place == "optimizer":
            self.optimizer = torch.optim.SGD([self.kept], lr=0.1, momentum=0.9)

    def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> metapl.Signal:
        logits = teacher(batch)
        mean = logits.detach().amax(1).mean()
        scale: Any = 1.0
        if self.place == "mean teacher":
            for kept, weight in zip(self.kept.parameters(), teacher.parameters(), strict=True):
                kept.lerp_(weight.detach(), 0.1)
            scale = self.kept(batch).sigmoid()
        elif self.place == "optimizer":
            self.kept.grad = mean[None]
            self.optimizer.step()
            scale = self.kept.detach().exp()
        elif self.place.startswith("module"):
            norm = self.kept[0] if isinstance(self.kept, list) else self.kept
            norm(logits.detach())
            scale = norm.running_var
        else:
            scale = self.kept.update(mean)
        return metapl.Signal(logits.softmax(-1) * scale)

    def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> torch.Tensor:
        loss: torch.Tensor = -(signal.value * outputs.log_softmax(-1)).sum(-1)
        return loss

    def outer_loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class SignallingModule(Signalling, nn.Module):
    """A problem that is a module, with its state in a buffer."""

    def __init__(self, place: str) -> None:
        nn.Module.__init__(self)
        self.place = place
        self.register_buffer("mean", torch.tensor(0.5))

    @property
    def kept(self) -> Any:
        return self

    def update(self, value: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(0.1 * value)
        return self.mean.clone()


@dataclass
class Centered:
    """A loss that subtracts a running mean of the outputs, or divides by one of itself."""

    center: Any
    name: str = "centered"

    def __call__(
        self, teacher: nn.Module, *, outer: Any, inner: Any, signal: Any, step: int
    ) -> torch.Tensor:
        logits = teacher(outer[0])
        if isinstance(self.center, torch.Tensor):
            self.center = 0.9 * self.center + 0.1 * logits.detach().mean(0)
            return nn.functional.cross_entropy(logits - self.center, outer[1])
        loss = nn.functional.cross_entropy(logits, outer[1])
        return loss / self.center.update(loss.detach())


def weights_after_resuming(
    make: Callable[[], Any], out: Path, said: list[str], **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the networks' weights of a fit that nobody stopped, and of one that is resumed."""

    def weights(name: str, **fit_options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        trainer = make()
        fit_and_stop(trainer, out / name, **options, **fit_options)
        return [p.detach() for net in trainer.networks.values() for p in net.parameters()]

    whole = weights("whole")
    with pytest.raises(KeyboardInterrupt):
        weights("stopped", stops=True)
    return whole, weights("stopped", resume=True, say=said.append)


class AroundMean(nn.Module):
    """A network around a running mean that no state_dict has."""

    mean: torch.Tensor

    def __init__(self, *, is_persistent: bool) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(3), persistent=is_persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * logits.detach().mean(0)
        return logits - self.mean


@pytest.mark.parametrize("kind", ["bilevel", "loss"])
def test_a_buffer_that_no_state_dict_has_is_saved(kind: str, tmp_path: Path) -> None:
    """With it the resumed fit is that of a buffer which a state_dict has, bit for bit."""

    def make(*, is_persistent: bool) -> Any:
        student = AroundMean(is_persistent=is_persistent)
        if kind == "loss":
            return metapl.LossTrainer(
                student, optimizer=torch.optim.SGD(student.parameters(), lr=0.1)
            )
        return metapl.BilevelTrainer(nn.Linear(6, 3), student, "reinforce", verify=False)

    said: list[str] = []
    whole, resumed = weights_after_resuming(partial(make, is_persistent=False), tmp_path, said)
    saved, _ = weights_after_resuming(
        partial(make, is_persistent=True), tmp_path / "persistent", said
    )
    assert all(map(torch.equal, whole, resumed))
    assert all(map(torch.equal, whole, saved))
    trainer = make(is_persistent=False)
    trainer.student.mean += 1
    state = trainer.state_dict()
    trainer.student.mean += 1
    trainer.load_state_dict(state)
    assert torch.equal(trainer.student.mean, torch.ones(3))


PLACES = (
    *("module", "module in a list", "mean teacher", "object", "dataclass with slots"),
    *("optimizer", "own buffer"),
)


@pytest.mark.parametrize("place", PLACES)
def test_what_a_problem_holds_beside_plain_attributes_is_saved(place: str, tmp_path: Path) -> None:
    def make() -> Any:
        problem = SignallingModule if place == "own buffer" else Signalling
        return metapl.BilevelTrainer(
            nn.Linear(6, 3),
            nn.Linear(6, 3),
            "forward",
            problem=problem(place),
            teacher_losses=(),
            verify=False,
        )

    said: list[str] = []
    whole, resumed = weights_after_resuming(make, tmp_path, said)
    assert all(map(torch.equal, whole, resumed))
    assert not [text for text in said if "warning" in text]


@pytest.mark.parametrize("kind", ["bilevel", "loss"])
@pytest.mark.parametrize("has_tensor", [True, False])
def test_what_a_loss_holds_is_saved(kind: str, *, has_tensor: bool, tmp_path: Path) -> None:
    def make() -> Any:
        student = nn.Linear(6, 3)
        losses = (Centered(torch.zeros(3) if has_tensor else Meter()),)
        if kind == "loss":
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            return metapl.LossTrainer(student, losses, optimizer=optimizer)
        return metapl.BilevelTrainer(
            nn.Linear(6, 3), student, "forward", teacher_losses=losses, verify=False
        )

    whole, resumed = weights_after_resuming(make, tmp_path, [])
    assert all(map(torch.equal, whole, resumed))


def test_a_network_that_a_problem_holds_is_not_saved_twice() -> None:
    teacher, student = networks()
    problem: Any = Rising()
    problem.teacher = teacher
    problem.layers = [teacher[0], nn.Linear(2, 2)]
    trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=problem, verify=False)
    problem_values = trainer.live_state()["held"]["problem"]
    assert "teacher" not in problem_values
    first, second = problem_values["layers"]
    assert "value" not in first
    assert second["value"].keys() >= {"weight", "bias"}
    trainer.load_state_dict(trainer.state_dict())
    assert problem.teacher is teacher
    assert problem.layers[0] is teacher[0]


def test_a_loss_that_is_given_otherwise_stays_so_where_a_fit_goes_on_anyway(tmp_path: Path) -> None:
    def fit_with(smoothing: float, **options: Any) -> Any:
        torch.manual_seed(0)
        student = nn.Linear(6, 3)
        losses = (metapl.CrossEntropy(label_smoothing=smoothing),)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        trainer = metapl.LossTrainer(student, losses, optimizer=optimizer)
        fit_and_stop(trainer, tmp_path, **options)
        return trainer

    with pytest.raises(KeyboardInterrupt):
        fit_with(0.1, stops=True)
    assert fit_with(0.3, resume="anyway").losses[0].label_smoothing == 0.3


def adam_over(
    order: tuple[int, ...], tmp_path: Path, decay: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    parameters = [*student.parameters()]
    ordered = [parameters[place] for place in order]
    optimizer = torch.optim.AdamW(ordered, lr=0.1, betas=(0.8, 0.9), weight_decay=decay)
    fit_and_stop(metapl.LossTrainer(student, optimizer=optimizer), tmp_path, **options)
    return optimizer


def test_parameters_in_another_order_are_refused_where_a_fit_is_resumed(tmp_path: Path) -> None:
    """An optimizer's state has their places alone."""
    with pytest.raises(KeyboardInterrupt):
        adam_over((0, 1, 2, 3), tmp_path, stops=True)
    with pytest.raises(
        metapl.MetaplError, match=r"optimizer.0.parameters was \['student.0.weight'"
    ):
        adam_over((1, 0, 2, 3), tmp_path, resume=True)
    adam_over((0, 1, 2, 3), tmp_path, resume=True)


def test_settings_that_are_given_otherwise_stay_so_where_a_fit_goes_on_anyway(
    tmp_path: Path,
) -> None:
    order = (0, 1, 2, 3)
    with pytest.raises(KeyboardInterrupt):
        adam_over(order, tmp_path, stops=True)
    optimizer = adam_over(order, tmp_path, decay=0.3, resume="anyway")
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


class Way(Enum):
    UP = 1
    DOWN = 2


class Switched(nn.Module):
    """A network with settings that a callback may exchange while a fit runs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.way = Way.UP
        self.activation = torch.tanh
        self.part: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.activation(self.net(x))
        if self.part is not None:
            logits = logits * torch.arange(1, 4)[self.part]
        return logits if self.way is Way.UP else logits.flip(1)


def switch_way(network: Any) -> None:
    network.way = Way.DOWN


def exchange_activation(network: Any) -> None:
    network.activation = torch.relu


def cut(network: Any) -> None:
    network.part = slice(1, 2)


def hook(network: Any) -> None:
    network.net.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)


def hook_saving(network: Any) -> None:
    network.net.register_state_dict_pre_hook(lambda *arguments: None)


SWITCHES = {
    switch_way: "",
    hook_saving: "",
    exchange_activation: "the student's activation (torch._VariableFunctionsClass.relu when it was",
    cut: "the student's part (slice(1, 2, None) when it was saved, now None)",
    hook: "the student's net.forward_hooks (",
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_exchanged_in_a_network_is_restored_or_named(switch: Any, tmp_path: Path) -> None:
    def make() -> Any:
        network = Switched()
        return metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), 0.1))

    def switch_once(step: int, row: Any, trainer: Any) -> None:
        if step == CHANGED_IN:
            switch(trainer.student)

    said: list[str] = []
    whole, resumed = weights_after_resuming(make, tmp_path, said, change=switch_once)
    warnings = [text for text in said if "not restored" in text]
    if SWITCHES[switch]:
        (warning,) = warnings
        assert SWITCHES[switch] in warning
    else:
        assert not warnings
        assert all(map(torch.equal, whole, resumed))


def test_a_module_that_is_not_made_yet_is_named(tmp_path: Path) -> None:
    class Late(Rising):
        ema: Any = None

        def signal(self, teacher: Any, *args: Any, **options: Any) -> metapl.Signal:
            if self.ema is None:
                self.ema = deepcopy(teacher)
            return super().signal(teacher, *args, **options)

    def make() -> Any:
        return metapl.BilevelTrainer(
            nn.Linear(6, 3), nn.Linear(6, 3), "forward", problem=Late(), verify=False
        )

    said: list[str] = []
    weights_after_resuming(make, tmp_path, said)
    (warning,) = [text for text in said if "not restored" in text]
    assert "the problem's ema (torch.nn.modules.linear.Linear when it was saved, now" in warning


@pytest.mark.parametrize("place", ["Counting.seen", "rounds in signal", "steady"])
def test_a_count_that_no_checkpoint_has_is_named(place: str, tmp_path: Path) -> None:
    """Of the problem's class, and of a closure."""

    def run(**options: Any) -> None:
        rounds = 0

        class Counting(Rising):
            seen = 0
            constant = 3.0

            def signal(self, *args: Any, **options: Any) -> metapl.Signal:
                nonlocal rounds
                rounds += place == "rounds in signal"
                type(self).seen += place == "Counting.seen"
                return super().signal(*args, **options)

        torch.manual_seed(0)
        trainer = metapl.BilevelTrainer(
            nn.Linear(6, 3), nn.Linear(6, 3), "forward", problem=Counting(), verify=False
        )
        fit_and_stop(trainer, tmp_path, **options)

    with pytest.raises(KeyboardInterrupt):
        run(stops=True)
    said: list[str] = []
    run(resume=True, say=said.append)
    warnings = [text for text in said if "not restored" in text]
    if place == "steady":
        assert not warnings
    else:
        (warning,) = warnings
        assert f"the problem's {place} (" in warning
        assert warning.count("when it was saved, now 0)") == 1


def test_a_loaded_state_keeps_containers_that_others_hold() -> None:
    """A dict that two modules share stays one, and the state that is loaded is the caller's."""
    network = nn.Sequential(Remembering("dict"), nn.Linear(3, 3))
    network[1].shared = network[0]._memory
    trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), 0.1))
    state = trainer.state_dict()
    batch = torch.randn(8, 6), torch.arange(8) % 3
    trainer.step(batch)
    assert network[0]._memory["seen"] > 0
    trainer.load_state_dict(state)
    assert network[0]._memory["seen"] == 0
    assert network[1].shared is network[0]._memory
    trainer.step(batch)
    trainer.load_state_dict(state)
    assert torch.equal(network[0]._memory["mean"], torch.zeros(3))


# --------------------------------------------------------------------- no attribute without a place

SAVED = "in the checkpoint"
BY_THE_PROGRAM = "an argument or code, which the program that resumes gives again"
FOLLOWS = "follows from what is saved, and is made anew in the next step"

MODULE_ATTRIBUTES = {
    "training": SAVED,
    "_parameters": SAVED,
    "_buffers": SAVED,
    "_modules": SAVED,
    "_non_persistent_buffers_set": BY_THE_PROGRAM,
    "_backward_pre_hooks": BY_THE_PROGRAM,
    "_backward_hooks": BY_THE_PROGRAM,
    "_is_full_backward_hook": BY_THE_PROGRAM,
    "_forward_hooks": BY_THE_PROGRAM,
    "_forward_hooks_with_kwargs": BY_THE_PROGRAM,
    "_forward_hooks_always_called": BY_THE_PROGRAM,
    "_forward_pre_hooks": BY_THE_PROGRAM,
    "_forward_pre_hooks_with_kwargs": BY_THE_PROGRAM,
    "_state_dict_hooks": BY_THE_PROGRAM,
    "_state_dict_pre_hooks": BY_THE_PROGRAM,
    "_load_state_dict_pre_hooks": BY_THE_PROGRAM,
    "_load_state_dict_post_hooks": BY_THE_PROGRAM,
}

OPTIMIZER_ATTRIBUTES = {
    "state": SAVED,
    "param_groups": SAVED,
    "defaults": BY_THE_PROGRAM,
    "_warned_capturable_if_run_uncaptured": BY_THE_PROGRAM,
    "_optimizer_step_pre_hooks": BY_THE_PROGRAM,
    "_optimizer_step_post_hooks": BY_THE_PROGRAM,
    "_optimizer_state_dict_pre_hooks": BY_THE_PROGRAM,
    "_optimizer_state_dict_post_hooks": BY_THE_PROGRAM,
    "_optimizer_load_state_dict_pre_hooks": BY_THE_PROGRAM,
    "_optimizer_load_state_dict_post_hooks": BY_THE_PROGRAM,
    "_zero_grad_profile_name": BY_THE_PROGRAM,
    "_opt_called": FOLLOWS,
    "_need_device_dtype_check_for_fused": BY_THE_PROGRAM,
}

TRAINER_ATTRIBUTES = {
    "steps_done": SAVED,
    "mode_state": SAVED,
    "generator": SAVED,
    "verification": SAVED,
    "orders": SAVED,
    "student": SAVED,
    "teacher": SAVED,
    "update": SAVED,
    "optimizer": SAVED,
    "inner_optimizer": SAVED,
    "outer_optimizer": SAVED,
    "as_given": BY_THE_PROGRAM,
    "network": BY_THE_PROGRAM,
    "mode": BY_THE_PROGRAM,
    "problem": SAVED,
    "given_problem": BY_THE_PROGRAM,
    "losses": SAVED,
    "teacher_losses": SAVED,
    "feedback_weight": BY_THE_PROGRAM,
    "feedback_ratio": BY_THE_PROGRAM,
    "feedback_bound": BY_THE_PROGRAM,
    "lookahead": BY_THE_PROGRAM,
    "accumulate": BY_THE_PROGRAM,
    "clip_norm": BY_THE_PROGRAM,
    "compile": BY_THE_PROGRAM,
    "precision": BY_THE_PROGRAM,
    "recompute_teacher": BY_THE_PROGRAM,
    "classifies": BY_THE_PROGRAM,
    "teacher_classifies": BY_THE_PROGRAM,
    "device": FOLLOWS,
    "distributed": FOLLOWS,
    "ranks": FOLLOWS,
    "layout": FOLLOWS,
    "layouts": FOLLOWS,
    "teacher_layout": FOLLOWS,
    "pair": FOLLOWS,
    "is_made": FOLLOWS,
    "slots": FOLLOWS,
    "compiled_step": FOLLOWS,
    "measures_feedback": FOLLOWS,
    "_engine_type": FOLLOWS,
    "_teacher_trainer": FOLLOWS,
    "_condition": FOLLOWS,
    "_conditions": FOLLOWS,
    "_standing": FOLLOWS,
    "_told_in_evaluation": FOLLOWS,
}


@pytest.mark.parametrize("kind", ["bilevel", "loss"])
def test_every_attribute_has_a_place(kind: str) -> None:
    """Whoever adds state to a trainer says here what a checkpoint does with it."""
    trainer = trainer_of(kind)
    x = torch.randn(8, 6)
    trainer.step((x, torch.arange(8) % 3), x if kind == "bilevel" else None)
    assert vars(trainer).keys() <= TRAINER_ATTRIBUTES.keys()
    for network in trainer.networks.values():
        assert vars(network).keys() <= MODULE_ATTRIBUTES.keys()
    for optimizer in trainer.schedulable:
        assert vars(optimizer).keys() <= OPTIMIZER_ATTRIBUTES.keys()


# --------------------------------------------------------------------------- networks in evaluation


class Wrapped(nn.Module):
    """A network from elsewhere within a wrapper, which is in training itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        return logits


@pytest.mark.parametrize("kind", ["bilevel", "loss"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_network_in_evaluation_as_a_whole_is_named_once(kind: str, is_wrapped: bool) -> None:
    teacher, student = networks()
    student.eval()
    model = Wrapped(student) if is_wrapped else student
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer: Any = metapl.LossTrainer(model, optimizer=optimizer)
    if kind == "bilevel":
        trainer = metapl.BilevelTrainer(teacher, model, inner_optimizer=optimizer)
    x = torch.randn(40, 6)
    said: list[str] = []
    results = []
    for steps in (4, 8):
        result = trainer.fit(
            (x, torch.arange(40) % 3),
            x if kind == "bilevel" else None,
            steps=steps,
            batch_size=8,
            progress=False,
            say=said.append,
        )
        results.append(result)
    lines = [text for text in said if "eval()" in text]
    assert len(lines) == 1
    assert lines[0].startswith("warning: the student is in eval() as a whole")
    assert [f"warning: {text}" for text in results[0].warnings] == lines
    assert not results[1].warnings
    assert not student.training


@pytest.mark.parametrize("kind", ["bilevel", "loss"])
def test_a_step_warns_of_a_network_in_evaluation(kind: str) -> None:
    trainer: Any = trainer_of(kind)
    trainer.student.eval()
    x = torch.randn(8, 6)
    batches = ((x, torch.arange(8) % 3), x if kind == "bilevel" else None)
    with pytest.warns(UserWarning, match="the student is in eval"):
        trainer.step(*batches)
    # Another warning would be an error.
    trainer.step(*batches)


def test_a_network_that_is_put_into_evaluation_between_two_fits_is_named() -> None:
    trainer = trainer_of("loss")
    said: list[str] = []
    data = torch.randn(16, 6), torch.arange(16) % 3
    trainer.fit(data, steps=2, batch_size=8, progress=False, say=said.append)
    trainer.student.eval()
    trainer.fit(data, steps=4, batch_size=8, progress=False, say=said.append)
    (line,) = [text for text in said if "eval()" in text]
    assert "its dropout is off, and the statistics of its norms stay" in line


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 6, num_layers=2, dropout=0.5),
        nn.MultiheadAttention(6, 2, dropout=0.2),
        nn.InstanceNorm1d(6, track_running_stats=True),
    ],
)
def test_other_layers_that_act_by_being_in_training_are_named(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(6, 6), layer)
    assert not changed_by_evaluation(network)
    assert len(changed_by_evaluation(network.eval())) == 1


class Dropping(nn.Module):
    """Calls a function of torch that drops, as far as a rate or its mode says so."""

    def __init__(self, **attributes: float) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        vars(self).update(attributes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.dropout(x, 0.5, training=self.training))


class AlwaysDropping(Dropping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.dropout(x, 0.5))


def test_functional_dropout_is_named() -> None:
    for attributes in ({}, {"attention_dropout": 0.1}, {"drop_rate": 0.2}):
        assert changed_by_evaluation(Dropping(**attributes).eval()) == ["its dropout is off"]
        assert not changed_by_evaluation(Dropping(**attributes))
    assert not changed_by_evaluation(Dropping(drop_rate=0.0).eval())


def test_a_network_that_draws_while_it_predicts_is_named() -> None:
    data = torch.randn(8, 6), torch.arange(8) % 3
    network = AlwaysDropping()
    trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="AlwaysDropping draws random numbers in eval"):
        trainer.fit(data, validation=data, steps=1, batch_size=8, progress=False, say=print)
    with pytest.warns(UserWarning, match="draws random numbers in eval"):
        trainer.predict(data[0])


def test_a_resumed_fit_has_the_warnings_of_its_first_part_once(tmp_path: Path) -> None:
    data = torch.randn(16, 6), torch.arange(16) % 3
    for is_resumed in (False, True):
        trainer = trainer_of("loss")
        trainer.student.eval()
        result = trainer.fit(
            data,
            steps=2,
            batch_size=8,
            progress=False,
            say=str,
            out=tmp_path / "run",
            resume=is_resumed,
        )
        (warning,) = result.warnings
        assert warning.startswith("the student is in eval() as a whole")


def test_frozen_statistics_and_plain_networks_are_not_named() -> None:
    said: list[str] = []
    trainer = trainer_of("loss")
    evaluate_norm(trainer)
    trainer.student[2].p = 0.0
    trainer.tell_evaluation(said.append)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    metapl.LossTrainer(plain, optimizer=optimizer).tell_evaluation(said.append)
    assert said == []


class Foreign:
    """An object that remembers in a tensor, and has what no file has."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)
        self.lock = Lock()


class Holding(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)
        self.memory: Any = None


LOOP: dict[str, Any] = {}
LOOP["me"] = LOOP
UNUSUAL = {
    "a dict that holds itself": (LOOP, "it holds itself"),
    "an object with a tensor": (Foreign(), "lock"),
    "an array that is turned around": (numpy.arange(5)[::-1], ""),
    "an array of the other order of bytes": (numpy.arange(3.0).astype(">f8"), ""),
    "an array of long doubles": (numpy.zeros(3, numpy.longdouble), "ndarray"),
    "a tensor of complex doubles": (torch.full((3,), 1 + 2j, dtype=torch.complex128), ""),
    "a tensor without values": (torch.zeros(3, device="meta"), "a value in it"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_no_checkpoint_holds_ends_no_run_and_is_named(kind: str, tmp_path: Path) -> None:
    """What one can hold is as it was, bit for bit."""
    value, word = UNUSUAL[kind]
    network = Holding()
    network.memory = value
    trainer = metapl.LossTrainer(network, optimizer=torch.optim.SGD(network.parameters(), 0.1))
    fit_and_stop(trainer, tmp_path / "run")
    named = trainer.unsaved(trainer.state_dict())
    assert len(named) == (word != "")
    assert all("memory" in name and word in name for name in named)
    if not word:
        state = trainer.state_dict()
        network.memory = 0 * value
        trainer.load_state_dict(state)
        assert numpy.array_equal(network.memory, value)
