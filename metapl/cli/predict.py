"""``metapl predict RUN FILE_OR_FOLDER...``"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import torch
import tyro
from torch import Tensor, nn

from metapl.atomic import replacing
from metapl.cli.finished import Finished, finished, weights_file
from metapl.cli.parse import Run, Switch
from metapl.cli.place import place
from metapl.errors import MetaplError
from metapl.recipes import Recipe
from metapl.report import GRID_SHOWN, Gallery, draw_grid

BATCH = 256
HEADER = ("file", "class", "probability")


@dataclass(frozen=True)
class Prediction:
    """What one example was taken for.

    Args:
        name: the file, with the line where it holds several.
        label: the class of the greatest probability.
        probability: of that.
        x: what the network was given.
    """

    name: str
    label: str
    probability: float
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what a run's student takes pictures for: as CSV, with the columns file, class and probability.

    A picture is read as those that the run was trained on: it is turned as the camera noted, transparent counts as
    white, and the largest centred square of it is brought to the network's size, in colours or grey. Of runs that were
    trained on crops, it is the middle of that square.

    digits: the digit is to fill the picture, which is averaged over an 8x8 grid, and inverted where it is more bright
    than dark. CSV files are read too: an example a row, 64 numbers from 0 to 16 as in scikit-learn's digits, below a
    header or none; file then says FILE:LINE.

    Folders are searched, with all that is in them, for files by their suffixes. A file that cannot be read is left out,
    with the reason on standard error; the exit code is then 1.

    Args:
        run: the run folder; of a comparison, the student that it delivers.
        files: pictures, or folders of them.
        out: write here rather than to standard output, and only when all is predicted.
        grid: draw the first 64 pictures with their classes here, as a PNG file.
        finetuned: the student after finetuning on the labelled data.
    """

    run: Run
    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE_OR_FOLDER...", help_behavior_hint="")
    ]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    grid: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
    finetuned: Switch = False

    def __call__(self) -> int:
        run = finished(self.run)
        self._check()
        student = run.student(self.finetuned).to(place(run.recipe))
        inputs = Inputs(run.recipe, self.files, leave=[file for file in (self.out, self.grid) if file is not None])
        count, first = 0, []
        with _sink(self.out) as sink:
            writer = csv.writer(sink, lineterminator="\n")
            writer.writerow(HEADER)
            for count, one in enumerate(predictions(student, inputs, run.recipe.classes), 1):
                writer.writerow((one.name, one.label, f"{one.probability:.6f}"))
                if self.grid is not None and count <= GRID_SHOWN:
                    first.append(one)
        if self.out is not None:
            print(f"{count} prediction{'s' if count != 1 else ''} in {self.out}")
        if self.grid is not None and first:
            draw_grid(self.grid, _gallery(run, weights_file(self.finetuned), first), total=count)
        if inputs.skipped:
            print(f"metapl: {inputs.skipped} of {inputs.seen} files left out", file=sys.stderr)
        return 1 if inputs.skipped else 0

    def _check(self) -> None:
        if not self.files:
            raise MetaplError(
                f"no files were named; expected pictures, or folders of them: metapl predict {self.run} x.png"
            )
        for path in self.files:
            if not path.exists():
                raise MetaplError(f"there is no file or folder {path}.")
        _check_place("--out", self.out)
        _check_place("--grid", self.grid)
        if self.grid is not None and self.grid.suffix.lower() != ".png":
            raise MetaplError(f"--grid {self.grid} is to be a PNG file; expected a name that ends with .png.")


def _check_place(flag: str, file: Path | None) -> None:
    """Refuse a file that cannot be written before anything is predicted."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "is a folder" if file.is_dir() else f"cannot be written: there is no folder {file.parent}"
        raise MetaplError(f"{flag} {file} {why}; expected a file in a folder that exists.")


def _gallery(run: Finished, weights: str, shown: Sequence[Prediction]) -> Gallery:
    """Pictures as the network sees them, each with its class, probability and file."""
    return Gallery(
        title=f"What the student takes {'it' if len(shown) == 1 else 'them'} for",
        note=f"{run.title}, {weights}",
        pictures=torch.stack([one.x for one in shown]).clamp(0, 1),
        captions=tuple(f"{one.label}  {one.probability:.0%}\n{Path(one.name).name}" for one in shown),
    )


class Inputs:
    """The examples in files and folders, as they are asked for.

    Args:
        recipe: reads the files.
        paths: files and folders.
        leave: files that are not read though they lie in one of the folders.
    """

    def __init__(self, recipe: Recipe, paths: Sequence[Path], leave: Sequence[Path] = ()) -> None:
        self.recipe, self.seen, self.skipped = recipe, 0, 0
        self.leave = {file.resolve() for file in leave}
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
        ours = sorted(file for file in found if file.suffix.lower() in self.recipe.reads and not self._is_left(file))
        if not ours:
            raise MetaplError(
                f"there is no file in {folder} that can be read; expected {', '.join(self.recipe.reads)}."
            )
        return ours

    def _is_left(self, file: Path) -> bool:
        return bool(self.leave) and file.resolve() in self.leave

    def _unlisted(self, error: OSError) -> None:
        self.seen += 1
        self._skip(f"{error.filename}: {error.strerror}")

    def _skip(self, why: str) -> None:
        self.skipped += 1
        print(f"metapl: left out {why}", file=sys.stderr)


def predictions(student: nn.Module, inputs: Inputs, classes: tuple[str, ...]) -> Iterator[Prediction]:
    """What each example is taken for, in order; the network's device does the work."""
    student.eval()
    device = next(student.parameters()).device
    for batch in _batches(inputs):
        with torch.inference_mode():
            probability_BC = student(torch.stack([x for _, x in batch]).to(device)).softmax(dim=1)
        best = probability_BC.max(dim=1)
        for (name, x), p, index in zip(batch, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(name, classes[index], p, x)


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
