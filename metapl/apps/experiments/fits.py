"""Fits of a run that are not of a teacher and a student together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from metapl.apps.recipes.base import Recipe, Task
from metapl.problems.losses import CrossEntropy
from metapl.training import FitResult, Trainer
from metapl.training.loss_trainer import LossTrainer

Fit = Callable[..., FitResult]
"""Fits a trainer to sources of labeled and unlabeled batches, as
:meth:`metapl.apps.experiments.experiment.Experiment.fit` does."""

ALONE: dict[str, Any] = {"wait": 0, "warm_start": False, "exact_every": None}
"""Options of a fit without a teacher that learns."""


def finetuning_options(recipe: Recipe) -> dict[str, Any]:
    """Options in which a recipe's finetuning differs from its training."""
    steps = recipe.finetune_steps
    own = {"steps": steps, "ema_decay": None, "warmup": 0, "validate_every": max(1, steps // 10)}
    return ALONE | own | recipe.finetune_options()


def finetune_by_cosine(
    network: nn.Module, recipe: Recipe, labeled: Any, task: Task, fit: Fit, phase: str
) -> tuple[Trainer, FitResult]:
    """Finetune a student of Noisy Student where it is, on labeled batches."""
    optimizer = recipe.finetune.build(network)
    trainer = LossTrainer(network, (CrossEntropy(),), optimizer=optimizer, **recipe.trainer_options())
    return trainer, fit(
        trainer, labeled, None, task, phase=phase, **{"schedule": "cosine"} | finetuning_options(recipe)
    )
