"""Labels for Reduced MPL that a user gives: in a store, or by the run of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metapl.apps.experiments.labeling import provenance, refuse_other_pictures, store_labels, to_label
from metapl.apps.experiments.load_run import LoadedRun, load_run
from metapl.apps.experiments.reducing import FOLDER, rows_of
from metapl.apps.labels import LabelStore
from metapl.apps.pictures.folders import scan_unlabeled
from metapl.apps.pictures.store import FileImages
from metapl.apps.recipes.base import Recipe, Stored, Task
from metapl.errors import MetaplError, few
from metapl.training import Say

PARTS = {"labels": "unlabeled", "labeled_labels": "labeled"}
"""The folder whose pictures each store has labels of."""


def check_labels_given(recipe: Recipe) -> None:
    """Refuse a store or a run that is of other classes, or of other pictures, or is damaged; nothing is written."""
    given: Any = recipe  # labels are given of folders alone
    for name, place in recipe.method.labels_from.items():
        if place is not None and name == "teacher":
            _check_classes(given, f"the run {place}", load_run(Path(place)).recipe.classes)
        elif place is not None:
            store, files = LabelStore(place), scan_unlabeled(getattr(given, PARTS[name]))
            _check_classes(given, f"the store {place}", store.classes)
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
    names = {part: _names(getattr(task, part).images, folders[part]) for part in folders}
    stores: dict[str, LabelStore] = {}
    if "teacher" in given:
        run = load_run(Path(given["teacher"]))
        say(f"labels are those of {run.heading(run.name('delivered'))}")
        for part in names:
            stores[part] = _label(run, folders[part], folder / FOLDER / part, say)
    else:
        stores = {PARTS[name]: LabelStore(place) for name, place in given.items()}
        if "labeled" not in stores:
            say("note: without --labeled-labels, the labels are adjusted by the student's feedback alone.")
    for part, store in stores.items():
        missing = [name for name in names[part] if name not in store]
        if missing:
            which = f"{len(missing):,} pictures ({few(missing)})"
            say(f"note: {store.folder} has no labels of {which}: even ones are taken.")
    return Stored(**{part: rows_of(store, names[part]) for part, store in stores.items()})


def _label(run: LoadedRun, pictures: str, place: Path, say: Say) -> LabelStore:
    """A store of the labels that a run's network gives the pictures of a folder."""
    network = run.network(run.name("delivered")).to(run.device)
    labeled = to_label(pictures, run.recipe)
    about = {"run": str(run.folder.path), **provenance(network, labeled, run.recipe)}
    return store_labels(network, labeled, place, run.recipe.classes, about, say)


def _names(images: Any, folder: str) -> list[str]:
    """What the pictures are called in a store: their paths in the folder."""
    assert isinstance(images, FileImages)
    root = Path(folder)
    return [images.path(number).relative_to(root).as_posix() for number in range(len(images))]


def _check_classes(recipe: Any, what: str, classes: tuple[str, ...]) -> None:
    if classes != recipe.classes:
        raise MetaplError(
            f"{what} has the classes {few(classes)}; expected those of {recipe.labeled}, in this order: "
            f"{few(recipe.classes)}."
        )
