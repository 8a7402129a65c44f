"""The methods that a recipe can be trained by, each one value of :data:`METHODS`.

To add one, write a function that trains the networks it is given, and an entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from metapl.baselines import LossTrainer
from metapl.errors import MetaplError
from metapl.feedback import Altered
from metapl.losses import UDA, CrossEntropy, TeacherLoss
from metapl.problems import PseudoLabels
from metapl.recipes.base import Recipe, Role, Task
from metapl.trainer import BilevelTrainer
from metapl.training import FitResult, Trainer

if TYPE_CHECKING:
    from metapl.experiments.experiment import Experiment

Fitted = tuple[Trainer, FitResult]
Run = Callable[["Experiment", Task, nn.Module, nn.Module], Fitted]
"""Trains the teacher and the student, or one of them."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train a recipe.

    Args:
        name: in commands and files.
        title: in words.
        run: what trains; it returns the trainer whose student is the network that is kept.
        built_as: which of the recipe's two networks that one is built as, and whose optimizer trains it.
        teaches: a teacher learns beside the student, which waits for it; it is one of the run's networks.
        delivers: the network that is delivered where validation cannot tell them apart.
        place: in a comparison: "compared" by default, a "control" of the feedback, the "headroom", which is told the
            true labels of all examples and so is of no use to those who do not have them; None: only if it is named.
    """

    name: str
    title: str
    run: Run
    built_as: Role = "student"
    teaches: bool = False
    delivers: Literal["student", "finetuned"] = "student"
    place: Literal["compared", "control", "headroom"] | None = None


ALONE: dict[str, Any] = {"wait": 0, "warm_start": False, "exact_every": None}
"""Options of a fit without a teacher that learns."""

FIXMATCH_THRESHOLD = 0.95
"""As published (arXiv:2001.07685)."""

USUAL_SMOOTHING = 0.1
"""Of the baseline by label smoothing, where the recipe smooths nothing."""


def _bilevel(
    run: Experiment, task: Task, teacher: nn.Module, student: nn.Module, *, mode: Any, problem: PseudoLabels
) -> Fitted:
    recipe = run.recipe
    trainer = BilevelTrainer(
        teacher,
        student,
        mode,
        problem=problem,
        inner_optimizer=recipe.student.build(student),
        outer_optimizer=recipe.teacher.build(teacher),
        teacher_losses=recipe.teacher_losses(),
        **recipe.trainer_options(),
    )
    return trainer, run.fit(trainer, task.labeled, task.unlabeled, task)


def _mpl(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    told = run.recipe.feedback
    return _bilevel(run, task, teacher, student, mode=told.estimator(), problem=told.problem())


def _none(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    told = run.recipe.feedback
    kind = told.problem().for_modes(told.estimator().labels, told.mode).kind
    return _bilevel(run, task, teacher, student, mode="none", problem=dataclasses.replace(told.problem(), kind=kind))


def _altered(how: Literal["permuted", "class_means", "random_sign"]) -> Run:
    def method(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
        told = run.recipe.feedback
        mode = Altered(told.estimator(), how, seed=run.recipe.seed)
        return _bilevel(run, task, teacher, student, mode=mode, problem=told.problem())

    return method


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The options that have nothing to do with feedback, so that a baseline trains as MPL does."""
    names = ("clip_norm", "precision", "accumulate", "compile")
    return {name: value for name, value in recipe.trainer_options().items() if name in names}


def _alone(
    run: Experiment, task: Task, network: nn.Module, losses: Sequence[TeacherLoss], labeled: Any, **over: Any
) -> Fitted:
    """One network, with the teacher's optimiser."""
    trainer = LossTrainer(network, losses, optimizer=run.recipe.teacher.build(network), **_plain(run.recipe))
    unlabeled = task.unlabeled if any(isinstance(term, UDA) for term in losses) else None
    return trainer, run.fit(trainer, labeled, unlabeled, task, **ALONE | over)


def _supervised(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    return _alone(run, task, teacher, (CrossEntropy(),), task.labeled)


def _label_smoothing(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    own = next(term for term in run.recipe.teacher_losses(uda=False) if isinstance(term, CrossEntropy))
    smoothed = dataclasses.replace(own, label_smoothing=own.label_smoothing or USUAL_SMOOTHING)
    return _alone(run, task, teacher, (smoothed,), task.labeled)


def _supervised_everything(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    if task.everything is None:
        raise MetaplError(
            f"supervised_everything trains on the true labels of all examples, and the recipe {run.recipe.name} does "
            "not know those of the unlabelled ones; leave it out of --methods."
        )
    return _alone(run, task, teacher, run.recipe.teacher_losses(uda=False), task.everything)


def _uda(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    return _alone(run, task, teacher, run.recipe.teacher_losses(uda=True), task.labeled)


def _fixmatch(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
    """UDA with the most probable class as the label of what the network is sure of."""
    losses = [
        dataclasses.replace(term, temperature=0.0, threshold=FIXMATCH_THRESHOLD, align=0.0, prior=None)
        if isinstance(term, UDA)
        else term
        for term in run.recipe.teacher_losses(uda=True)
    ]
    return _alone(run, task, teacher, losses, task.labeled)


def _fixed_teacher(kind: Literal["soft", "hard"]) -> Run:
    """Plain pseudo labels, eq. (1): a supervised teacher, then a student of it."""

    def method(run: Experiment, task: Task, teacher: nn.Module, student: nn.Module) -> Fitted:
        _alone(run, task, teacher, run.recipe.teacher_losses(uda=False), task.labeled, phase="teacher")
        trainer = BilevelTrainer(
            teacher,
            student,
            "none",
            problem=dataclasses.replace(run.recipe.feedback.problem(), kind=kind),
            inner_optimizer=run.recipe.student.build(student),
            outer_optimizer=run.recipe.teacher.build(teacher),
            **_plain(run.recipe),
            teacher_losses=(),  # without a loss and without feedback the teacher stays as it is
        )
        return trainer, run.fit(trainer, task.labeled, task.unlabeled, task, **ALONE)

    return method


_ALL = (
    Method(name="mpl", title="Meta Pseudo Labels", run=_mpl, teaches=True, delivers="finetuned", place="compared"),
    Method(
        name="none", title="same loop, no feedback", run=_none, teaches=True, delivers="finetuned", place="compared"
    ),
    Method(
        name="supervised",
        title="supervised, labelled data only",
        run=_supervised,
        built_as="teacher",
        delivers="finetuned",
        place="compared",
    ),
    Method(
        name="label_smoothing",
        title="supervised with label smoothing",
        run=_label_smoothing,
        built_as="teacher",
        delivers="finetuned",
    ),
    Method(
        name="supervised_everything",
        title="supervised with all true labels (headroom)",
        run=_supervised_everything,
        built_as="teacher",
        place="headroom",
    ),
    Method(
        name="pseudo_labels",
        title="pseudo labels of a fixed teacher, soft",
        run=_fixed_teacher("soft"),
        delivers="finetuned",
        place="compared",
    ),
    Method(
        name="pseudo_labels_hard",
        title="pseudo labels of a fixed teacher, hard",
        run=_fixed_teacher("hard"),
        delivers="finetuned",
    ),
    Method(name="uda", title="UDA alone", run=_uda, built_as="teacher", delivers="finetuned", place="compared"),
    Method(name="fixmatch", title="FixMatch alone", run=_fixmatch, built_as="teacher", delivers="finetuned"),
    Method(
        name="permuted",
        title="MPL, feedback permuted over the batch",
        run=_altered("permuted"),
        teaches=True,
        place="control",
    ),
    Method(
        name="class_means",
        title="MPL, class means of the feedback only",
        run=_altered("class_means"),
        teaches=True,
        place="control",
    ),
    Method(
        name="random_sign",
        title="MPL, feedback with random signs",
        run=_altered("random_sign"),
        teaches=True,
        place="control",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""The methods by name: Meta Pseudo Labels, the same loop without feedback, the baselines, and altered feedback."""

COMPARED = tuple(method.name for method in _ALL if method.place == "compared")
CONTROLS = tuple(method.name for method in _ALL if method.place == "control")


def title(method: str) -> str:
    """A method in words."""
    return METHODS[method].title if method in METHODS else method
