"""Networks, batches and trainers of tiny fits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

import metapl
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training import FitResult, Trainer
from metapl.training.loss_trainer import LossTrainer

Inner = Callable[[nn.Module], Any]


def network(dropout: float = 0.3) -> nn.Module:
    """Return a network with all that has a state: batch statistics, dropout masks."""
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
    )


def batches(number: int, seed: int = 0, rows: int = 6) -> tuple[list[Any], list[Tensor]]:
    """Return labelled and unlabelled batches."""
    draw = torch.Generator().manual_seed(seed)
    labeled = [
        (torch.randn(rows, 5, generator=draw), torch.randint(0, 3, (rows,), generator=draw))
        for _ in range(number)
    ]
    return labeled, [torch.randn(rows + 2, 5, generator=draw) for _ in range(number)]


def examples(number: int = 60) -> tuple[Tensor, Tensor]:
    """Return examples of three classes that a linear map tells apart, almost."""
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(number, 5, generator=draw)
    return x, (x[:, :3] + 0.3 * torch.randn(number, 3, generator=draw)).argmax(1)


VALIDATION = examples()


SGD: Inner = lambda student: torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)  # noqa: E731


def bilevel(
    mode: Any = "forward", seed: int = 0, inner: Inner = SGD, **options: Any
) -> metapl.BilevelTrainer:
    torch.manual_seed(seed)
    teacher = network()
    student = network()
    outer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    return metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=inner(student),
        outer_optimizer=outer,
        **{"verify": False, **options},
    )


def single(lr: float = 0.1, seed: int = 0, dropout: float = 0.3, **options: Any) -> LossTrainer:
    torch.manual_seed(seed)
    model = network(dropout)
    return LossTrainer(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **options
    )


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def rows(folder: Path, phase: str = "fit") -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["phase"] == phase]


class Counting(list[Any]):
    """Batches that act when the batch of this number is taken."""

    def __init__(self, items: list[Any], number: int, act: Callable[[], None]) -> None:
        super().__init__(items)
        self.taken = 0
        self.number = number
        self.act = act

    def __getitem__(self, place: Any) -> Any:
        self.taken += 1
        if self.taken == self.number:
            self.act()
        return super().__getitem__(place)


INNER: dict[str, Inner] = {
    "sgd": SGD,
    "adamw": lambda student: torch.optim.AdamW(student.parameters(), lr=0.01),
    "torchopt_momentum": lambda _: torchopt.sgd(0.1, momentum=0.9),
    "torchopt_adam": lambda _: torchopt.adam(0.01),
}


OPTIONS: dict[str, Any] = {
    "validation": VALIDATION,
    "validate_every": 4,
    "log_every": 3,
    "save_every": 5,
    "warmup": 2,
    "ema_decay": 0.9,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Set one thread, since rounding depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def end_of(trainer: Trainer, result: FitResult, folder: Path) -> Any:
    """Return all that a fit leaves."""
    newest = CheckpointFolder(folder / "checkpoints/fit").newest()
    assert newest is not None
    return (
        result.weights,
        result.step,
        result.validation_accuracy,
        newest.state,
        (folder / "metrics.jsonl").read_bytes(),
    )
