"""One recipe by one method, end to end: train, finetune, evaluate, and leave a run folder behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from metapl.baselines import LossTrainer
from metapl.evaluate import Evaluation
from metapl.feedback import Altered
from metapl.fit import FitResult, Loop, Say
from metapl.losses import CrossEntropy
from metapl.problems import PseudoLabels
from metapl.recipes.base import Recipe
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
        task, place = self.recipe.task(self.say), self.recipe.place()
        if task.record is not None:
            self.folder.write_json("data.json", task.record)
        teacher, student = self.recipe.network().to(place), self.recipe.network().to(place)
        fitted = METHODS[method](self, task, teacher, student)
        trained, result = fitted
        evaluation = trained.evaluate(task.test, classes=list(task.classes))
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
        return content

    # ------------------------------------------------------------------------------------------------- the phases

    def fit(self, trainer: Loop, task: Any, *, unlabeled: bool = True, phase: str = "fit") -> FitResult:
        """The main phase, or one before it."""
        return trainer.fit(
            task.labeled,
            task.unlabeled if unlabeled else None,
            steps=self.recipe.steps,
            phase=phase,
            validation=task.validation,
            truth=task.truth,
            out=self.folder,
            resume=self.resume,
            progress=self.progress,
            say=self.say,
            **self.recipe.fit_options(),
        )

    def finetune(self, task: Any, student: nn.Module, before: FitResult) -> tuple[FitResult, Evaluation]:
        """The student finetuned on the labelled data, or as it was before where that is better by validation."""
        torch.manual_seed(self.recipe.seed)  # whatever was drawn before, so that it can be repeated on its own
        tuner = LossTrainer(student, (CrossEntropy(),), optimizer=self.recipe.finetune.build(student))
        result = before
        if self.recipe.finetune_steps:
            options = self.recipe.fit_options() | {"exact_every": None, "ema_decay": None, "warmup": 0}
            result = tuner.fit(
                task.finetuning,
                steps=self.recipe.finetune_steps,
                phase="finetune",
                validation=task.validation,
                out=self.folder,
                resume=self.resume,
                progress=self.progress,
                say=self.say,
                **options | {"validate_every": max(1, self.recipe.finetune_steps // 10)},
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
            f"(finetuned: {content['finetuned_test_accuracy']:.1%}), n = {evaluation.n}"
        )
        draw_report(
            self.folder.path / "report.png",
            title=f"{self.recipe.name}: {content['method']}, seed {self.recipe.seed}",
            curves={content["method"]: Metrics(self.folder.path / "metrics.jsonl").rows("fit")},
            confusion=evaluation.confusion,
            classes=list(classes),
            summary=summary,
        )


Fitted = tuple[Loop, FitResult]
Method = Callable[[Experiment, Any, nn.Module, nn.Module], Fitted]


def _bilevel(
    run: Experiment, task: Any, teacher: nn.Module, student: nn.Module, *, mode: Any, problem: PseudoLabels
) -> Fitted:
    recipe = run.recipe
    options = recipe.trainer_options()
    trainer = BilevelTrainer(
        teacher,
        student,
        mode,
        problem=problem,
        inner_optimizer=recipe.student.build(student),
        outer_optimizer=recipe.teacher.build(teacher),
        teacher_losses=recipe.teacher_losses(),
        **options,
    )
    return trainer, run.fit(trainer, task)


def _mpl(run: Experiment, task: Any, teacher: nn.Module, student: nn.Module) -> Fitted:
    told = run.recipe.feedback
    return _bilevel(run, task, teacher, student, mode=told.estimator(), problem=told.problem())


def _none(run: Experiment, task: Any, teacher: nn.Module, student: nn.Module) -> Fitted:
    told = run.recipe.feedback
    kind = told.problem().for_modes(told.estimator().labels, told.mode).kind
    return _bilevel(run, task, teacher, student, mode="none", problem=dataclasses.replace(told.problem(), kind=kind))


def _altered(how: Literal["permuted", "class_means", "random_sign"]) -> Method:
    def method(run: Experiment, task: Any, teacher: nn.Module, student: nn.Module) -> Fitted:
        told = run.recipe.feedback
        mode = Altered(told.estimator(), how, seed=run.recipe.seed)
        return _bilevel(run, task, teacher, student, mode=mode, problem=told.problem())

    return method


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The options that have nothing to do with feedback, so that a baseline trains as MPL does."""
    return {name: value for name, value in recipe.trainer_options().items() if name in ("clip_norm", "precision")}


def _one_network(uda: bool) -> Method:
    def method(run: Experiment, task: Any, teacher: nn.Module, student: nn.Module) -> Fitted:
        losses = run.recipe.teacher_losses(uda=uda)
        trainer = LossTrainer(teacher, losses, optimizer=run.recipe.teacher.build(teacher), **_plain(run.recipe))
        return trainer, run.fit(trainer, task, unlabeled=uda)

    return method


def _fixed_teacher(kind: Literal["soft", "hard"]) -> Method:
    """Plain pseudo labels, eq. (1): a supervised teacher, then a student of it."""

    def method(run: Experiment, task: Any, teacher: nn.Module, student: nn.Module) -> Fitted:
        supervised = LossTrainer(
            teacher,
            run.recipe.teacher_losses(uda=False),
            optimizer=run.recipe.teacher.build(teacher),
            **_plain(run.recipe),
        )
        run.fit(supervised, task, unlabeled=False, phase="teacher")
        trainer = BilevelTrainer(
            teacher,
            student,
            "none",
            problem=PseudoLabels(kind=kind, temperature=run.recipe.feedback.temperature),
            inner_optimizer=run.recipe.student.build(student),
            outer_optimizer=run.recipe.teacher.build(teacher),
            **_plain(run.recipe),
            teacher_losses=(),  # without a loss and without feedback the teacher stays as it is
        )
        return trainer, run.fit(trainer, task)

    return method


METHODS: dict[str, Method] = {
    "mpl": _mpl,
    "none": _none,
    "supervised": _one_network(uda=False),
    "pseudo_labels": _fixed_teacher("soft"),
    "pseudo_labels_hard": _fixed_teacher("hard"),
    "uda": _one_network(uda=True),
    "permuted": _altered("permuted"),
    "class_means": _altered("class_means"),
    "random_sign": _altered("random_sign"),
}
"""The methods by name: Meta Pseudo Labels, the same loop without feedback, the baselines, and altered feedback."""

COMPARED = ("mpl", "none", "supervised", "pseudo_labels", "uda")
CONTROLS = ("permuted", "class_means", "random_sign")
