"""What recipes are made of: frozen configurations, validated when they are made."""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
import tyro
from torch import Tensor, nn

from metapl import feedback
from metapl.apps.networks import Architecture, parameter_groups
from metapl.apps.pictures.splits import Split
from metapl.apps.recipes.self_training import SelfTraining
from metapl.errors import FieldError, MetaplError
from metapl.metrics import chance_level
from metapl.problems import PseudoLabels
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import misfit_entries
from metapl.training import FitOptions, Say

SELECTED_ON = 50
"""The fewest validation examples to choose a student by: with 50, one standard error is 7 points."""

Role = Literal["teacher", "student"]

ROLES: tuple[Role, ...] = ("teacher", "student")

if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[feedback.MODES]  # what the command line offers

Asked = TypeVar("Asked")
Unasked = tyro.conf.Suppress[tyro.conf.Fixed[Asked]]
"""A field that is no flag of the commands that make the recipe."""


FIT_OPTIONS = tuple(field.name for field in dataclasses.fields(FitOptions) if field.name not in ("steps", "phase"))


MOST_STEPS = 10**9

MOST_IN_A_BATCH = 2**20
"""Greatest values of options beyond which a machine would be asked for more than any has."""


def require(recipe: object, condition: bool, field: str, expected: str) -> None:
    """Refuse a recipe whose ``field``, which may be one of a field, is not as ``expected``."""
    if not condition:
        value = operator.attrgetter(field)(recipe)
        text = f"{type(recipe).__name__}({field}={value!r}): expected {expected}."
        raise FieldError(text, field, value, expected)


def require_within(recipe: object, field: str, least: int, most: int) -> None:
    """Refuse a recipe whose ``field`` is less or more than that; None is neither."""
    value = getattr(recipe, field)
    require(recipe, value is None or value >= least, field, f"{least} or more")
    require(recipe, value is None or value <= most, field, f"{most:,} at most")


def require_finite(recipe: object) -> None:
    """Refuse a recipe with a field that is infinite or not a number."""
    for name in [each.name for each in dataclasses.fields(recipe)]:  # type: ignore[arg-type]  # a recipe, or a part
        value = getattr(recipe, name)
        require(recipe, not isinstance(value, float) or math.isfinite(value), name, "a finite number")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of ``torch.optim``.

    Args:
        algorithm: sgd is stochastic gradient descent; adamw is AdamW with decay rates 0.9 and 0.999.
        lr: base learning rate, which the schedule multiplies.
        momentum: momentum of sgd; 0 is none.
        nesterov: Nesterov's momentum instead of the usual one (sgd).
        weight_decay: weight of the L2 penalty; adamw shrinks the weights by it directly.
        decay_norms: apply weight decay to normalization layers and biases too.
    """

    algorithm: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_norms: bool = True

    def __post_init__(self) -> None:
        require_finite(self)
        require(self, self.lr > 0, "lr", "a number above 0")
        require(self, 0 <= self.momentum < 1, "momentum", "a number in [0, 1)")
        require(self, self.momentum > 0 or not self.nesterov, "momentum", "a number above 0 beside nesterov")
        require(self, self.weight_decay >= 0, "weight_decay", "a number of 0 or more")
        adaptive = self.algorithm == "adamw"
        require(self, not (adaptive and self.momentum), "momentum", "0 with adamw, which has its own")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over a module's parameters."""
        groups = parameter_groups(module, self.weight_decay, on_norms=self.decay_norms)
        if self.algorithm == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How the teacher learns from the student.

    Args:
        mode: how the gradient of the feedback is computed; see ``metapl.MODES``.
        labels: soft or hard pseudo-labels, if not what the mode needs.
        feedback_weight: weight of the feedback beside the teacher's own losses.
        normalization: what the feedback h is divided by, if not as in the mode: nothing (gradient), the learning rate,
            or ‖w‖‖g‖ (cosine).
        baseline: decay of a moving average to subtract from h (reinforce, loss_difference).
        temperature: temperature of the softmax that makes the pseudo-labels.
        pseudo_label_smoothing: label smoothing of the pseudo-labels in the student's loss.
    """

    mode: Mode = "forward"
    labels: Annotated[Literal["soft", "hard"] | None, tyro.conf.arg(name="pseudo-labels")] = None
    feedback_weight: float = 1.0
    normalization: Literal["gradient", "learning_rate", "cosine"] | None = None
    baseline: float | None = None
    temperature: float = 1.0
    pseudo_label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_finite(self)
        self.problem().for_modes(self.estimator().labels, self.mode)

    def estimator(self) -> feedback.Estimator:
        """The mode with the fields that are set."""
        plain = feedback.estimator(self.mode)
        fields: dict[str, Any] = {"baseline": self.baseline}
        cosine = self.normalization == "cosine" and isinstance(plain, feedback.Reinforce)
        fields |= {"similarity": "cosine"} if cosine else {"normalization": self.normalization}
        fields = {name: value for name, value in fields.items() if value is not None}
        known = {f.name for f in dataclasses.fields(plain)}  # type: ignore[arg-type]  # every registered mode is one
        for name in fields.keys() - known:
            raise MetaplError(f"mode '{self.mode}' has no {name}; leave {name} out, or take a mode that has it.")
        return dataclasses.replace(plain, **fields)  # type: ignore[type-var]  # as above

    def problem(self) -> PseudoLabels:
        """The pseudo-labels."""
        return PseudoLabels(kind=self.labels, temperature=self.temperature, label_smoothing=self.pseudo_label_smoothing)


@dataclass(frozen=True, eq=False)
class Doubtful:
    """Examples whose given labels may be wrong.

    Args:
        examples: :class:`~metapl.apps.pictures.batches.EvaluationBatches` of all of them, with their positions as
        labels. given: int64 (n,), their labels.
        names: n, such as their files.
    """

    examples: Any
    given: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Stored:
    """Class distributions that a teacher gave the examples of a task, in the order of these.

    Args:
        unlabeled: float32 (n, C), of the unlabeled examples.
        labeled: of the labeled ones; None where they are not known.
    """

    unlabeled: Tensor
    labeled: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a recipe trains on.

    Args:
        labeled, unlabeled: sources of batches, for ``fit``.
        finetuning: source of labeled batches for finetuning.
        validation, test: (inputs, labels), or batches of these; None where there are none.
        classes: names.
        everything: source of labeled batches of the labeled and the unlabeled examples with their true labels, for
            the headroom; None where these are not known.
        truth: (inputs, labels), or batches of these, of unlabeled examples whose labels are known, for looking at
            pseudo-labels only.
        sample: some unlabeled examples as they are, (inputs, anything) or batches of these, for the report.
        test_names: what the test examples are called, such as their files; None where they have no names.
        doubtful: examples whose labels may be wrong, for the list of suspects; None where labels are right or unknown.
        stored: labels of a teacher that was trained before; None where there are none.
        label: stores the labels that a network gives the examples; None where there is no place for them.
        rounds: label and select the unlabeled examples, see :mod:`metapl.apps.experiments.rounds`; None likewise.
        split: how the examples were divided, for the run folder's ``split.json``.
        skipped: files that are left out, each with the reason.
        record: what was found and how it was split, for the run folder's ``data.json``; its ``hash`` says of which
            data: a run is resumed on the same data only.
    """

    labeled: Any
    unlabeled: Any
    finetuning: Any
    classes: tuple[str, ...]
    record: Mapping[str, Any]
    validation: Any = None
    test: Any = None
    everything: Any = None
    truth: Any = None
    sample: Any = None
    test_names: tuple[str, ...] | None = None
    doubtful: Doubtful | None = None
    stored: Stored | None = None
    label: Callable[[nn.Module], Stored] | None = None
    rounds: Any = None
    split: Split | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def validation_size(self) -> int:
        """Number of validation examples."""
        return 0 if self.validation is None else len(self._validation_labels())

    @property
    def validation_chance(self) -> float | None:
        """What guessing reaches on the validation examples, see :func:`metapl.metrics.chance_level`; None without."""
        if not self.validation_size:
            return None
        return chance_level(torch.bincount(self._validation_labels(), minlength=len(self.classes)).tolist())

    def _validation_labels(self) -> Tensor:
        labels: Tensor = self.validation[1] if isinstance(self.validation, tuple) else self.validation.labels
        return labels


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A frozen configuration that can be run: data, networks, losses, optimizers, how long.

    Args:
        seed: random seed of the data split, the initial weights and everything that is drawn.
        steps: number of training steps.
        labeled_batch: labeled examples in a batch.
        unlabeled_batch: unlabeled examples in a batch.
        dropout: dropout rate of the networks.
        label_smoothing: label smoothing of the teacher's supervised loss.
        uda_weight: weight of the UDA loss; 0 leaves it out.
        uda_temperature: temperature of UDA's targets; a value below 1 sharpens them.
        uda_threshold: UDA leaves out examples whose greatest probability is not above this.
        feedback: how the teacher learns from the student.
        student: its optimizer.
        teacher: its optimizer.
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
        exact_every: steps between measurements of the cosine between the mode's gradient and the exact one; by default
            it is not measured.
        keep: number of checkpoints to keep.
        self_training: how Noisy Student goes from a teacher to its students.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    """Suffixes of the files that :meth:`read` finds in a folder."""
    batches_shared: ClassVar[tuple[str, ...]] = ("labeled_batch", "unlabeled_batch", "finetune_batch")
    """Fields, where there are such, with the sizes of batches that several processes share."""

    seed: int = 0
    steps: int = 600
    labeled_batch: int = 32
    unlabeled_batch: int = 64
    dropout: float = 0.0
    label_smoothing: float = 0.1
    uda_weight: float = 1.0
    uda_temperature: float = 0.7
    uda_threshold: float = 0.6
    feedback: Annotated[Feedback, tyro.conf.arg(name="")] = field(default_factory=Feedback)
    student: Optimizer = field(default_factory=Optimizer)
    teacher: Optimizer = field(default_factory=Optimizer)
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    warmup: int = 0
    ema_decay: float | None = None
    finetune_steps: int = 200
    finetune: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    validate_every: int = 100
    log_every: int = 20
    save_every: int = 500
    exact_every: int | None = None
    keep: int = 2
    self_training: Unasked[SelfTraining] = field(default_factory=SelfTraining)

    def __post_init__(self) -> None:
        require_finite(self)
        for name, most in (
            ("steps", MOST_STEPS),
            ("labeled_batch", MOST_IN_A_BATCH),
            ("unlabeled_batch", MOST_IN_A_BATCH),
        ):
            require_within(self, name, 1, most)
        require_within(self, "finetune_steps", 0, MOST_STEPS)
        require(self, 0 <= self.seed < 2**32, "seed", "0 to 2^32 - 1")
        require(self, 0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        require(self, 0 <= self.label_smoothing < 1, "label_smoothing", "a number in [0, 1)")
        require(self, self.uda_weight >= 0, "uda_weight", "0 or more")
        require(self, self.uda_temperature >= 0, "uda_temperature", "a number of 0 or more")
        require(self, 0 <= self.uda_threshold < 1, "uda_threshold", "a number in [0, 1)")
        self.teacher_losses(uda=True)
        if self.complete:
            FitOptions(steps=self.steps, **self.fit_options())

    @property
    def complete(self) -> bool:
        """Whether every field that decides the training has a value."""
        return True

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the network's outputs."""

    @abstractmethod
    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        """The data.

        Args:
            say: takes what a user should know of them.
            progress: show how far it is, where it takes long.
            log: where files are recorded that turn out to be unreadable later; see
            :class:`metapl.apps.pictures.FileImages`.
        """

    @abstractmethod
    def network(self, role: Role = "student") -> nn.Module:
        """The teacher or the student with fresh weights, from the default generator."""

    @abstractmethod
    def with_network(self, name: str) -> Self:
        """The recipe with another network.

        Args:
            name: as ``--networks`` of ``metapl noisy-student`` takes it.
        """

    def architecture(self) -> Architecture | None:
        """What builds the student without metapl's wrappers; None for a network that has no name."""
        return None

    @abstractmethod
    def read(self, path: Path) -> list[tuple[str, Tensor]]:
        """The examples in a user's file: where each stands, and the network's input for it.

        Raises:
            MetaplError: the file cannot be read; the message begins with its path.
        """

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an example."""

    @property
    @abstractmethod
    def input_note(self) -> str:
        """How the network's input is made of a file, in a sentence."""

    @property
    def own_method(self) -> str:
        """The method that trains it, unless another is asked for."""
        return "mpl"

    def by(self, method: str, seed: int) -> Self:
        """The recipe for a run of a comparison."""
        return dataclasses.replace(self, seed=seed)

    def decided_by_minutes(self) -> tuple[str, ...]:
        """Fields that follow from a time for training, by way of the number of steps."""
        return ()

    def settled(self) -> Recipe:
        """The recipe as it can be stored: whole paths, and the classes that are found."""
        return self

    def uda(self) -> UDA:
        """The consistency loss, whether or not the teacher has it; its weight is then 1."""
        return UDA(self.uda_temperature, self.uda_threshold, self.uda_weight or 1.0)

    def teacher_losses(self, uda: bool | None = None) -> tuple[TeacherLoss, ...]:
        """The teacher's own losses; ``uda`` overrides whether UDA is among them."""
        supervised = CrossEntropy(self.label_smoothing)
        wanted = self.uda_weight > 0 if uda is None else uda
        return (supervised, self.uda()) if wanted else (supervised,)

    def fit_options(self) -> dict[str, Any]:
        """Fields of :class:`metapl.training.FitOptions` but ``steps`` and ``phase``."""
        return {name: getattr(self, name) for name in FIT_OPTIONS if hasattr(self, name)}

    def finetune_options(self) -> dict[str, Any]:
        """Fields of :class:`metapl.training.FitOptions` in which finetuning differs from the rest."""
        return {}

    def trainer_options(self) -> dict[str, Any]:
        """Options of every trainer, finetuning included: clipping, micro-batches, precision, compilation."""
        return {}

    def feedback_options(self) -> dict[str, float]:
        """The option of :class:`metapl.BilevelTrainer` that sets the size of the feedback."""
        return {"feedback_weight": self.feedback.feedback_weight}

    def torch_device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu")


R = TypeVar("R")


def from_dict(kind: type[R], values: Mapping[str, Any]) -> R:
    """A recipe from the dictionary that :func:`dataclasses.asdict` made of it, by way of JSON.

    >>> from_dict(Optimizer, {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}).momentum
    0.9
    """
    hints = _hints(kind)
    if not isinstance(values, Mapping):
        raise MetaplError(f"{kind.__name__} is stored as {values!r:.60}; expected an object.")
    unknown = values.keys() - hints.keys()
    if unknown:
        raise MetaplError(f"{kind.__name__} has no {', '.join(sorted(unknown))}; the run is of another version.")
    fault = misfit_entries(values, hints, kind.__name__)
    if fault is not None:
        raise MetaplError(f"{fault}.")
    built = {name: _rebuilt(hints[name], value) for name, value in values.items()}
    return kind(**built)


def _hints(kind: type) -> dict[str, Any]:
    return {f.name: hint for f in dataclasses.fields(kind) if (hint := typing.get_type_hints(kind)[f.name])}


def _rebuilt(hint: Any, value: Any) -> Any:
    parts = (hint, *typing.get_args(hint))  # a dataclass, or one that may be left out
    kind = next((part for part in parts if dataclasses.is_dataclass(part) and isinstance(part, type)), None)
    if kind is not None and value is not None:
        return from_dict(kind, value)
    return tuple(value) if isinstance(value, list) else value
