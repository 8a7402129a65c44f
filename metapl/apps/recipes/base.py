"""What recipes are made of: frozen configurations, validated when they are made, and the methods that train them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
import tyro
from torch import Tensor, nn

from metapl.apps.machine.misfit import from_dict, hints_of
from metapl.apps.pictures.card import NetworkCard
from metapl.apps.pictures.input import Input
from metapl.apps.recipes.settings import Batch, Optimizer, SelfTraining, Share, Softness, SomeSteps, Steps
from metapl.errors import MetaplError
from metapl.metrics import chance_level
from metapl.runs.fields import Range, check_fields
from metapl.training import FitOptions, FitResult, Say, Trainer

SELECTED_ON = 50  # the fewest validation examples to choose a student by: one standard error is 7 points then

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")

SEEDS = tyro.conf.create_mutex_group(required=False)  # flags that say which seeds, of which one is given

Asked = TypeVar("Asked")
Unasked = tyro.conf.Suppress[tyro.conf.Fixed[Asked]]  # a field that is no flag of the commands that make the recipe


FIT_OPTIONS = tuple(each.name for each in dataclasses.fields(FitOptions) if each.name not in ("steps", "phase"))


@dataclass(frozen=True, eq=False)
class Doubtful:
    """Examples whose given labels may be wrong."""

    examples: Any  # EvaluationBatches of all of them, with their positions as labels
    given: Tensor  # int64 (n,), their labels
    names: tuple[str, ...]  # such as their files


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a recipe trains on. Examples to look at are (inputs, labels), or batches of these."""

    labeled: Any  # sources of batches, for fit
    unlabeled: Any
    finetuning: Any  # a source of labeled batches
    classes: tuple[str, ...]  # names
    record: Mapping[str, Any]  # for the run folder's data.json; a run is resumed on data of the same "hash" only
    validation: Any = None
    test: Any = None
    everything: Any = None  # labeled batches of all examples with their true labels, for the headroom
    truth: Any = None  # unlabeled examples whose labels are known, for looking at pseudo-labels only
    test_names: tuple[str, ...] | None = None  # such as files
    doubtful: Doubtful | None = None  # for the list of suspects
    skipped: Mapping[str, str] = field(default_factory=dict)  # files that are left out, each with the reason

    @property
    def validation_size(self) -> int:
        return len(self._validation_labels())

    @property
    def validation_chance(self) -> float | None:
        """What guessing reaches on the validation examples, see :func:`metapl.metrics.chance_level`; None without."""
        labels = self._validation_labels()
        return chance_level(torch.bincount(labels, minlength=len(self.classes)).tolist()) if len(labels) else None

    def _validation_labels(self) -> Any:
        return getattr(self.validation, "labels", self.validation[1] if isinstance(self.validation, tuple) else ())


# ------------------------------------------------------------------------------------------------- a run of a method


@dataclass(frozen=True, eq=False)
class Phase:
    """A fit, as a part of a training."""

    trainer: Trainer
    labeled: Any  # sources of batches
    unlabeled: Any
    task: Task  # its validation and truth are looked at
    name: str = "fit"  # in files
    options: Mapping[str, Any] = field(default_factory=dict)  # of the fit, in the place of the recipe's


# One phase after another; each is fitted before the next one is asked for, and what it ended with is sent back.
Phases = Generator[Phase, FitResult, None]

# Fits a trainer to sources of batches, as metapl.apps.experiments.experiment.Experiment.fit does.
Fit = Callable[..., FitResult]

# Class distributions, float32 (n, C), that a teacher gave the "unlabeled" examples of a task, and the "labeled" ones
# where these are known.
Stored = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Unlabeled examples that were selected, with their labels."""

    positions: Tensor  # int64 (n,), their numbers among all unlabeled examples, each as often as it counts
    rows: Tensor  # int64 (n,), the row of each in the store
    classes: int  # how many
    store: Any = None  # of their labels; None: all labels are even

    def labels(self, rows: Tensor) -> Tensor:
        """The distributions of rows of the store, float32 (B, C)."""
        found: Tensor = _even(len(rows), self.classes) if self.store is None else self.store.at(rows)
        return found

    def of(self, images: Any) -> Any:
        """The selected ones of all unlabeled examples."""
        return picked(images, self.positions)


def picked(images: Any, positions: Tensor) -> Any:
    return images[positions] if isinstance(images, Tensor) else images.select(positions)


def _even(count: int, classes: int) -> Tensor:
    return torch.full((count, classes), 1 / classes)


@dataclass(eq=False)
class Run:
    """What a method trains in; this one is a rehearsal: nothing is stored, labels are even, all examples are selected.

    Its networks have fresh weights, and are laid out over the processes that train together.
    """

    recipe: Recipe
    task: Task
    teacher: nn.Module
    student: nn.Module

    def train(self, fit: Fit) -> tuple[Trainer, FitResult]:
        """Go through the phases of the method: the trainer of the network that is kept, and what its fit ended with."""
        phases = self.recipe.method.phases(self)
        phase = next(phases)
        while True:
            result = fit(phase.trainer, phase.labeled, phase.unlabeled, phase.task, phase=phase.name, **phase.options)
            trainer = phase.trainer
            try:
                phase = phases.send(result)
            except StopIteration:
                return trainer, result

    def beside(self, teacher: nn.Module, reads_inputs: bool) -> nn.Module:
        """Another teacher than the given one, laid out."""
        return teacher

    def laid_out(self, network: nn.Module) -> nn.Module:
        """Another network, over the processes that train together."""
        return network

    def seed(self, seed: int) -> None:
        """Seed the default generators, as for the given networks."""
        torch.manual_seed(seed)

    def labels_given(self) -> Stored | None:
        """The labels that a user gave; None where a teacher is to be trained first."""
        return self.label(self.teacher) if any(self.recipe.method.labels_from.values()) else None

    def label(self, teacher: nn.Module) -> Stored:
        """Store and give the labels of the examples by a network."""
        parts = {"unlabeled": self.task.unlabeled, "labeled": self.task.labeled}
        return {name: _even(len(source.images), len(self.task.classes)) for name, source in parts.items()}

    def select(self, number: int, teacher: nn.Module) -> Chosen:
        """Store the labels of the unlabeled examples by the network of the round before, and select from them."""
        every = torch.arange(len(self.task.unlabeled.images))
        return Chosen(every, every, len(self.task.classes))

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        """Keep what the network of a round reaches."""


def rehearse(recipe: Recipe, task: Task, fit: Fit, device: torch.device | None = None) -> nn.Module:
    """The student after a recipe's phases with even labels, by ``fit`` in the place of each fit; no generator moves."""
    with torch.random.fork_rng(devices=[] if device is None else None):
        run = Run(recipe, task, *(recipe.network(role).to(device) for role in ROLES))
        run.train(fit)
    return run.student


# --------------------------------------------------------------------------------------------------------- the methods

Place = Literal["compared", "control", "headroom"] | None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train a recipe: a type with its own fields, which are flags, and the phases that it goes through.

    What a type says of itself stands in keywords of its class, or in its body.
    """

    name: ClassVar[str]  # in commands and files
    title: ClassVar[str]  # in words
    # In a comparison: compared by default, a control of the feedback, or the headroom, which trains on the true labels
    # of all examples; None: only if it is named.
    place: ClassVar[Place] = None
    control: ClassVar[str | None] = None  # the method that it is tested against
    delivers: ClassVar[Literal["student", "finetuned"]] = "finetuned"  # where validation cannot tell networks apart
    networks: ClassVar[Mapping[str, str]] = {
        "student": "student",
        "finetuned": "finetuned student",
        "teacher": "teacher",
    }
    one_network: ClassVar[bool] = False  # neither teacher nor student, but a network that is trained by itself
    built_as: ClassVar[Role] = "student"  # which of the recipe's two networks the trained one is built as
    teaches: ClassVar[bool] = False  # a teacher learns beside the student
    reduced: ClassVar[bool] = False  # a small network adjusts stored labels
    doubting: ClassVar[bool] = False  # given labels may be wrong
    is_noisy_student: ClassVar[bool] = False  # students learn from stored labels one after another
    indexed: ClassVar[bool] = False  # its batches say which examples they have
    idle: ClassVar[tuple[str, ...]] = ()  # fields of recipes that it has no use for

    def __init_subclass__(cls, **said: Any) -> None:
        super().__init_subclass__()
        for name, value in said.items():
            setattr(cls, name, value)

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def phases(self, run: Run) -> Phases:
        """The fits, the last of which ends with the network that is kept."""

    @property
    def selection(self) -> SelfTraining | None:
        """How stored labels decide which unlabeled examples are learned from, where they do."""
        found: SelfTraining | None = getattr(self, "self_training", None)
        return found

    @property
    def kept(self) -> tuple[str, ...]:
        """The networks of a run, by their names in files."""
        return ("student", "teacher", "finetuned") if self.teaches else ("student", "finetuned")

    @property
    def labels_from(self) -> Mapping[str, str | None]:
        """Where the labels of a teacher come from that a user gave: a run, and stores of labels."""
        return {}

    @classmethod
    def hidden(cls, words: Sequence[str]) -> tuple[str, ...]:
        """Fields of recipes that are no flags beside it, and beside other words of the command."""
        return cls.idle

    @classmethod
    def delivered(cls, accuracies: Mapping[str, float | None], select: bool) -> str:
        """The network that a run delivers: the best by validation, the first of equals, where that can ``select``.

        Otherwise it is what the method delivers, which did better on the seen half of benchmarks/pictures.
        """
        return max(accuracies, key=lambda name: accuracies[name] or 0.0) if select else cls.delivers

    def optimizers(self) -> dict[str, Optimizer]:
        return {role: getattr(self, role) for role in ROLES if hasattr(self, role)}

    def options(self, recipe: Recipe) -> dict[str, Any]:
        """Options of the main phase in which it differs from the recipe's."""
        return {}

    def check(self, recipe: Recipe) -> None:  # noqa: B027  # most have none that do not
        """Refuse fields that do not go with the recipe; nothing is read."""

    def check_networks(self, recipe: Recipe) -> None:  # noqa: B027  # likewise
        """Refuse networks that do not go together; they are built without weights."""

    def whole(self) -> Self:
        return self

    def settled(self, values: Mapping[str, Any]) -> Self:
        """With these values for fields that were left open."""
        known = {each.name for each in dataclasses.fields(self)} & values.keys()
        missing: dict[str, Any] = {name: values[name] for name in known if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def for_rate(self, rate: float) -> Self:
        """With this learning rate of the networks, where none was given."""
        return dataclasses.replace(self, **{name: one.with_rate(rate) for name, one in self.optimizers().items()})

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From the fields of another method, or of a recipe's defaults, as far as it has such fields."""
        hints = hints_of(cls)
        known = {each.name for each in dataclasses.fields(cls)} & values.keys()
        return cls(**{name: _narrowed(values[name], hints[name]) for name in known})


M = TypeVar("M", bound=Method)


def variant(kind: type[M], module: str, made: str, name: str, title: str, **said: Any) -> type[M]:
    """A method that differs from another only in what its type says; a worker finds it in ``module`` as ``made``."""
    about = {"name": name, "title": title, "control": None, "__doc__": f"{title}.", "__module__": module, **said}
    return type(made, (kind,), about)


def _narrowed(value: Any, hint: Any) -> Any:
    """How a teacher labels, with feedback or without, as another method has it."""
    if not isinstance(value, Softness) or type(value) is hint:
        return value
    return hint(**{f.name: getattr(value, f.name) for f in dataclasses.fields(hint) if hasattr(value, f.name)})


# --------------------------------------------------------------------------------------------------------- the recipes

if TYPE_CHECKING:
    OwnMethod = Method
else:
    OwnMethod = Unasked[Any]


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A frozen configuration that can be run: data, networks, losses, optimizers, how long.

    Args:
        seed: random seed of the data split, the initial weights and everything that is drawn.
        steps: number of training steps.
        labeled_batch: labeled examples in a batch.
        unlabeled_batch: unlabeled examples in a batch.
        dropout: dropout rate of the networks.
        schedule: how both learning rates change over the steps: to 0 (cosine), not at all (constant), or by 0.97 for
            every 145th part of the steps, as in Noisy Student (exponential).
        warmup: steps over which both learning rates grow from 0.
        ema_decay: decay of the moving average of the weights. The average is what is kept; with None, the weights
            themselves are.
        finetune_steps: steps of finetuning on the labeled examples, after training.
        finetune: its optimizer.
        validate_every: steps between validations.
        log_every: steps between rows in metrics.jsonl.
        save_every: steps between checkpoints.
        keep: number of checkpoints to keep.
        method: how it is trained; by default the recipe's own method with the recipe's settings of it.
    """

    name: ClassVar[str]
    batches_shared: ClassVar[tuple[str, ...]] = ("labeled_batch", "unlabeled_batch", "finetune_batch")
    known: ClassVar[Mapping[str, type[Method]]]  # the methods that it can be trained by
    own: ClassVar[str] = "mpl"  # the method that trains it, unless another is asked for
    settings: ClassVar[Mapping[str, Any]] = {}  # fields of methods in which its defaults differ from theirs
    looks: ClassVar[bool] = False  # whether what is left open is chosen by looking at pictures

    seed: Annotated[int, Range(0, most=2**32 - 1), SEEDS] = 0
    steps: Steps = 600
    labeled_batch: Batch = 32
    unlabeled_batch: Batch = 64
    dropout: Share = 0.0
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    warmup: int = 0
    ema_decay: float | None = None
    finetune_steps: SomeSteps = 200
    finetune: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    validate_every: int = 100
    log_every: int = 20
    save_every: int = 500
    keep: int = 2
    method: OwnMethod = None  # type: ignore[assignment]  # a name, or none, stands for one

    def __post_init__(self) -> None:
        given: Any = self.method
        if not isinstance(given, Method):
            object.__setattr__(self, "method", self.by_name(given or self.own))
        check_fields(self)
        self.method.check(self)
        if self.complete:
            asked = self.fit_options() | self.method.options(self)
            FitOptions(steps=self.steps, **{k: v for k, v in asked.items() if k in FIT_OPTIONS})

    @classmethod
    def by_name(cls, name: str) -> Method:
        """A method with the recipe's defaults."""
        if name not in cls.known:
            raise MetaplError(f"{cls.name} cannot be trained by {name!r}; expected one of {', '.join(cls.known)}.")
        return cls.known[name].of(cls.settings)

    def by(self, method: str, seed: int | None = None) -> Self:
        """The recipe by a method, which takes the fields that it has in common with the recipe's own."""
        own = {each.name: getattr(self.method, each.name) for each in dataclasses.fields(self.method)}
        kind = self.known[method]
        made = self.method if type(self.method) is kind else kind.of({**self.settings, **own})
        return dataclasses.replace(self, method=made, seed=self.seed if seed is None else seed)

    @classmethod
    def rivals(cls, own: str) -> tuple[str, ...]:
        return tuple(name for name, method in cls.known.items() if method.place == "compared" and name != own)

    @classmethod
    def controls(cls, own: str) -> tuple[str, ...]:
        """Methods with altered feedback that a method is compared with, where that is asked for."""
        return tuple(name for name, method in cls.known.items() if method.place == "control")

    def with_method(self, **fields: Any) -> Self:
        return dataclasses.replace(self, method=dataclasses.replace(self.method, **fields))

    @property
    def complete(self) -> bool:
        """Whether every field that decides the training has a value."""
        return True

    def settled(self) -> Recipe:
        """The recipe as it can be stored: whole paths, and the classes that are found."""
        return self

    # ------------------------------------------------------------------------------------------------------ its data

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the network's outputs."""

    @property
    @abstractmethod
    def input(self) -> Input:
        """How a file becomes the network's input."""

    @abstractmethod
    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        """The data; ``log`` lists files that turn out to be unreadable later, as :class:`FileImages` does."""

    # -------------------------------------------------------------------------------------------------- its networks

    @abstractmethod
    def network(self, role: Role = "student") -> nn.Module:
        """The teacher or the student with fresh weights, from the default generator."""

    @abstractmethod
    def with_network(self, name: str) -> Self:
        """The recipe with another network, by its name as in ``--networks`` of ``metapl noisy-student``."""

    def at_size(self, size: int) -> Self:
        """The recipe with larger pictures; refused where the network is built for one size."""
        raise MetaplError(f"--finetune-size {size}: the pictures of {self.name} have one size; leave it out.")

    @abstractmethod
    def card(self, role: Role, title: str) -> NetworkCard:
        """What ``network.json`` says of the teacher or the student, which messages call ``title``."""

    # -------------------------------------------------------------------------------------------------- its training

    def decided_by_minutes(self) -> tuple[str, ...]:
        """Fields that follow from a time for training, by way of the number of steps."""
        return ()

    def fit_options(self) -> dict[str, Any]:
        """Fields of :class:`metapl.training.FitOptions` but ``steps`` and ``phase``."""
        return {name: getattr(self, name) for name in FIT_OPTIONS if hasattr(self, name)}

    def warmup_after(self, wait: int) -> int:
        """The steps of warming up where a student waits first."""
        return self.warmup

    def finetune_options(self) -> dict[str, Any]:
        """Fields of :class:`metapl.training.FitOptions` in which finetuning differs from the rest."""
        steps = self.finetune_steps
        return {"steps": steps, "ema_decay": None, "warmup": 0, "validate_every": max(1, steps // 10)}

    def trainer_options(self) -> dict[str, Any]:
        """Options of every trainer, finetuning included: clipping, micro-batches, precision, compilation."""
        return {}

    def torch_device(self) -> torch.device:
        return torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------- on disk


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe and of its method by the names that they have on the command line, as plain values."""
    fields = dataclasses.asdict(recipe)
    of_method: dict[str, Any] = fields.pop("method")
    return {**fields, **of_method}


def recipe_from_dict(kind: type[Recipe], method: str, values: Mapping[str, Any]) -> Recipe:
    """A recipe from what :func:`as_dict` made of it, by way of JSON."""
    usual = kind.by_name(method)
    names = {each.name for each in dataclasses.fields(usual)}
    if missing := names - values.keys():
        raise MetaplError(f"{kind.__name__} by {method} has no value for {', '.join(sorted(missing))}.")
    # An optimizer is one of those that this recipe has.
    kinds = {name: type(one) for name in names if dataclasses.is_dataclass(one := getattr(usual, name))}
    made = from_dict(type(usual), {name: values[name] for name in names}, kinds)
    return from_dict(kind, {name: value for name, value in values.items() if name not in names}, method=made)
