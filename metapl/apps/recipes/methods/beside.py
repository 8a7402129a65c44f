"""A teacher and a student: trained together, with feedback or without, or the student on the labels of a fixed one.

In Reduced Meta Pseudo Labels, the teacher's labels are stored, and a small network adjusts them for the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from torch import nn

from metapl.ablation import Altered
from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.recipes.base import Method, Phase, Phases, Recipe, Run, variant
from metapl.apps.recipes.methods.alone import Losses, WithUda, alone
from metapl.apps.recipes.settings import SIZE, Feedback, Labeling, Optimizer, Share, Softness, SomeSteps, Steps, Weight
from metapl.errors import MetaplError
from metapl.models import label_adjuster
from metapl.problems import ReducedLabels, StoredCrossEntropy
from metapl.problems.losses import CrossEntropy
from metapl.training.trainer import BilevelTrainer

Kind = Literal["soft", "hard"]


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
        return (*self.supervised(), self.uda()) if self.uda_weight else self.supervised()

    def estimator(self, recipe: Recipe) -> Any:
        return self.feedback.estimator()

    def kind(self) -> Kind | None:
        return self.feedback.labels

    def feedback_options(self, losses: bool = True) -> dict[str, Any]:
        """How large the feedback is, as :class:`metapl.BilevelTrainer` takes it; a ratio is relative to ``losses``."""
        return {}


class Unfed(Pair):
    """A teacher without feedback, whose labels are those that the mode takes."""

    def estimator(self, recipe: Recipe) -> Any:
        return "none"

    def kind(self) -> Kind | None:
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

    alteration: ClassVar[str | None] = None  # how a control changes the feedback

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
    return mode if how is None else Altered(mode, how, seed=recipe.seed)


def bilevel(
    recipe: Recipe, teacher: nn.Module, student: nn.Module, method: Any, mode: Any, problem: Any, **options: Any
) -> BilevelTrainer:
    optimizers = {"inner_optimizer": method.student.build(student), "outer_optimizer": method.teacher.build(teacher)}
    options |= {**optimizers, **recipe.trainer_options(), "verify": False}  # the tests verify the recipes' problems
    return BilevelTrainer(teacher, student, mode, problem=problem, **options)


def bilevel_trainer(recipe: Recipe, teacher: nn.Module, student: nn.Module, method: Any) -> BilevelTrainer:
    """The trainer of a teacher and a student as the recipe and the method, a :class:`Pair`, set it."""
    problem = dataclasses.replace(method.feedback.problem(), kind=method.kind())
    own = {"teacher_losses": method.teacher_losses(), **method.feedback_options()}
    return bilevel(recipe, teacher, student, method, method.estimator(recipe), problem, **own)


@dataclass(frozen=True, kw_only=True)
class MetaPseudoLabels(Fed, Together, name="mpl", title="Meta Pseudo Labels", place="compared", control="none"):
    """A teacher and a student, with feedback."""


@dataclass(frozen=True, kw_only=True)
class WithoutFeedback(Unfed, Together, name="none", title="same loop, no feedback", place="compared"):
    """A teacher and a student, without feedback."""


def _control(made: str, name: str, title: str) -> type[MetaPseudoLabels]:
    said: dict[str, Any] = {"place": "control", "delivers": "student", "alteration": name}
    return variant(MetaPseudoLabels, __name__, made, name, title, **said)


Permuted = _control("Permuted", "permuted", "MPL, feedback permuted over the batch")
ClassMeans = _control("ClassMeans", "class_means", "MPL, class means of the feedback only")
RandomSign = _control("RandomSign", "random_sign", "MPL, feedback with random signs")


@dataclass(frozen=True, kw_only=True)
class PseudoLabeled(Method, name="pseudo_labels", title="pseudo labels of a fixed teacher, soft", place="compared"):
    """A student on the labels of a teacher that learned from the labeled examples alone: eq. (1) of the paper.

    Args:
        student: the student's optimizer.
        teacher: the teacher's.
        label_smoothing: label smoothing of the teacher's supervised loss.
        feedback: how the teacher's outputs become labels.
    """

    labels: ClassVar[Kind] = "soft"

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


class PseudoLabeledHard(
    PseudoLabeled, name="pseudo_labels_hard", title="pseudo labels of a fixed teacher, hard", place=None, labels="hard"
):
    """A student on the most probable classes by a fixed teacher."""


@dataclass(frozen=True, kw_only=True)
class Reduced(Pair):
    """A student on stored labels, adjusted by a small network, which has the teacher's optimizer and losses.

    Args:
        teacher_run: the run whose network labels the pictures, instead of a teacher that is trained first.
        label_store: a store of the labels of --unlabeled, written by metapl label. Without --labeled-labels, the
            network that adjusts them learns from the student's feedback alone.
        labeled_label_store: with --labels: a store of the labels of --labeled, likewise.
    """

    reduced = True

    teacher_run: Annotated[str | None, tyro.conf.arg(name="teacher", metavar="RUN")] = None
    label_store: Annotated[str | None, tyro.conf.arg(name="labels", metavar="STORE")] = None
    labeled_label_store: Annotated[str | None, tyro.conf.arg(name="labeled-labels", metavar="STORE")] = None

    @property
    def labels_from(self) -> Mapping[str, str | None]:
        return {"teacher": self.teacher_run, "labels": self.label_store, "labeled_labels": self.labeled_label_store}

    def whole(self) -> Self:
        names = ("teacher_run", "label_store", "labeled_label_store")
        changed: Any = {name: str(Path(at).expanduser().resolve()) for name in names if (at := getattr(self, name))}
        return dataclasses.replace(self, **changed)

    def check(self, recipe: Recipe) -> None:
        given = [name for name, place in self.labels_from.items() if place is not None]
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        if given and not hasattr(recipe, "labeled"):
            raise MetaplError(f"{flags}: labels are given of folders of pictures, which {recipe.name} has not.")
        if given not in ([], ["teacher"], ["labels"], ["labels", "labeled_labels"]):
            raise MetaplError(f"{flags}: expected --teacher, or --labels and perhaps --labeled-labels beside it.")

    def phases(self, run: Run) -> Phases:
        stored = run.labels_given()
        if stored is None:
            yield alone(run.recipe, run.task, run.teacher, self.teacher, self.teacher_losses(), name="teacher")
            stored = run.label(run.teacher)
        recipe, task, student = run.recipe, run.task, run.student
        known, unlabeled = task.labeled, task.unlabeled
        assert isinstance(known, LabeledBatches)
        assert isinstance(unlabeled, UnlabeledBatches)
        run.seed(recipe.seed)  # wherever the labels came from, and whatever was drawn for them
        small = label_adjuster(len(task.classes)).to(next(student.parameters()).device)
        adjuster = run.beside(small, reads_inputs=False)
        labels, own = self.feedback.problem(), tuple[StoredCrossEntropy, ...]()
        if "labeled" in stored:
            own = (StoredCrossEntropy(self.label_smoothing),)
            known = dataclasses.replace(known, stored=stored["labeled"])
        problem = ReducedLabels(self.kind(), labels.temperature, labels.label_smoothing)
        options = {"teacher_losses": own, **self.feedback_options(losses=bool(own))}
        trainer = bilevel(recipe, adjuster, student, self, self.estimator(recipe), problem, **options)
        seen = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
        pairs = dataclasses.replace(unlabeled, weak=seen, strong=None, stored=stored["unlabeled"])
        # The small network has no opinion on examples, of which some could be right.
        yield Phase(trainer, known, pairs, dataclasses.replace(task, truth=None), options=self.options(recipe))


@dataclass(frozen=True, kw_only=True)
class ReducedMetaPseudoLabels(
    Fed, Reduced, name="reduced_mpl", title="Reduced MPL (stored labels, adjusted)", control="reduced_none"
):
    """A student on stored labels, adjusted by a small network that learns from the student."""


@dataclass(frozen=True, kw_only=True)
class ReducedWithoutFeedback(Unfed, Reduced, name="reduced_none", title="stored labels, adjusted without feedback"):
    """A student on stored labels, adjusted by a small network that does not learn from the student."""
