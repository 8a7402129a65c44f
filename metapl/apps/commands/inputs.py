"""Examples in a user's files, read like the training data of a run; a folder of labeled ones is a test set."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

import torch
import tyro
from torch import Tensor

from metapl.apps.experiments.load_run import NetworkName
from metapl.apps.pictures.check import find_copies
from metapl.apps.pictures.folders import scan_labeled, walk
from metapl.apps.recipes import ImageFolders
from metapl.errors import MetaplError, few
from metapl.words import shown, tell

Network = Annotated[
    NetworkName,
    tyro.conf.arg(
        help_behavior_hint="",
        help="which of the run's networks: the one that it delivers, the student, the student finetuned on the labeled "
        "data, or the teacher. Of a method that trains one network, such as uda, that is the student.",
    ),
]
"""A network of a run."""

BATCH = 256

NAMED = 5
"""Files that an error names."""


class Reads(Protocol):
    """What reads examples from files: a recipe, or what stands for one."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def read(self, path: Path) -> list[tuple[str, Tensor]]: ...


class Inputs:
    """The examples in files and folders, as they are asked for.

    Args:
        recipe: reads the files.
        paths: files and folders.
        leave: files that are not read though they lie in one of the folders.
    """

    def __init__(self, recipe: Reads, paths: Sequence[Path], leave: Sequence[Path] = ()) -> None:
        self.recipe, self.seen, self.skipped = recipe, 0, 0
        self.leave = {os.path.realpath(file) for file in leave}
        self.files = [file for path in paths for file in (self._within(path) if path.is_dir() else [path])]
        self._unlisted_folders = self.skipped

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.seen = self.skipped = self._unlisted_folders  # of this pass, whatever was read before
        for file in self.files:
            self.seen += 1
            try:
                yield from self.recipe.read(file)
            except MetaplError as error:
                self._skip(str(error))

    def batches(self) -> Iterator[list[tuple[str, Tensor]]]:
        """The same, some at a time."""
        examples = iter(self)
        while batch := list(itertools.islice(examples, BATCH)):
            yield batch

    def _within(self, folder: Path) -> list[Path]:
        """The readable files of a folder and its subfolders, sorted."""
        files = [Path(where) / name for where, _, names in walk(folder, self._unlisted) for name in names]
        reads = [file for file in files if file.suffix.lower() in self.recipe.reads]
        readable = sorted(file for file in reads if not self.leave or os.path.realpath(file) not in self.leave)
        if not readable:
            raise MetaplError(
                f"there is no file in {folder} that can be read; expected {', '.join(self.recipe.reads)}."
            )
        return readable

    def _unlisted(self, error: OSError) -> None:
        self.seen += 1
        self._skip(f"{shown(error.filename)}: {error.strerror}")

    def _skip(self, why: str) -> None:
        self.skipped += 1
        tell(f"metapl: left out {why}", file=sys.stderr)


def require_finite(logits_BC: Tensor, names: Sequence[str]) -> None:
    """Refuse logits that are not finite, and name the examples."""
    bad = [name for name, fine in zip(names, logits_BC.isfinite().all(dim=1).tolist(), strict=True) if not fine]
    if bad:
        raise MetaplError(
            f"the network's outputs are not finite for {few(bad, NAMED)}; its training diverged: train "
            "again with a smaller learning rate."
        )


class TestFolder:
    """The pictures of a folder that holds one folder a class, read like the training data of a run.

    Notes on them go to standard error.

    Args:
        recipe: of the run; its classes count.
        folder: one folder a class, called as the run's classes; those without pictures may be missing.

    Raises:
        MetaplError: no such folder, none in it, no picture, or pictures of a class that the run does not know.
    """

    __test__ = False  # pytest takes classes with such names for tests

    def __init__(self, recipe: Reads, folder: Path) -> None:
        self.folder, self.files = folder, scan_labeled(folder)
        counts = self.files.counts()
        unknown = [name for name, count in counts.items() if count and name not in recipe.classes]
        if unknown:
            raise MetaplError(
                f"{folder} has pictures of {few(unknown)}, which the run does not know; expected folders called as "
                f"its classes: {few(recipe.classes, 20)}."
            )
        self.missing = tuple(name for name in recipe.classes if not counts.get(name))
        labels = self.files.targets(recipe.classes).tolist()
        self._labels = dict(zip(self.files.paths(), labels, strict=True))
        self._inputs = Inputs(recipe, [Path(path) for path in self.files.paths()])
        self.names: list[str] = []
        for note in self._notes(recipe):
            tell(f"metapl: note: {note}", file=sys.stderr, wrap=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels; ``names`` then has the readable files, relative to the folder."""
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

    def _notes(self, recipe: Reads) -> Iterator[str]:
        if self.missing:
            yield f"{self.files.root} has no picture of {few(self.missing)}: nothing is measured there."
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
            labeled, others = recipe.trained_on()
        except MetaplError as error:
            yield f"it is not known which of these pictures were trained on: {error}"
            return
        for finding in find_copies(labeled, others, None, self.files, trained=True):
            if finding.kind == "test copies":
                yield finding.message
