"""One recipe by one method, end to end: train, finetune, evaluate, and leave a run folder behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from metapl.baselines import LossTrainer
from metapl.data.image_sets import record_files, replaced_files
from metapl.errors import MetaplError
from metapl.evaluate import Evaluation
from metapl.feedback import Altered
from metapl.fit import FitResult, Loop, Say
from metapl.losses import UDA, CrossEntropy, TeacherLoss
from metapl.problems import PseudoLabels
from metapl.recipes.base import Recipe, Role, Task
from metapl.recipes.galleries import draw_galleries, read_galleries, write_galleries
from metapl.run_folder import Metrics, RunFolder
from metapl.trainer import BilevelTrainer


@dataclass(frozen=True)
class Experiment:
    """A recipe, its data and where its run lives; every method trains on the same data from the same weights."""

    recipe: Recipe
    folder: RunFolder
    resume: bool = False
    progress: bool = True
    say: Say = print

    def run(self, method: str) -> dict[str, Any]:
        """Train by ``method``, finetune, evaluate on the test set once, and write the folder's files.

        Returns: what ``result.json`` holds: ``test_accuracy`` of the best student by validation,
        ``finetuned_test_accuracy``, the validation accuracies of both, and the test set's full evaluation.
        """
        torch.manual_seed(self.recipe.seed)
        task, place = self.recipe.task(self.say, self.progress, self.skipped), self.recipe.place()
        self.record(task)
        teacher, student = (self.recipe.network(role).to(place) for role in ROLES)
        trained, result = METHODS[method](self, task, teacher, student)
        evaluation = trained.evaluate(task.test, classes=list(task.classes))
        labeller = trained.student if trained.labeller is None else trained.labeller
        write_galleries(self.folder.path, draw_galleries(task, labeller, trained.student))
        self.folder.write_weights("student.safetensors", result.weights)
        finetuned, after = self.finetune(task, trained.student, result)
        content = {
            "recipe": self.recipe.name,
            "method": method,
            "seed": self.recipe.seed,
            "steps": self.recipe.steps,
            "best_step": result.step,
            "validation_accuracy": result.validation_accuracy,
            "test_accuracy": evaluation.accuracy,
            "finetuned_validation_accuracy": finetuned.validation_accuracy,
            "finetuned_test_accuracy": after.accuracy,
            "evaluation": evaluation.to_json(),
        }
        self.folder.write_weights("finetuned_student.safetensors", finetuned.weights)
        self.report(content, evaluation, task.classes)
        self.folder.write_json("result.json", content)
        unread = replaced_files(self.skipped)
        if unread:
            self.say(f"files that could not be read: {len(unread):,}, listed with what is wrong in {self.skipped}")
        return content

    # ------------------------------------------------------------------------------------------------- the phases

    def record(self, task: Task) -> None:
        """Leave behind on which data this runs; refuse to go on with a run on other data."""
        path, found = self.folder.path / "data.json", json.loads(json.dumps(task.record))
        if path.exists() and self.folder.read_json("data.json") != found:
            raise MetaplError(
                f"the data have changed since the run in {self.folder.path} was started (see its data.json); put them "
                "back as they were, or start another run with another --out."
            )
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if task.split is not None:
            task.split.save(self.folder.path / "split.json")
        self.folder.write_json("data.json", task.record)
        record_files(self.skipped, task.skipped)

    @property
    def skipped(self) -> Path:
        """Where the files are listed that cannot be read."""
        return self.folder.path / "skipped.jsonl"

    def fit(
        self, trainer: Loop, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any
    ) -> FitResult:
        """The main phase, or one before it; ``over`` replaces options of the recipe."""
        return trainer.fit(
            labeled,
            unlabeled,
            steps=self.recipe.steps,
            phase=phase,
            validation=task.validation,
            truth=task.truth,
            out=self.folder,
            resume=self.resume,
            progress=self.progress,
            say=self.say,
            **self.recipe.fit_options() | over,
        )

    def finetune(self, task: Task, student: nn.Module, before: FitResult) -> tuple[FitResult, Evaluation]:
        """The student finetuned on the labelled data, or as it was before where that is better by validation."""
        torch.manual_seed(self.recipe.seed)  # whatever was drawn before, so that it can be repeated on its own
        tuner = LossTrainer(student, (CrossEntropy(),), optimizer=self.recipe.finetune.build(student))
        result = before
        if self.recipe.finetune_steps:
            every = max(1, self.recipe.finetune_steps // 10)
            options = self.recipe.fit_options() | ALONE | {"ema_decay": None, "warmup": 0, "validate_every": every}
            result = tuner.fit(
                task.finetuning,
                steps=self.recipe.finetune_steps,
                phase="finetune",
                validation=task.validation,
                out=self.folder,
                resume=self.resume,
                progress=self.progress,
                say=self.say,
                **options | self.recipe.finetune_options(),
            )
        if (result.validation_accuracy or 0) < (before.validation_accuracy or 0):
            student.load_state_dict(before.weights)
            result = before
        return result, tuner.evaluate(task.test)

    def report(self, content: Mapping[str, Any], evaluation: Evaluation, classes: tuple[str, ...]) -> None:
        """Draw ``report.png`` from the rows on disk and what ``result.json`` holds."""
        from metapl.report import draw_report

        summary = (
            f"test accuracy of the best student by validation: {content['test_accuracy']:.1%} "
            f"(finetuned: {content['finetuned_test_accuracy']:.1%}), n = {evaluation.n:,}, "
            f"chance {evaluation.chance:.1%}"
        )
        draw_report(
            self.folder.path / "report.png",
            title=f"{self.recipe.name}: {content['method']}, seed {self.recipe.seed}",
            curves={content["method"]: Metrics(self.folder.path / "metrics.jsonl").rows("fit")},
            confusion=evaluation.confusion,
            classes=list(classes),
            summary=summary,
            galleries=read_galleries(self.folder.path),
        )


ROLES: tuple[Role, ...] = ("teacher", "student")

ALONE: dict[str, Any] = {"wait": 0, "exact_every": None}
"""Options of a fit without a teacher that learns."""

USUAL_SMOOTHING = 0.1
"""Of the baseline by label smoothing, where the recipe smooths nothing."""

Fitted = tuple[Loop, FitResult]
Method = Callable[[Experiment, Task, nn.Module, nn.Module], Fitted]


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


def _altered(how: Literal["permuted", "class_means", "random_sign"]) -> Method:
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


def _fixed_teacher(kind: Literal["soft", "hard"]) -> Method:
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


METHODS: dict[str, Method] = {
    "mpl": _mpl,
    "none": _none,
    "supervised": _supervised,
    "label_smoothing": _label_smoothing,
    "supervised_everything": _supervised_everything,
    "pseudo_labels": _fixed_teacher("soft"),
    "pseudo_labels_hard": _fixed_teacher("hard"),
    "uda": _uda,
    "permuted": _altered("permuted"),
    "class_means": _altered("class_means"),
    "random_sign": _altered("random_sign"),
}
"""The methods by name: Meta Pseudo Labels, the same loop without feedback, the baselines, and altered feedback."""

TEACHERS = ("supervised", "label_smoothing", "supervised_everything", "uda")
"""The methods whose one network is built as the teacher is."""

COMPARED = ("mpl", "none", "supervised", "pseudo_labels", "uda")
CONTROLS = ("permuted", "class_means", "random_sign")
