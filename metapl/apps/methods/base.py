"""What a method of the command is, and what it trains with.

To add a method, write its type in a file beside this one, and enter it by its name in the METHODS
of what it is to train: metapl.apps.images, say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from metapl.apps.data import Data
from metapl.apps.settings import Fitting, Role
from metapl.networks.card import Input, NetworkCard
from metapl.problems.losses import TeacherLoss
from metapl.runs.fields import check_fields
from metapl.training import FitResult, Say, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

Losses = tuple[TeacherLoss, ...]


class TrainingConfig(Protocol):
    """What is trained on, by which networks and optimizers, and how long.

    :class:`metapl.apps.images.Images` and :class:`metapl.apps.digits.Digits` are such: frozen
    dataclasses, whose fields are flags.
    """

    # What the recipe is called.
    name: ClassVar[str]

    @property
    def places(self) -> tuple[str, ...]:
        """Return the names of the fields that are folders."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, empty until they were found."""

    @property
    def threads(self) -> int | None:
        """Return the threads of the linear algebra; None: those of the process."""

    @property
    def input(self) -> Input:
        """Return what a network takes."""

    @property
    def has_frozen_layers(self) -> bool:
        """Return whether parts of the networks are not trained."""

    @property
    def fitting(self) -> Fitting:
        """Return how long, how fast and in what batches is trained."""

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        """Return the data; files that cannot be read later are listed in ``log``."""

    def network(self) -> nn.Module:
        """Build a network with fresh or pretrained weights."""

    def card(self, title: str) -> NetworkCard:
        """Describe the network for network.json."""

    def optimizer(
        self, role: Role, module: nn.Module, lr: float | None = None
    ) -> torch.optim.Optimizer:
        """Build the optimizer of a teacher, or of a student, with its rate ``lr`` or the usual."""

    def finetuner(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that finetunes."""

    def trainer_options(self) -> dict[str, Any]:
        """Return the options of every trainer."""

    def finetuning(self) -> dict[str, Any]:
        """Return the options of the fit that finetunes."""

    def scan(self, name: str) -> Any:
        """Return the files of a folder by the name of its flag; refuse data that are no files."""

    def with_network(self, name: str) -> Self:
        """Return the settings with another network."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a method ended with.

    Args:
        trainer: of the network that is kept.
        result: of the fit of that network.
        teacher: a network that is kept beside it, with its weights.
        fallback: a network that is kept where the student is far behind, with its weights.
        finetunes: whether the student is finetuned as usual.
        rounds: what result.json says of the rounds of a method that has them.
        configs: settings of kept networks that are not those of the training.
    """

    trainer: Trainer
    result: FitResult
    teacher: tuple[nn.Module, Mapping[str, Tensor]] | None = None
    fallback: tuple[nn.Module, Mapping[str, Tensor]] | None = None
    finetunes: bool = True
    rounds: list[dict[str, Any]] | None = None
    configs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Training:
    """What a method trains, on what, and how a phase of it is run.

    Args:
        config: the settings of the training.
        data: the data.
        teacher, student: networks with fresh weights, on their device, laid out over the processes
            that train together.
        fit: ``fit(trainer, labeled, unlabeled, **options)`` runs one phase, which goes on where it
            was stopped.
        label: ``label(network)`` returns class distributions of the unlabeled and of the labeled
            examples by a network, which the run stores, float32 (n, C) by "unlabeled" and
            "labeled".
        read_labels: ``read_labels(stores)`` returns the same from stores that were made before, of
            those of the two that are named.
        lay_out: lay a network out over the processes that train together.
        folder: the run's folder, for a method that stores more; None where a step is timed.
        progress: show bars.
        say: where messages go.
    """

    config: TrainingConfig
    data: Data
    teacher: nn.Module
    student: nn.Module
    fit: Callable[..., FitResult]
    label: Callable[[nn.Module], dict[str, Tensor]]
    read_labels: Callable[[Mapping[str, str]], dict[str, Tensor]]
    lay_out: Callable[[nn.Module], nn.Module] = lambda network: network
    folder: Any = None
    progress: bool = False
    say: Say = lambda text: None

    @property
    def place(self) -> torch.device:
        """Return the device of the networks."""
        return next(self.student.parameters()).device

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of every trainer."""
        return self.config.trainer_options()

    def alone(self, network: nn.Module, losses: Losses, **options: Any) -> Trained:
        """Train a network by itself, by losses on labeled examples.

        Unlabeled examples are drawn too where there is a second loss, which reads them.
        """
        trainer = LossTrainer(
            network, losses, optimizer=self.config.optimizer("teacher", network), **self.options
        )
        unlabeled = self.data.unlabeled if len(losses) > 1 else None
        return Trained(trainer, self.fit(trainer, self.data.labeled, unlabeled, **options))

    def bilevel(
        self, teacher: nn.Module, mode: Any, problem: Any, **options: Any
    ) -> BilevelTrainer:
        """Build the trainer of the student beside a teacher.

        It is not verified: the tests verify these problems.

        Args:
            teacher: the network that learns by feedback.
            mode: how the feedback is found.
            problem: what the teacher says about examples, and the two losses.
            options: of the trainer; and ``student_lr``, the student's learning rate.
        """
        student_lr = options.pop("student_lr", None)
        inner = self.config.optimizer("student", self.student, student_lr)
        return BilevelTrainer(
            teacher,
            self.student,
            mode,
            verify=False,
            problem=problem,
            inner_optimizer=inner,
            outer_optimizer=self.config.optimizer("teacher", teacher),
            **{**self.options, **options},
        )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, whose fields are flags.

    It says itself what it needs, how its run is planned, and what is told of it, so that nobody
    else asks which method it is.
    """

    # Whether the network that is kept is the student of a teacher.
    has_teacher: ClassVar[bool] = True

    # Whether no unlabeled example is learned.
    learns_labels_alone: ClassVar[bool] = False

    # Whether the last network that was trained is delivered unless another one is far ahead of it.
    # Otherwise the best one by validation is.
    delivers_last: ClassVar[bool] = False

    # The optional packages that it needs, by the names that they are imported by.
    packages: ClassVar[tuple[str, ...]] = ()

    # What is told at the end of a run.
    advice: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """Return what the method is called in commands and files."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Return what the method is called in a sentence."""
        raise NotImplementedError

    @property
    def named_networks(self) -> tuple[str, ...]:
        """Return the networks that it trains one after another; empty: the usual one."""
        return ()

    @property
    def trainings(self) -> int:
        """Return how many networks are trained for --steps, one after another."""
        return 1

    @property
    def finetunes(self) -> bool:
        """Return whether a network is trained on labeled examples alone at the end."""
        return True

    @property
    def descriptions(self) -> Mapping[str, Path]:
        """Return the files that describe what it reads beside the data, by what they are of."""
        return {}

    def check(self, config: TrainingConfig) -> None:
        """Refuse what it is to read beside the data, where that is of other data."""

    def check_chosen(self, config: TrainingConfig) -> None:
        """Refuse settings that do not go with it, once all of them are chosen."""

    def scheduled(self, steps: int) -> Self:
        """Return the method with a value for every field that is a share of the steps.

        Values that do not go with this number of steps are refused.
        """
        return self

    def planned(self, fitting: Fitting) -> str:
        """Return in words how many steps the run takes."""
        text = f"{fitting.chosen_steps:,} steps"
        if self.trainings > 1:
            text += f" of each of {self.trainings} networks"
        if self.finetunes and fitting.chosen_finetuning:
            text += f", then {fitting.chosen_finetuning:,} of finetuning"
        return text

    def train(self, t: Training) -> Trained:
        """Go through the phases of the method."""
        raise NotImplementedError
