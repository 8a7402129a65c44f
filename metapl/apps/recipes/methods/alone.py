"""One network that is trained by itself: on labeled examples, or by consistency too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from torch import nn

from metapl.apps.recipes.base import Method, Phase, Phases, Recipe, Run, Task
from metapl.apps.recipes.settings import Optimizer, Share, SomeSteps, Weight
from metapl.errors import MetaplError
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import Range
from metapl.training.loss_trainer import LossTrainer

Losses = tuple[TeacherLoss, ...]

ONE = {"student": "network", "finetuned": "finetuned network", "teacher": "teacher"}

FIXMATCH_THRESHOLD = 0.85  # published is 0.95 (arXiv:2001.07685); with few steps this reached more (docs/pictures.md)
USUAL_SMOOTHING = 0.1  # of the baseline by label smoothing, where the recipe smooths nothing
ON_LABELED = ("unlabeled_batch",)  # what methods have no use for that learn from labeled examples alone


def alone(recipe: Recipe, task: Task, network: nn.Module, optimizer: Optimizer, losses: Losses, **phase: Any) -> Phase:
    trainer = LossTrainer(network, losses, optimizer=optimizer.build(network), **recipe.trainer_options())
    unlabeled = task.unlabeled if any(isinstance(term, UDA) for term in losses) else None
    return Phase(**{"trainer": trainer, "labeled": task.labeled, "unlabeled": unlabeled, "task": task} | phase)


@dataclass(frozen=True, kw_only=True)
class Smoothed(Method):
    """A supervised loss whose labels are smoothed.

    Args:
        label_smoothing: label smoothing of the supervised loss.
    """

    label_smoothing: Share = 0.1

    def supervised(self) -> Losses:
        return (CrossEntropy(self.label_smoothing),)


@dataclass(frozen=True, kw_only=True)
class Alone(Method):
    """One network.

    Args:
        teacher: its optimizer.
    """

    networks: ClassVar[Mapping[str, str]] = ONE
    one_network: ClassVar[bool] = True
    built_as = "teacher"

    teacher: Optimizer = field(default_factory=Optimizer)

    @abstractmethod
    def losses(self) -> Losses:
        """What it learns from."""

    def phases(self, run: Run) -> Phases:
        yield alone(run.recipe, run.task, run.teacher, self.teacher, self.losses())


class Supervised(Alone, name="supervised", title="supervised, labeled data only", place="compared", idle=ON_LABELED):
    """The labeled examples alone."""

    def losses(self) -> Losses:
        return (CrossEntropy(),)


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Smoothed, Alone, name="label_smoothing", title="supervised with label smoothing", idle=ON_LABELED):
    """The labeled examples alone, their labels smoothed, by 0.1 where label_smoothing is 0."""

    def losses(self) -> Losses:
        return (CrossEntropy(self.label_smoothing or USUAL_SMOOTHING),)


@dataclass(frozen=True, kw_only=True)
class Everything(
    Smoothed,
    Alone,
    name="supervised_everything",
    title="supervised with all true labels (headroom)",
    place="headroom",
    delivers="student",
    idle=ON_LABELED,
):
    """All examples with their true labels."""

    def losses(self) -> Losses:
        return self.supervised()

    def phases(self, run: Run) -> Phases:
        recipe, task = run.recipe, run.task
        if task.everything is None:
            raise MetaplError(
                f"{self.name} trains on the true labels of all examples, and the recipe {recipe.name} does not know "
                "those of the unlabeled ones; leave it out of --methods."
            )
        yield alone(recipe, task, run.teacher, self.teacher, self.losses(), labeled=task.everything)


@dataclass(frozen=True, kw_only=True)
class Consistent(Smoothed):
    """Consistency of the predictions on two views, beside the supervised loss.

    Args:
        label_smoothing: label smoothing of the supervised loss of the teacher, or of the one network.
        uda_weight: weight of the UDA loss.
        uda_start: steps on the labeled examples alone, before UDA begins; these are fast.
        uda_ramp: steps over which the weight of UDA then grows from 0.
    """

    uda_weight: Weight = 1.0
    uda_start: SomeSteps | None = 0
    uda_ramp: SomeSteps | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.uda()

    def uda(self, **fields: Any) -> UDA:
        """The consistency loss, of weight 1 where the field is 0."""
        return UDA(weight=self.uda_weight or 1.0, ramp=self.uda_ramp or 0, start=self.uda_start or 0, **fields)


@dataclass(frozen=True, kw_only=True)
class WithUda(Consistent):
    """UDA with targets of its own.

    Args:
        uda_temperature: temperature of UDA's targets; a value below 1 sharpens them.
        uda_threshold: UDA leaves out examples whose greatest probability is not above this.
        uda_align: how far UDA moves the shares of its labels over the classes towards uda_prior: 0 leaves them as the
            network has them, 1 moves them all the way.
        uda_prior: share of each class, in the order of the classes; by default equal ones, and of your own pictures
            the shares in --labeled, with one picture more in each class.
    """

    uda_temperature: Weight = 0.7
    uda_threshold: Share = 0.6
    uda_align: Annotated[float, Range(0, most=1)] = 0.0
    uda_prior: tuple[float, ...] | None = None

    def uda(self, **fields: Any) -> UDA:
        given = {"temperature": self.uda_temperature, "threshold": self.uda_threshold, "align": self.uda_align}
        return super().uda(**{**given, "prior": self.uda_prior, **fields})


@dataclass(frozen=True, kw_only=True)
class ByUda(WithUda, Alone, name="uda", title="UDA alone", place="compared"):
    """One network, on the labeled examples and on its own labels of examples that it is sure of."""

    def losses(self) -> Losses:
        return (*self.supervised(), self.uda())


@dataclass(frozen=True, kw_only=True)
class FixMatch(Consistent, Alone, name="fixmatch", title="FixMatch alone"):
    """UDA with the most probable class as the label where the network is sure of it."""

    def losses(self) -> Losses:
        return (*self.supervised(), self.uda(temperature=0.0, threshold=FIXMATCH_THRESHOLD))
