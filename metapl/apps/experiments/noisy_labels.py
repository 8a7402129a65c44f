"""Training on labels that may be wrong, with a few that are right."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from metapl.apps.experiments.fits import ALONE, Fit
from metapl.apps.recipes.base import Task
from metapl.apps.recipes.methods import LEARNED, Method
from metapl.apps.recipes.noisy_folders import NoisyFolders
from metapl.feedback import Altered, Estimator, estimator
from metapl.problems.losses import CrossEntropy
from metapl.training import FitResult, Trainer
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

LayOut = Callable[[nn.Module, bool], nn.Module]
"""Lays out what is learned about labels over the processes that train together, as
:meth:`metapl.apps.experiments.experiment.Experiment.beside` does."""


def in_one_process(teacher: nn.Module, reads_inputs: bool) -> nn.Module:
    """As it is."""
    return teacher


def train_on_noisy(
    method: Method,
    recipe: NoisyFolders,
    task: Task,
    student: nn.Module,
    fit: Fit,
    lay_out: LayOut = in_one_process,
) -> tuple[Trainer, FitResult]:
    """Train a network on given labels, of which some may be wrong, and on the clean ones.

    Where something is learned about the given labels, they are learned from as they are first: while the network knows
    nothing yet, whatever it learns from helps it, and all weights would grow.

    Args:
        method: one of :data:`metapl.apps.recipes.methods.NOISY_METHODS`.
        task: its ``labeled`` batches are clean, its ``unlabeled`` ones have the given labels, and ``everything`` has
            both.
        lay_out: see :data:`LayOut`.
    """
    options = recipe.trainer_options()
    plain = LossTrainer(student, (CrossEntropy(),), optimizer=recipe.student.build(student), **options)
    if method.feedback is None:
        source = task.labeled if method.doubting == "clean labels" else task.everything
        return plain, fit(plain, source, None, task, **ALONE)
    assert method.doubting is not None
    device = next(student.parameters()).device
    learned = LEARNED[method.doubting]
    problem = learned.problem()
    teacher = lay_out(learned.teacher(recipe, task).to(device), problem.teacher_reads_inputs)
    optimizer = recipe.beside(method.doubting).build(teacher)
    if recipe.warm_steps:
        first = {"phase": "warm", "steps": recipe.warm_steps, "schedule": "constant", "select": False}
        fit(plain, task.everything, None, task, **ALONE, **first, warmup=min(recipe.warmup, recipe.warm_steps))
    mode: Estimator = estimator(recipe.mode)
    if method.feedback in ("permuted", "class_means", "random_sign"):
        mode = Altered(mode, method.feedback, seed=recipe.seed)
    trainer = BilevelTrainer(
        teacher,
        student,
        mode,
        problem=problem,
        inner_optimizer=recipe.student.build(student),
        outer_optimizer=optimizer,
        teacher_losses=(),
        **options,
    )
    steps = recipe.steps - recipe.warm_steps
    rest = {"steps": steps, "warmup": 0 if recipe.warm_steps else recipe.warmup}
    return trainer, fit(trainer, task.labeled, task.unlabeled, task, **ALONE, **rest)
