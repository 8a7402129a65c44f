"""Examples in a user's files, read like the training data of a run; a folder of labeled ones is a test set."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from metapl.apps.commands.parse import unset
from metapl.apps.experiments.folder import NetworkName
from metapl.apps.pictures.check import find_copies
from metapl.apps.pictures.folders import scan_labeled, walk
from metapl.apps.recipes import ImageFolders
from metapl.errors import MetaplError, few
from metapl.words import shown, tell

OF_RUNS = (
    "which of the run's networks: the one that it delivers, the student, the student finetuned on the labeled data, or "
    "the teacher. Of a method that trains one network, such as uda, that is the student."
)
Network = Annotated[NetworkName, unset(help=OF_RUNS)]
"""A network of a run."""

BATCH = 256


class Reads(Protocol):
    """What reads examples from files: a recipe, or what stands for one."""

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def read(self, path: Path) -> list[tuple[str, Tensor]]: ...


class Inputs:
    """The examples in files, and in folders, of which the readable files are taken, but for those to ``leave``."""

    def __init__(self, recipe: Reads, paths: Sequence[Path], leave: Sequence[Path] = ()) -> None:
        self.recipe, self.seen, self.skipped = recipe, 0, 0
        left = {os.path.realpath(file) for file in leave}
        self.files: list[Path] = []
        for path in paths:
            files = [path]
            if path.is_dir():
                files = [Path(where) / name for where, _, names in walk(path, self._unlisted) for name in names]
                files = sorted(file for file in files if file.suffix.lower() in recipe.reads)
                files = [file for file in files if not left or os.path.realpath(file) not in left]
                if not files:
                    raise MetaplError(
                        f"there is no file in {path} that can be read; expected {', '.join(recipe.reads)}."
                    )
            self.files += files
        self._unlisted_folders = self.skipped

    def batches(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Where each example stands, and the network's input for it."""
        examples = self._read()
        while batch := list(itertools.islice(examples, BATCH)):
            yield batch

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        self.seen = self.skipped = self._unlisted_folders  # of this pass, whatever was read before
        for file in self.files:
            try:
                yield from self.recipe.read(file)
            except MetaplError as error:
                self._skip(str(error))
            else:
                self.seen += 1

    def _unlisted(self, error: OSError) -> None:
        self._skip(f"{shown(error.filename)}: {error.strerror}")

    def _skip(self, why: str) -> None:
        self.seen += 1
        self.skipped += 1
        tell(f"metapl: left out {why}", file=sys.stderr)


def require_finite(logits_BC: Tensor, names: Sequence[str]) -> None:
    """Refuse logits that are not finite, and name the examples."""
    bad = [name for name, fine in zip(names, logits_BC.isfinite().all(dim=1).tolist(), strict=True) if not fine]
    if bad:
        raise MetaplError(
            f"the network's outputs are not finite for {few(bad)}; its training diverged: train again with a smaller "
            "learning rate."
        )


class TestFolder:
    """The pictures of a folder that holds one folder a class, read like the training data of a run.

    Those of classes without pictures may be missing; others than the run's are refused. Notes go to standard error.
    """

    __test__ = False  # pytest takes classes with such names for tests
    part = "test"

    def __init__(self, recipe: Reads, folder: Path) -> None:
        files = scan_labeled(folder)
        counts = files.counts()
        unknown = [name for name, count in counts.items() if count and name not in recipe.classes]
        if unknown:
            raise MetaplError(
                f"{folder} has pictures of {few(unknown)}, which the run does not know; expected folders called as "
                f"its classes: {few(recipe.classes, 20)}."
            )
        missing = [name for name in recipe.classes if not counts.get(name)]
        self.about: dict[str, Any] = {"test": str(folder), "missing_classes": missing}
        self.root, self.names = files.root, list[str]()
        self._labels = dict(zip(files.paths(), files.targets(recipe.classes).tolist(), strict=True))
        self._inputs = Inputs(recipe, [Path(path) for path in files.paths()])
        notes = []
        if missing:
            notes.append(f"{files.root} has no picture of {few(missing)}: nothing is measured there.")
        if files.loose:
            notes.append(f"{files.loose} pictures beside the class folders are not used.")
        if files.passed_over:
            kinds = ", ".join(f"{count:,} with {suffix}" for suffix, count in sorted(files.passed_over.items()))
            notes.append(f"files without the name of a picture are passed over: {kinds}.")
        if isinstance(recipe, ImageFolders):  # an accuracy on pictures that were trained on says nothing of others
            try:
                labeled, others = recipe.trained_on()
            except MetaplError as error:
                notes.append(f"it is not known which of these pictures were trained on: {error}")
            else:
                found = find_copies(labeled, others, None, files, trained=True)
                notes += [finding.message for finding in found if finding.kind == "test copies"]
        for note in notes:
            tell(f"metapl: note: {note}", file=sys.stderr, wrap=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels; ``names`` then has the readable files, relative to the folder."""
        self.names = []
        for batch in self._inputs.batches():
            paths = [path for path, _ in batch]
            self.names += [Path(path).relative_to(self.root).as_posix() for path in paths]
            yield torch.stack([x for _, x in batch]), torch.tensor([self._labels[path] for path in paths])
        if not self.names:
            raise MetaplError(f"none of the {len(self._labels)} pictures in {self.root} can be read.")

    @property
    def skipped(self) -> int:
        """How many files could not be read."""
        return self._inputs.skipped

    def remark(self, evaluation: object) -> str:
        """Nothing is known of such an accuracy."""
        return ""
