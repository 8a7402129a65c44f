"""Reduced Meta Pseudo Labels: a teacher's labels are stored, and a small network adjusts them for the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.experiments.fits import Fit
from metapl.apps.experiments.labeling import Labeled, SourcePictures, provenance, store_labels
from metapl.apps.labels import LabelStore
from metapl.apps.pictures import LabeledBatches, UnlabeledBatches
from metapl.apps.recipes.base import Recipe, Stored, Task
from metapl.apps.recipes.methods import Method
from metapl.errors import MetaplError
from metapl.feedback import Altered
from metapl.models import label_adjuster
from metapl.problems import ReducedLabels, StoredCrossEntropy
from metapl.problems.base import Kind
from metapl.training import FitResult, Say
from metapl.training.trainer import BilevelTrainer

FOLDER = "labels"
"""Where a run keeps the stored labels, in its folder."""


def train_reduced(
    method: Method, recipe: Recipe, task: Task, stored: Stored, student: nn.Module, fit: Fit
) -> tuple[BilevelTrainer, FitResult]:
    """Train a student on stored labels, adjusted by a small network that learns from the student.

    Args:
        recipe: its student's and teacher's optimizers (the second trains the small network), feedback and steps.
        stored: class distributions of the unlabeled examples and, for the supervised term, of the labeled ones.
    """
    labeled, unlabeled = task.labeled, task.unlabeled
    assert isinstance(labeled, LabeledBatches)
    assert isinstance(unlabeled, UnlabeledBatches)
    device = next(student.parameters()).device
    torch.manual_seed(recipe.seed)  # wherever the labels came from, and whatever was drawn for them
    adjuster = label_adjuster(len(task.classes)).to(device)
    estimator, kind = feedback_of(recipe, method.feedback)
    labels = recipe.feedback.problem()
    own = () if stored.labeled is None else (StoredCrossEntropy(recipe.label_smoothing),)
    # A ratio to the teacher's own losses needs these.
    size: dict[str, Any] = recipe.feedback_options() if own else {"feedback_weight": recipe.feedback.feedback_weight}
    trainer = BilevelTrainer(
        adjuster,
        student,
        estimator,
        problem=ReducedLabels(kind, labels.temperature, labels.label_smoothing),
        inner_optimizer=recipe.student.build(student),
        outer_optimizer=recipe.teacher.build(adjuster),
        teacher_losses=own,
        **recipe.trainer_options(),
        **size,
    )
    seen = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
    pairs = dataclasses.replace(unlabeled, weak=seen, strong=None, stored=stored.unlabeled)
    known = labeled if stored.labeled is None else dataclasses.replace(labeled, stored=stored.labeled)
    # The small network has no opinion on examples, of which some could be right.
    return trainer, fit(trainer, known, pairs, dataclasses.replace(task, truth=None), wait=0, warm_start=False)


def feedback_of(recipe: Recipe, feedback: Any) -> tuple[Any, Kind | None]:
    """The mode, and the kind of labels, of a recipe's feedback.

    Args:
        feedback: ``"recipe"``, ``"none"``, or how the recipe's is altered; see :class:`metapl.feedback.Altered`.
    """
    estimator, kind = recipe.feedback.estimator(), recipe.feedback.labels
    if feedback == "none":  # the labels that the recipe's own mode takes
        return "none", recipe.feedback.problem().for_modes(estimator.labels, recipe.feedback.mode).kind
    if feedback is not None and feedback != "recipe":
        return Altered(estimator, feedback, seed=recipe.seed), kind
    return estimator, kind


# ----------------------------------------------------------------------------------------------------- labels of a run


def label_by(recipe: Recipe, folder: Path, task: Task, say: Say) -> Callable[[nn.Module], Stored]:
    """A function that stores the labels of a task's examples in a run folder, and reads them.

    A run that resumes goes on with the stores that are there; a teacher with other weights is refused.
    """

    def label(teacher: nn.Module) -> Stored:
        stored = {}
        for name, batches in (("unlabeled", task.unlabeled), ("labeled", task.labeled)):
            ids = range(len(batches.images))
            labeled = Labeled(SourcePictures(batches.images), ids, name)
            about = provenance(teacher, labeled, recipe)
            store = store_labels(teacher, labeled, folder / FOLDER / name, task.classes, about, say)
            stored[name] = rows_of(store, ids)
        say(f"the teacher's labels are in {folder / FOLDER}")
        return Stored(**stored)

    return label


def even_labels(task: Task) -> Callable[[nn.Module], Stored]:
    """The same distribution for all examples, for a rehearsal of the training."""

    def label(teacher: nn.Module) -> Stored:
        sizes = {"unlabeled": len(task.unlabeled.images), "labeled": len(task.labeled.images)}
        classes = len(task.classes)
        return Stored(**{name: torch.full((size, classes), 1 / classes) for name, size in sizes.items()})

    return label


def rows_of(store: LabelStore, ids: Any) -> Tensor:
    """The distributions of these examples, float32 (n, C); even ones for examples that the store leaves out."""
    known = [name for name in ids if name in store]
    if len(known) == len(ids):
        return store[list(ids)]
    if not known:
        raise MetaplError(f"the store {store.folder} has none of the {len(ids):,} examples; expected their labels.")
    rows = torch.full((len(ids), len(store.classes)), 1 / len(store.classes))
    place = {name: row for row, name in enumerate(ids)}
    rows[[place[name] for name in known]] = store[known]
    return rows
