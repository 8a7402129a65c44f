"""A teacher and a student: trained together, with feedback or without, or the student on the labels of a fixed one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro
from torch import nn

from metapl.apps.recipes.base import Method, Phase, Phases, Place, Recipe, Run, variant
from metapl.apps.recipes.methods.alone import Losses, WithUda, alone
from metapl.apps.recipes.ranges import Share, SomeSteps, Steps, Weight
from metapl.apps.recipes.settings import SIZE, Feedback, Labeling, Optimizer, Softness
from metapl.feedback import Altered
from metapl.problems.losses import CrossEntropy
from metapl.training.trainer import BilevelTrainer


@dataclass(frozen=True, kw_only=True)
class Pair(WithUda):
    """A teacher with its own losses, and a student that learns its labels.

    Args:
        feedback: how the teacher labels, and learns from the student.
        student: the student's optimizer.
        teacher: the teacher's.
        uda_weight: weight of the UDA loss of the teacher; 0 leaves it out.
    """

    feedback: Annotated[Labeling, tyro.conf.arg(name="")] = field(default_factory=Labeling)
    student: Optimizer = field(default_factory=Optimizer)
    teacher: Optimizer = field(default_factory=Optimizer)

    def teacher_losses(self) -> Losses:
        """The teacher's own losses."""
        return (*self.supervised(), self.uda()) if self.uda_weight else self.supervised()

    def estimator(self, recipe: Recipe) -> Any:
        """The mode."""
        return self.feedback.estimator()

    def kind(self) -> Literal["soft", "hard"] | None:
        """Of the labels."""
        return self.feedback.labels

    def feedback_options(self, losses: bool = True) -> dict[str, Any]:
        """The option of :class:`metapl.BilevelTrainer` that sets the size of the feedback.

        Args:
            losses: whether the teacher has losses of its own, which a ratio is relative to.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Unfed(Pair):
    """A teacher without feedback, whose labels are those that the mode takes."""

    def estimator(self, recipe: Recipe) -> Any:
        return "none"

    def kind(self) -> Literal["soft", "hard"] | None:
        return self.feedback.problem().for_modes(self.feedback.estimator().labels, self.feedback.mode).kind


@dataclass(frozen=True, kw_only=True)
class Fed(Pair):
    """A teacher with feedback.

    Args:
        feedback_ratio: norm of the feedback's gradient relative to that of the teacher's own losses, at every step. It
            replaces --feedback-weight.
        exact_every: steps between measurements of the cosine between the mode's gradient and the exact one; by default
            it is not measured.
    """

    alteration: ClassVar[Literal["permuted", "class_means", "random_sign"] | None] = None
    """How a control changes the feedback."""

    feedback: Annotated[Feedback, tyro.conf.arg(name="")] = field(default_factory=Feedback)
    feedback_ratio: Annotated[Weight | None, SIZE] = None
    exact_every: Steps | None = None

    def estimator(self, recipe: Recipe) -> Any:
        return altered(self.feedback.estimator(), self.alteration, recipe)

    def feedback_options(self, losses: bool = True) -> dict[str, Any]:
        if self.feedback_ratio is None or not losses:
            return {"feedback_weight": self.feedback.feedback_weight}
        return {"feedback_ratio": self.feedback_ratio}

    def options(self, recipe: Recipe) -> dict[str, Any]:
        return {**super().options(recipe), "exact_every": self.exact_every}


@dataclass(frozen=True, kw_only=True)
class Together(Pair):
    """Both are trained at once, after the teacher alone.

    Args:
        wait: steps in which only the teacher trains, before the student starts; of your own pictures 75 % of all, where
            it is not given.
        warm_start: let the student start from the teacher's weights, where it waits.
    """

    teaches = True

    wait: SomeSteps | None = 0
    warm_start: bool = False

    def options(self, recipe: Recipe) -> dict[str, Any]:
        wait = self.wait or 0
        own = {"wait": wait, "warm_start": self.warm_start and wait > 0, "warmup": recipe.warmup_after(wait)}
        return {**super().options(recipe), **own}

    def phases(self, run: Run) -> Phases:
        trainer = bilevel_trainer(run.recipe, run.teacher, run.student, self)
        yield Phase(trainer, run.task.labeled, run.task.unlabeled, run.task, options=self.options(run.recipe))


def altered(mode: Any, how: Any, recipe: Recipe) -> Any:
    """The mode with the feedback that a control has."""
    return mode if how is None else Altered(mode, how, seed=recipe.seed)


def bilevel(
    recipe: Recipe, teacher: nn.Module, student: nn.Module, method: Any, mode: Any, problem: Any, **options: Any
) -> BilevelTrainer:
    """The trainer of two networks by the optimizers of a method and the options of a recipe."""
    return BilevelTrainer(
        teacher,
        student,
        mode,
        problem=problem,
        inner_optimizer=method.student.build(student),
        outer_optimizer=method.teacher.build(teacher),
        **options,
        **recipe.trainer_options(),
    )


def bilevel_trainer(recipe: Recipe, teacher: nn.Module, student: nn.Module, method: Any) -> BilevelTrainer:
    """The trainer of a teacher and a student as the recipe and the method, a :class:`Pair`, set it."""
    problem = dataclasses.replace(method.feedback.problem(), kind=method.kind())
    own = {"teacher_losses": method.teacher_losses(), **method.feedback_options()}
    return bilevel(recipe, teacher, student, method, method.estimator(recipe), problem, **own)


@dataclass(frozen=True, kw_only=True)
class MetaPseudoLabels(Fed, Together):
    """A teacher and a student, with feedback."""

    name = "mpl"
    title = "Meta Pseudo Labels"
    place: ClassVar[Place] = "compared"
    control: ClassVar[str | None] = "none"


@dataclass(frozen=True, kw_only=True)
class WithoutFeedback(Unfed, Together):
    """A teacher and a student, without feedback."""

    name = "none"
    title = "same loop, no feedback"
    place: ClassVar[Place] = "compared"


def _control(made: str, name: str, title: str) -> type[MetaPseudoLabels]:
    said: dict[str, Any] = {"place": "control", "delivers": "student", "alteration": name}
    return variant(MetaPseudoLabels, __name__, made, name, title, **said)


Permuted = _control("Permuted", "permuted", "MPL, feedback permuted over the batch")
ClassMeans = _control("ClassMeans", "class_means", "MPL, class means of the feedback only")
RandomSign = _control("RandomSign", "random_sign", "MPL, feedback with random signs")


@dataclass(frozen=True, kw_only=True)
class PseudoLabeled(Method):
    """A student on the labels of a teacher that learned from the labeled examples alone: eq. (1) of the paper.

    Args:
        student: the student's optimizer.
        teacher: the teacher's.
        label_smoothing: label smoothing of the teacher's supervised loss.
        feedback: how the teacher's outputs become labels.
    """

    name = "pseudo_labels"
    title = "pseudo labels of a fixed teacher, soft"
    place: ClassVar[Place] = "compared"
    labels: ClassVar[Literal["soft", "hard"]] = "soft"

    student: Optimizer = field(default_factory=Optimizer)
    teacher: Optimizer = field(default_factory=Optimizer)
    label_smoothing: Share = 0.1
    feedback: Annotated[Softness, tyro.conf.arg(name="")] = field(default_factory=Softness)

    def phases(self, run: Run) -> Phases:
        recipe, task = run.recipe, run.task
        yield alone(recipe, task, run.teacher, self.teacher, (CrossEntropy(self.label_smoothing),), name="teacher")
        # Without a loss and without feedback the teacher stays as it is.
        problem = dataclasses.replace(self.feedback.problem(), kind=self.labels)
        trainer = bilevel(recipe, run.teacher, run.student, self, "none", problem, teacher_losses=())
        yield Phase(trainer, task.labeled, task.unlabeled, task)


@dataclass(frozen=True, kw_only=True)
class PseudoLabeledHard(PseudoLabeled):
    """A student on the most probable classes by a fixed teacher."""

    name = "pseudo_labels_hard"
    title = "pseudo labels of a fixed teacher, hard"
    place: ClassVar[Place] = None
    labels = "hard"
