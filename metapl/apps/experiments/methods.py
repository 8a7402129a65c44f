"""Training by a method of :data:`metapl.apps.recipes.methods.METHODS`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from metapl.apps.experiments.fits import ALONE, Fit, finetuning_options
from metapl.apps.experiments.noisy_labels import LayOut, in_one_process, train_on_noisy
from metapl.apps.experiments.noisy_student import filtered, train_noisy_student
from metapl.apps.experiments.reducing import even_labels, feedback_of, train_reduced
from metapl.apps.experiments.rounds import Rehearsed
from metapl.apps.recipes.base import ROLES, Recipe, Task
from metapl.apps.recipes.methods import EVERY_METHOD, Method
from metapl.apps.recipes.noisy_folders import NoisyFolders
from metapl.errors import MetaplError
from metapl.problems.losses import UDA, TeacherLoss
from metapl.training import FitOptions, FitResult, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer


def train(
    method: Method,
    recipe: Recipe,
    task: Task,
    teacher: nn.Module,
    student: nn.Module,
    fit: Fit,
    lay_out: LayOut = in_one_process,
) -> tuple[Trainer, FitResult]:
    """Train the two networks, or one of them.

    Args:
        method, recipe, task: what is trained, and on what.
        teacher, student: as they are laid out.
        fit: see :data:`metapl.apps.experiments.noisy_labels.Fit`.
        lay_out: of another teacher than the given one, which the method builds.

    Returns: the trainer whose student is the network that is kept, and what its fit ended with.
    """
    if method.doubting is not None:
        assert isinstance(recipe, NoisyFolders)  # the only recipe with these methods
        return train_on_noisy(method, recipe, task, student, fit, lay_out)
    if method.is_noisy_student:
        return train_noisy_student(method, recipe, task, fit)
    if method.losses is not None:
        labeled = task.everything if method.place == "headroom" else task.labeled
        if labeled is None:
            raise MetaplError(
                f"{method.name} trains on the true labels of all examples, and the recipe {recipe.name} does not know "
                "those of the unlabeled ones; leave it out of --methods."
            )
        return _alone(recipe, task, teacher, method.losses(recipe), labeled, fit)
    if method.reduced:
        stored = task.stored
        if stored is None:
            assert task.label is not None  # every run has a place for them
            _alone(recipe, task, teacher, recipe.teacher_losses(), task.labeled, fit, phase="teacher")
            stored = task.label(teacher)
        return train_reduced(method, recipe, task, stored, student, fit)
    if method.fixed_labels is not None:  # plain pseudo labels, eq. (1): a supervised teacher, then a student of it
        _alone(recipe, task, teacher, recipe.teacher_losses(uda=False), task.labeled, fit, phase="teacher")
        # Without a loss and without feedback the teacher stays as it is.
        changed = {"mode": "none", "kind": method.fixed_labels, "teacher_losses": (), **recipe.trainer_options()}
        trainer = _bilevel(recipe, teacher, student, **changed)
        return trainer, fit(trainer, task.labeled, task.unlabeled, task, **ALONE)
    if method.filtered:
        task = filtered(recipe, task, fit)
        torch.manual_seed(recipe.seed)  # whatever was drawn for the labels
    trainer = bilevel_trainer(recipe, teacher, student, method.feedback)
    return trainer, fit(trainer, task.labeled, task.unlabeled, task)


def compared(recipe: Recipe, method: str, seed: int) -> Recipe:
    """The recipe for a run of a comparison by a method: beside Noisy Student, others train its last network.

    >>> from metapl.apps.recipes import Digits
    >>> from metapl.apps.recipes.self_training import SelfTraining
    >>> recipe = Digits(self_training=SelfTraining(rounds=2, networks=("8", "16x16")))
    >>> compared(recipe, "supervised", 0).hidden, compared(recipe, "noisy_student", 0).hidden
    ((16, 16), (32, 32))
    """
    own, last = recipe.by(method, seed), recipe.self_training.network(recipe.self_training.rounds)
    return own if last is None or EVERY_METHOD[method].is_noisy_student else own.with_network(last)


def bilevel_trainer(recipe: Recipe, teacher: nn.Module, student: nn.Module, feedback: Any = "recipe") -> BilevelTrainer:
    """The trainer of Meta Pseudo Labels as a recipe sets it.

    Args:
        feedback: ``"recipe"``, ``"none"``, or how the recipe's is altered; see :class:`metapl.feedback.Altered`.
    """
    estimator, kind = feedback_of(recipe, feedback)
    options = {"teacher_losses": recipe.teacher_losses(), **recipe.trainer_options(), **recipe.feedback_options()}
    return _bilevel(recipe, teacher, student, mode=estimator, kind=kind, **options)


def _bilevel(
    recipe: Recipe, teacher: nn.Module, student: nn.Module, *, mode: Any, kind: Any, **options: Any
) -> BilevelTrainer:
    return BilevelTrainer(
        teacher,
        student,
        mode,
        problem=dataclasses.replace(recipe.feedback.problem(), kind=kind),
        inner_optimizer=recipe.student.build(student),
        outer_optimizer=recipe.teacher.build(teacher),
        **options,
    )


def _alone(
    recipe: Recipe,
    task: Task,
    network: nn.Module,
    losses: tuple[TeacherLoss, ...],
    labeled: Any,
    fit: Fit,
    **options: Any,
) -> tuple[Trainer, FitResult]:
    """One network, with the teacher's optimizer."""
    optimizer = recipe.teacher.build(network)
    trainer = LossTrainer(network, losses, optimizer=optimizer, **recipe.trainer_options())
    unlabeled = task.unlabeled if any(isinstance(term, UDA) for term in losses) else None
    return trainer, fit(trainer, labeled, unlabeled, task, **ALONE | options)


def rehearse(
    method: str, recipe: Recipe, task: Task, fit: Fit, device: torch.device | None = None
) -> tuple[nn.Module, nn.Module]:
    """Go through the fits of a method with fresh networks, and labels that are even, of which none is stored.

    Args:
        fit: what is done in the place of each fit.
        device: of the networks; None: the CPU.

    Returns: the teacher and the student. The default generators are put back.
    """
    with torch.random.fork_rng(devices=[] if device is None else None):
        teacher, student = (recipe.network(role).to(device) for role in ROLES)
        rehearsed = dataclasses.replace(task, label=even_labels(task), rounds=Rehearsed(task))
        train(EVERY_METHOD[method], recipe, rehearsed, teacher, student, fit)
    return teacher, student


def check_method(recipe: Recipe, method: str, task: Task) -> None:
    """Refuse options that a method has no use for together, and data that it cannot be trained on; nothing is trained.

    Cost: the networks are built; the default generator is put back.

    Raises:
        MetaplError: as the run would, and which method it is.
    """

    def check(
        trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any
    ) -> FitResult:
        FitOptions(phase=phase, **{"steps": recipe.steps, **recipe.fit_options(), **over})
        return FitResult(None, 0, {})

    try:
        _, student = rehearse(method, recipe, task, check)
        if recipe.finetune_steps:
            FitOptions(**recipe.fit_options() | finetuning_options(recipe))
            recipe.finetune.build(student)
    except MetaplError as error:
        raise MetaplError(f"{method}: {error}") from error
