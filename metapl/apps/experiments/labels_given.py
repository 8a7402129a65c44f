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
from metapl.apps.recipes import ImageFolders
from metapl.apps.recipes.base import Recipe, Stored, Task
from metapl.errors import MetaplError, few
from metapl.training import Say


def check_labels_given(recipe: ImageFolders) -> None:
    """Refuse a store or a run that is of other classes, or of other pictures, or is damaged; nothing is written."""
    if recipe.teacher_run is not None:
        _check_classes(recipe, f"the run {recipe.teacher_run}", load_run(Path(recipe.teacher_run)).recipe.classes)
    for place, folder in ((recipe.label_store, recipe.unlabeled), (recipe.labeled_label_store, recipe.labeled)):
        if place is not None:
            store, files = LabelStore(place), scan_unlabeled(folder)
            _check_classes(recipe, f"the store {place}", store.classes)
            file = dict(zip(files.names, files.paths(), strict=True)).get
            refuse_other_pictures(store.digests(), file, store.folder, tell_progress=True)


def labels_given(recipe: Recipe, task: Task, folder: Path, say: Say) -> Stored | None:
    """The labels that the recipe names; None where its teacher is to be trained first.

    Those that the network of another run gives are stored in ``folder``, which is that of this run.
    """
    if not isinstance(recipe, ImageFolders) or (recipe.teacher_run is None and recipe.label_store is None):
        return None
    names = {
        "unlabeled": _names(task.unlabeled.images, recipe.unlabeled),
        "labeled": _names(task.labeled.images, recipe.labeled),
    }
    stores: dict[str, LabelStore] = {}
    if recipe.teacher_run is not None:
        run = load_run(Path(recipe.teacher_run))
        say(f"labels are those of {run.heading(run.name('delivered'))}")
        for part in names:
            stores[part] = _label(run, getattr(recipe, part), folder / FOLDER / part, say)
    else:
        given = {"unlabeled": recipe.label_store, "labeled": recipe.labeled_label_store}
        stores = {part: LabelStore(place) for part, place in given.items() if place is not None}
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


def _check_classes(recipe: ImageFolders, what: str, classes: tuple[str, ...]) -> None:
    if classes != recipe.classes:
        raise MetaplError(
            f"{what} has the classes {few(classes)}; expected those of {recipe.labeled}, in this order: "
            f"{few(recipe.classes)}."
        )
