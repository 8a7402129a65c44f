"""What a run's network is measured on: its own test set, what it was validated on, or the pictures of a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metapl.apps.pictures import load_digits_split
from metapl.apps.pictures.folders import LabeledFiles, find_copies, scan_labeled, scan_unlabeled
from metapl.apps.pictures.input import BATCH, Inputs
from metapl.apps.run import EndedRun, stored_data
from metapl.apps.words import tell
from metapl.errors import MetaplError, few
from metapl.metrics import Evaluation

UNTESTED = "{} has no test set; give --test DIR, a folder of labeled pictures with one folder a class."


class HeldOut:
    """Examples with labels for the network of a run, which reads them as it reads its training data.

    Without a ``folder`` they are the run's own, of which ``recorded`` is the accuracy in ``result.json``. A folder may
    lack classes of the run, and is refused where it has others; notes on it go to standard error.
    """

    def __init__(self, run: EndedRun, network: str, folder: Path | None = None) -> None:
        self.part, self.note, self.names = "test", "", list[str]()
        self.recorded: float | None = run.result.get(f"{network}_test_accuracy")
        self._digits: tuple[Tensor, Tensor] | None = None
        fields = run.source.recipe().get("fields", {})
        if folder is not None:
            files, self.recorded = scan_labeled(folder), None
            self.about: dict[str, Any] = {"test": str(folder), "missing_classes": _compared(files, run.classes)}
            _tell_copies(files, fields)
        elif run.result["recipe"] == "digits":
            split, self.about = load_digits_split(fields["labels_per_class"], fields["seed"]), {}
            self._digits = split.test
        else:
            own, self.about = files_of(run, "test"), {}
            if own is None:
                own, self.part = files_of(run, "validation"), "validation"
                selected = run.result["delivered_by"] == "validation"
                self.note = "\n  the network was selected on these examples: train was given no --test" * selected
                self.recorded = run.result.get(f"{network}_validation_accuracy")
            if own is None:
                raise MetaplError(f"{UNTESTED.format(run.folder.path)} It has no validation set either.")
            files = own
        if self._digits is None:
            self.root = files.root
            self._labels = dict(zip(files.paths(), files.targets(run.classes).tolist(), strict=True))
            self._inputs = Inputs(run.cards[network].input, [Path(path) for path in files.paths()])
        if folder is None:
            self.about = {"recorded_accuracy": self.recorded}

    @property
    def skipped(self) -> int:
        """How many files of the last pass could not be read."""
        return 0 if self._digits is not None else self._inputs.skipped

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._digits is not None:
            yield from zip(*(t.split(BATCH) for t in self._digits), strict=True)
            return
        self.names.clear()
        for paths, x in self._inputs.batches():
            self.names += [Path(path).relative_to(self.root).as_posix() for path in paths]
            yield x, torch.tensor([self._labels[path] for path in paths])
        if not self.names:
            raise MetaplError(f"none of the {len(self._labels)} pictures in {self.root} can be read.")

    def remark(self, evaluation: Evaluation) -> str:
        """What stands behind the accuracy."""
        if "test" in self.about:
            return ""
        if self.recorded is None:
            return f", not in result.json{self.note}"
        if evaluation.accuracy == self.recorded:
            return f", as in result.json{self.note}"
        changed = "the weights or the data have changed since, or this machine rounds otherwise"
        return f", but {self.recorded:.2%} in result.json:\n  {changed}{self.note}"


def files_of(run: EndedRun, part: Literal["labeled", "clean", "validation", "test"]) -> LabeledFiles | None:
    """The labeled pictures of a part of a run's data, as it found them; None where it has none."""
    fields, names = run.source.recipe().get("fields", {}), stored_data(run.source).get(part)
    place = fields.get(part)
    if part == "validation" and names:  # given, or set aside
        place = fields.get("val") or fields.get("clean") or fields.get("labeled")
    if not place:
        return None
    files = scan_labeled(place)
    if not isinstance(names, list):
        return files
    kept = set(names)  # the others could not be read, or were set aside
    return files.keep([number for number, name in enumerate(files.names) if name in kept])


def _compared(files: LabeledFiles, classes: tuple[str, ...]) -> list[str]:
    """The classes of a run that a folder has no pictures of."""
    counts = files.counts()
    if unknown := [name for name, count in counts.items() if count and name not in classes]:
        raise MetaplError(
            f"{files.root} has pictures of {few(unknown)}, which the run does not know; expected folders called as "
            f"its classes: {few(classes, 20)}."
        )
    missing = [name for name in classes if not counts.get(name)]
    if missing:
        tell(f"metapl: note: {files.root} has no picture of {few(missing)}.", file=sys.stderr)
    return missing


def _tell_copies(files: LabeledFiles, fields: dict[str, Any]) -> None:
    """An accuracy on pictures that were trained on says nothing of others."""
    right, labeled, unlabeled = (fields.get(name) for name in ("clean", "labeled", "unlabeled"))
    if not labeled:
        return
    try:
        others = scan_unlabeled(unlabeled) if unlabeled else scan_labeled(labeled)
        sides = {"labeled": scan_labeled(right or labeled), "unlabeled": others, "test": files}
        found = find_copies(sides, trained=True)
        notes = [finding.message for finding in found if finding.kind == "test copies"]
    except MetaplError as error:
        notes = [f"it is not known which of these pictures were trained on: {error}"]
    for note in notes:
        tell(f"metapl: note: {note}", file=sys.stderr)
