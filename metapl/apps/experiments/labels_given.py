"""Labels for Reduced MPL: those of the run's own teacher, or of a store or another run that a user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.experiments.labeling import (
    Labeled,
    SourcePictures,
    provenance,
    refuse_other_pictures,
    store_labels,
    to_label,
)
from metapl.apps.experiments.load_run import load_run
from metapl.apps.labels import LabelStore
from metapl.apps.pictures.folders import scan_unlabeled
from metapl.apps.recipes.base import Recipe, Stored, Task
from metapl.errors import MetaplError, few
from metapl.training import Say

FOLDER = "labels"
"""Where a run keeps the stored labels, in its folder."""

PARTS = {"labels": "unlabeled", "labeled_labels": "labeled"}
"""The folder whose pictures each store has labels of."""


def label_by(teacher: nn.Module, recipe: Recipe, folder: Path, task: Task, say: Say) -> Stored:
    """Store the labels of a task's examples in a run folder, and read them.

    A run that resumes goes on with the stores that are there; a teacher with other weights is refused.
    """
    stored = {}
    for name, batches in (("unlabeled", task.unlabeled), ("labeled", task.labeled)):
        labeled = Labeled(SourcePictures(batches.images), range(len(batches.images)), name)
        about = provenance(teacher, labeled, recipe)
        store = store_labels(teacher, labeled, folder / FOLDER / name, task.classes, about, say)
        stored[name] = rows_of(store, labeled.ids)
    say(f"the teacher's labels are in {folder / FOLDER}")
    return Stored(**stored)


def rows_of(store: LabelStore, ids: Any) -> Tensor:
    """The distributions of these examples, float32 (n, C); even ones for examples that the store leaves out."""
    known = [(row, name) for row, name in enumerate(ids) if name in store]
    if not known:
        raise MetaplError(f"the store {store.folder} has none of the {len(ids):,} examples; expected their labels.")
    rows = torch.full((len(ids), len(store.classes)), 1 / len(store.classes))
    rows[[row for row, _ in known]] = store[[name for _, name in known]]
    return rows


def check_labels_given(recipe: Recipe) -> None:
    """Refuse a store or a run that is of other classes, or of other pictures, or is damaged; nothing is written."""
    given: Any = recipe  # labels are given of folders alone
    for name, place in recipe.method.labels_from.items():
        if place is None:
            continue
        store = None if name == "teacher" else LabelStore(place)
        classes = load_run(Path(place)).recipe.classes if store is None else store.classes
        if classes != given.classes:
            raise MetaplError(
                f"the {'run' if store is None else 'store'} {place} has the classes {few(classes)}; expected those of "
                f"{given.labeled}, in this order: {few(given.classes)}."
            )
        if store is not None:
            files = scan_unlabeled(getattr(given, PARTS[name]))
            file = dict(zip(files.names, files.paths(), strict=True)).get
            refuse_other_pictures(store.digests(), file, store.folder, tell_progress=True)


def labels_given(recipe: Recipe, task: Task, folder: Path, say: Say) -> Stored | None:
    """The labels that the recipe's method names; None where its teacher is to be trained first.

    Those that the network of another run gives are stored in ``folder``, which is that of this run.
    """
    given = {name: place for name, place in recipe.method.labels_from.items() if place is not None}
    if not given:
        return None
    folders = {part: getattr(recipe, part) for part in PARTS.values()}
    if "teacher" in given:
        run, stores = load_run(Path(given["teacher"])), {}
        say(f"labels are those of {run.heading(run.name('delivered'))}")
        for part, pictures in folders.items():
            network = run.network(run.name("delivered")).to(run.device)
            labeled = to_label(pictures, run.recipe)
            about = {"run": str(run.folder.path), **provenance(network, labeled, run.recipe)}
            stores[part] = store_labels(network, labeled, folder / FOLDER / part, run.recipe.classes, about, say)
    else:
        stores = {PARTS[name]: LabelStore(place) for name, place in given.items()}
        if "labeled" not in stores:
            say("note: without --labeled-labels, the labels are adjusted by the student's feedback alone.")
    found = {}
    for part, store in stores.items():
        images, root = getattr(task, part).images, Path(folders[part])
        # In a store, pictures are called by their paths in the folder.
        names = [images.path(number).relative_to(root).as_posix() for number in range(len(images))]
        if missing := [name for name in names if name not in store]:
            which = f"{len(missing):,} pictures ({few(missing)})"
            say(f"note: {store.folder} has no labels of {which}: even ones are taken.")
        found[part] = rows_of(store, names)
    return Stored(**found)
