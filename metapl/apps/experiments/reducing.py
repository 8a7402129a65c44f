"""Labels that the teacher of a run gives, in its folder, for Reduced Meta Pseudo Labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.experiments.labeling import Labeled, SourcePictures, provenance, store_labels
from metapl.apps.labels import LabelStore
from metapl.apps.recipes.base import Recipe, Stored, Task
from metapl.errors import MetaplError
from metapl.training import Say

FOLDER = "labels"
"""Where a run keeps the stored labels, in its folder."""


def label_by(teacher: nn.Module, recipe: Recipe, folder: Path, task: Task, say: Say) -> Stored:
    """Store the labels of a task's examples in a run folder, and read them.

    A run that resumes goes on with the stores that are there; a teacher with other weights is refused.
    """
    stored = {}
    for name, batches in (("unlabeled", task.unlabeled), ("labeled", task.labeled)):
        ids = range(len(batches.images))
        labeled = Labeled(SourcePictures(batches.images), ids, name)
        about = provenance(teacher, labeled, recipe)
        store = store_labels(teacher, labeled, folder / FOLDER / name, task.classes, about, say)
        stored[name] = rows_of(store, ids)
    say(f"the teacher's labels are in {folder / FOLDER}")
    return Stored(**stored)


def even_labels(task: Task) -> Stored:
    """The same distribution for all examples, for a rehearsal of the training."""
    sizes = {"unlabeled": len(task.unlabeled.images), "labeled": len(task.labeled.images)}
    classes = len(task.classes)
    return Stored(**{name: torch.full((size, classes), 1 / classes) for name, size in sizes.items()})


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
