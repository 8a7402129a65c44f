"""A folder of labeled pictures that a run which has ended is measured on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from metapl.cli.inputs import Inputs
from metapl.data.images.check import find_copies, some
from metapl.data.images.folders import scan_labeled, scan_unlabeled
from metapl.errors import MetaplError
from metapl.recipes import ImageFolders, Recipe


class TestFolder:
    """The pictures of a folder that holds one folder a class, read as those that a run was trained on.

    Notes on them go to standard error.

    Args:
        recipe: of the run; its classes are those that count.
        folder: one folder a class, called as the run's classes; those without pictures may be missing.

    Raises:
        MetaplError: no such folder, none in it, no picture, or pictures of a class that the run does not know.
    """

    __test__ = False  # for pytest, which takes what is called so for tests

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.files = scan_labeled(folder)
        counts = self.files.counts()
        unknown = [name for name, count in counts.items() if count and name not in recipe.classes]
        if unknown:
            raise MetaplError(
                f"{folder} has pictures of {some(unknown)}, which the run does not know; expected folders called as "
                f"its classes: {', '.join(recipe.classes)}."
            )
        self.missing = tuple(name for name in recipe.classes if not counts.get(name))
        labels = self.files.targets(recipe.classes).tolist()
        self._labels = dict(zip(self.files.paths(), labels, strict=True))
        self._inputs = Inputs(recipe, [Path(path) for path in self.files.paths()])
        self.names: list[str] = []
        for note in self._notes(recipe):
            print(f"metapl: note: {note}", file=sys.stderr)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels; ``names`` are then those that could be read, relative to the folder."""
        self.names = []
        for batch in self._inputs.batches():
            paths = [path for path, _ in batch]
            self.names += [Path(path).relative_to(self.files.root).as_posix() for path in paths]
            yield torch.stack([x for _, x in batch]), torch.tensor([self._labels[path] for path in paths])
        if not self.names:
            raise MetaplError(f"none of the {len(self.files)} pictures in {self.files.root} can be read.")

    @property
    def skipped(self) -> int:
        """How many files could not be read."""
        return self._inputs.skipped

    def _notes(self, recipe: Recipe) -> Iterator[str]:
        if self.missing:
            yield f"{self.files.root} has no picture of {some(self.missing)}: nothing is measured there."
        if self.files.loose:
            yield f"{self.files.loose} pictures beside the class folders are not used."
        if self.files.passed_over:
            kinds = ", ".join(f"{count:,} with {suffix}" for suffix, count in sorted(self.files.passed_over.items()))
            yield f"files without the name of a picture are passed over: {kinds}."
        if isinstance(recipe, ImageFolders):
            yield from self._copies(recipe)

    def _copies(self, recipe: ImageFolders) -> Iterator[str]:
        """Pictures that were trained on: an accuracy on them says nothing of others."""
        try:
            labeled, unlabeled = scan_labeled(recipe.labeled), scan_unlabeled(recipe.unlabeled)
        except MetaplError as error:
            yield f"it is not known which of these pictures were trained on: {error}"
            return
        for finding in find_copies(labeled, unlabeled, None, self.files, None, trained=True):
            if finding.kind == "test copies":
                yield finding.message
