"""A folder of pictures with few labels, and one with many pictures without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from metapl.data.fingerprint import hash_files
from metapl.data.folder_check import check_folders
from metapl.data.folders import Files, FilesT, LabeledFiles, Progress, scan_labeled, scan_unlabeled
from metapl.data.image_sets import FileImages
from metapl.data.sound_files import verify_files
from metapl.data.splits import stratified_split
from metapl.errors import MetaplError
from metapl.recipes.base import Say, Task, require
from metapl.recipes.pictures import PictureRecipe, Pictures, whole
from metapl.recipes.progress import counting

WORDS = {"labeled": "labelled", "unlabeled": "unlabelled", "val": "validation", "test": "test"}
"""The folders as they are called on the terminal."""

IN_MEMORY = 2**30
"""Bytes of decoded pictures that are kept in memory; of larger folders, files are read each time they are drawn."""


@dataclass(frozen=True, kw_only=True)
class ImageFolders(PictureRecipe):
    """One folder a class for labelled pictures, any folder tree for unlabelled ones.

    The defaults are for a few minutes on a laptop's processor. The feedback is the exact gradient with a weight of 1.

    Args:
        labeled: folder with one folder a class.
        unlabeled: folder with pictures, in any tree.
        val: as labeled, to select on; without it a part of labeled is set aside.
        test: as labeled, to report on; without it the result is that on validation.
        val_fraction: part of each class that is set aside where there is no val.
        class_names: found in labeled.
    """

    name: ClassVar[str] = "images"

    labeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    unlabeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    val: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    test: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    val_fraction: float = 0.2
    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, 0 < self.val_fraction < 1, "val_fraction", "a number between 0 and 1")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names or scan_labeled(self.labeled).classes

    def settled(self) -> ImageFolders:
        """The recipe as it can be stored: whole paths, and the classes that are found."""
        places = {name: whole(getattr(self, name)) for name in ("labeled", "unlabeled", "val", "test", "weights")}
        changes: dict[str, Any] = {**places, "class_names": scan_labeled(self.labeled).classes}
        return dataclasses.replace(self, **changes)

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        tell, look = say or (lambda text: None), _Look(say or (lambda text: None), progress)
        labeled = look.listed(scan_labeled, self.labeled, "labeled")
        unlabeled = look.listed(scan_unlabeled, self.unlabeled, "unlabeled")
        folders = {name: folder for name, folder in (("val", self.val), ("test", self.test)) if folder is not None}
        held_out = {name: look.listed(scan_labeled, folder, name) for name, folder in folders.items()}
        labeled, unlabeled = look.sound(labeled, "labeled"), look.sound(unlabeled, "unlabeled")
        held_out = {name: look.sound(files, name) for name, files in held_out.items()}
        look.compare(labeled, unlabeled, held_out)
        sides: dict[str, Files] = {"labeled": labeled, "unlabeled": unlabeled, **held_out}
        hashes = {name: hash_files(files) for name, files in sides.items()}
        val = held_out.get("val")
        if val is None:
            train, aside = stratified_split(labeled.targets(), self.val_fraction, self.seed)
            labeled, val = labeled.keep(train.tolist()), labeled.keep(aside.tolist())
        test = held_out.get("test", val)
        tell(
            f"{len(labeled):,} labelled pictures of {len(self.classes)} classes, {len(unlabeled):,} unlabelled, "
            f"{len(val):,} to select on, {len(test):,} to report on"
            + ("" if self.test else " (the same: no --test was given)")
        )
        return Task(
            **self.batches(self._pictures(labeled, unlabeled, val, test, log)),
            classes=self.classes,
            test_names=test.names,
            skipped=look.skipped,
            record={
                "labeled": list(labeled.names),
                "validation": list(val.names),
                "test": list(test.names),
                "unlabeled": len(unlabeled),
                "test_is_validation": self.test is None,
                "hash": hashes,
            },
        )

    def _pictures(
        self, labeled: LabeledFiles, unlabeled: Files, val: LabeledFiles, test: LabeledFiles, log: Path | None
    ) -> Pictures:
        return Pictures(
            few=self._images(labeled, log),
            labels=labeled.targets(self.classes),
            many=self._images(unlabeled, log),
            val=self._images(val, log),
            val_labels=val.targets(self.classes),
            test=self._images(test, log),
            test_labels=test.targets(self.classes),
        )

    def _images(self, files: Files, log: Path | None) -> FileImages:
        """Each file is read when it is first drawn, and kept where all fit: training starts at once."""
        side = self.image_size
        images = FileImages(files.paths(), size=(side, side), mode="L" if self.grey else "RGB", log=log)
        fits = len(images) * side * side * images.shape[0] <= IN_MEMORY
        return images.cached() if fits and not self.resized_crop else images


@dataclass(frozen=True)
class _Look:
    """At the folders, before training: says what a user should know, and keeps which files are left out, and why."""

    tell: Say
    progress: bool
    skipped: dict[str, str] = field(default_factory=dict)

    def listed(self, scan: Callable[[str, Progress], FilesT], folder: str, name: str) -> FilesT:
        """The files of a folder."""
        with counting(f"listing {WORDS[name]} files", self.progress) as count:
            files = scan(folder, count)
        if files.passed_over:
            others = ", ".join(f"{count:,} with {suffix}" for suffix, count in sorted(files.passed_over.items()))
            self.tell(f"{name}: files that are no pictures by their names are passed over: {others}")
        return files

    def sound(self, files: FilesT, name: str) -> FilesT:
        """Those that can be read."""
        with counting(f"looking at {WORDS[name]} files", self.progress, len(files)) as count:
            found = verify_files(files, progress=count)
        if found.skipped:
            self.tell(f"{name}: {len(found.skipped):,} of {len(files):,} files are left out\n{found.summary()}")
        if not found.sound:
            raise MetaplError(f"none of the {len(files)} pictures in {files.root} can be read.")
        self.skipped.update({str(files.root / one.name): one.reason for one in found.skipped})
        return files.keep(found.sound) if found.skipped else files

    def compare(self, labeled: LabeledFiles, unlabeled: Files, held_out: Mapping[str, LabeledFiles]) -> None:
        """Refuse folders that would spoil the training."""
        with counting("comparing files", self.progress) as count:
            findings = check_folders(labeled, unlabeled, held_out.get("val"), held_out.get("test"), count)
        errors = [one.message for one in findings if one.level == "error"]
        if errors:
            raise MetaplError("\n".join(errors))
        for one in findings:
            self.tell(f"note: {one.message}")
