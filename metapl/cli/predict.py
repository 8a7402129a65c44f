"""``metapl predict RUN FILE_OR_FOLDER...``"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import torch
import tyro
from torch import Tensor, nn

from metapl.atomic import replacing
from metapl.cli.finished import finished
from metapl.cli.parse import Run, Switch
from metapl.errors import MetaplError
from metapl.recipes import Recipe

BATCH = 256
Files = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE_OR_FOLDER...", help_behavior_hint="")
]
HEADER = ("file", "class", "probability")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what a run's student takes images for: as CSV, with the columns file, class and probability.

    Images are read in any format that Pillow opens, made gray, and averaged over an 8x8 grid. The digit is to fill the
    image, as in scikit-learn's digits. It may be bright on dark or dark on bright: an image whose mean brightness is
    above one half is inverted. Transparent counts as white.

    CSV files hold an example a row, 64 numbers from 0 to 16 as in scikit-learn's digits, below a header or none; file
    then says FILE:LINE.

    Folders are searched, with all that is in them, for images and CSV files by their suffixes. A file that cannot be
    read is left out, with the reason on standard error; the exit code is then 1.

    Args:
        run: the run folder; of a comparison, the student that it delivers.
        files: images, CSV files, or folders of them.
        out: write here rather than to standard output, and only when all is predicted.
        finetuned: the student after finetuning on the labelled data.
    """

    run: Run
    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE_OR_FOLDER...", help_behavior_hint="")
    ]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    finetuned: Switch = False

    def __call__(self) -> int:
        run = finished(self.run)
        self._check()
        student, inputs = run.student(self.finetuned), Inputs(run.recipe, self.files, self.out)
        count = 0
        with _sink(self.out) as sink:
            writer = csv.writer(sink, lineterminator="\n")
            writer.writerow(HEADER)
            for count, row in enumerate(predictions(student, inputs, run.recipe.classes), 1):  # noqa: B007 - told below
                writer.writerow(row)
        if self.out is not None:
            print(f"{count} prediction{'s' if count != 1 else ''} in {self.out}")
        if inputs.skipped:
            print(f"metapl: {inputs.skipped} of {inputs.seen} files left out", file=sys.stderr)
        return 1 if inputs.skipped else 0

    def _check(self) -> None:
        if not self.files:
            raise MetaplError(
                f"no files were named; expected images, CSV files or folders: metapl predict {self.run} x.png"
            )
        for path in self.files:
            if not path.exists():
                raise MetaplError(f"there is no file or folder {path}.")
        if self.out is not None and (self.out.is_dir() or not self.out.parent.is_dir()):
            why = "is a folder" if self.out.is_dir() else f"cannot be written: there is no folder {self.out.parent}"
            raise MetaplError(f"--out {self.out} {why}; expected a file in a folder that exists.")


class Inputs:
    """The examples in files and folders, as they are asked for.

    Args:
        recipe: reads the files.
        paths: files and folders.
        out: a file that is not read though it lies in one of the folders.
    """

    def __init__(self, recipe: Recipe, paths: tuple[Path, ...], out: Path | None) -> None:
        self.recipe, self.out, self.seen, self.skipped = recipe, out, 0, 0
        self.files = [file for path in paths for file in (self._within(path) if path.is_dir() else [path])]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            self.seen += 1
            try:
                yield from self.recipe.read(file)
            except MetaplError as error:
                self._skip(str(error))

    def _within(self, folder: Path) -> list[Path]:
        """The readable files of a folder and of those in it, sorted."""
        found = [Path(where) / name for where, _, names in os.walk(folder, onerror=self._unlisted) for name in names]
        ours = sorted(file for file in found if file.suffix.lower() in self.recipe.reads and not self._is_out(file))
        if not ours:
            raise MetaplError(
                f"there is no file in {folder} that can be read; expected {', '.join(self.recipe.reads)}."
            )
        return ours

    def _is_out(self, file: Path) -> bool:
        return self.out is not None and file.resolve() == self.out.resolve()

    def _unlisted(self, error: OSError) -> None:
        self.seen += 1
        self._skip(f"{error.filename}: {error.strerror}")

    def _skip(self, why: str) -> None:
        self.skipped += 1
        print(f"metapl: left out {why}", file=sys.stderr)


def predictions(student: nn.Module, inputs: Inputs, classes: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """File, class and probability of each example, in order."""
    student.eval()
    for batch in _batches(inputs):
        with torch.inference_mode():
            probability_BC = student(torch.stack([x for _, x in batch])).softmax(dim=1)
        best = probability_BC.max(dim=1)
        for (name, _), p, index in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            yield name, classes[index], f"{p:.6f}"


def _batches(inputs: Inputs) -> Iterator[list[tuple[str, Tensor]]]:
    batch: list[tuple[str, Tensor]] = []
    for one in inputs:
        batch.append(one)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _sink(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    with replacing(out) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.flush()
        text.detach()
