"""Training by a recipe's method, phase by phase, and its rehearsal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metapl.apps.experiments.reducing import even_labels
from metapl.apps.experiments.rounds import even_rows
from metapl.apps.recipes.base import ROLES, Recipe, Run, Selected, Stored, Task
from metapl.errors import MetaplError
from metapl.training import FitOptions, FitResult, Trainer

Fit = Callable[..., FitResult]
"""Fits a trainer to sources of labeled and unlabeled batches, as
:meth:`metapl.apps.experiments.experiment.Experiment.fit` does."""


def train(run: Run, fit: Fit) -> tuple[Trainer, FitResult]:
    """Go through the phases of the recipe's method.

    Returns: the trainer whose student is the network that is kept, and what its fit ended with.
    """
    phases = run.recipe.method.phases(run)
    phase = next(phases)
    while True:
        result = fit(phase.trainer, phase.labeled, phase.unlabeled, phase.task, phase=phase.name, **phase.options)
        trainer = phase.trainer
        try:
            phase = phases.send(result)
        except StopIteration:
            return trainer, result


@dataclass
class Rehearsed:
    """A run of which nothing is kept: labels are even, and all examples are selected."""

    recipe: Recipe
    task: Task
    teacher: nn.Module
    student: nn.Module

    def beside(self, teacher: nn.Module, reads_inputs: bool) -> nn.Module:
        return teacher

    def labels_given(self) -> Stored | None:
        return even_labels(self.task) if any(self.recipe.method.labels_from.values()) else None

    def label(self, teacher: nn.Module) -> Stored:
        return even_labels(self.task)

    def select(self, number: int, teacher: nn.Module) -> Selected:
        return even_rows(self.task)

    def trained(self, number: int, network: nn.Module, result: FitResult) -> None:
        """Nothing is kept."""


def rehearse(recipe: Recipe, task: Task, fit: Fit, device: torch.device | None = None) -> tuple[nn.Module, nn.Module]:
    """Go through the fits of a recipe's method with fresh networks, and labels that are even, of which none is stored.

    Args:
        fit: what is done in the place of each fit.
        device: of the networks; None: the CPU.

    Returns: the teacher and the student. The default generators are put back.
    """
    with torch.random.fork_rng(devices=[] if device is None else None):
        teacher, student = (recipe.network(role).to(device) for role in ROLES)
        train(Rehearsed(recipe, task, teacher, student), fit)
    return teacher, student


def check_method(recipe: Recipe, task: Task) -> None:
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
        _, student = rehearse(recipe, task, check)
        if recipe.finetune_steps:
            FitOptions(**recipe.fit_options() | recipe.finetune_options())
            recipe.finetune.build(student)
    except MetaplError as error:
        raise MetaplError(f"{recipe.method.name}: {error}") from error


def compared(recipe: Recipe, method: str, seed: int) -> Recipe:
    """The recipe for a run of a comparison by a method: beside Noisy Student, others train its last network.

    >>> from metapl.apps.recipes import Digits
    >>> from metapl.apps.recipes.self_training import SelfTraining
    >>> rounds = SelfTraining(rounds=2, networks=("8", "16x16"))
    >>> recipe = Digits(method="noisy_student").with_method(self_training=rounds)
    >>> compared(recipe, "supervised", 0).hidden, compared(recipe, "noisy_student", 0).hidden
    ((16, 16), (32, 32))
    """
    own = recipe.by(method, seed)
    settings = recipe.method.selection
    last = None if settings is None else settings.last
    return own if last is None or own.method.is_noisy_student else own.with_network(last)
