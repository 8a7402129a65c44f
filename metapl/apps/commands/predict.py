"""``metapl predict RUN FILE_OR_FOLDER...``"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from metapl.apps.commands.inputs import Inputs, Network, require_finite
from metapl.apps.commands.parse import Run, Switch
from metapl.apps.commands.prediction_grid import PredictionGrid
from metapl.apps.experiments.load_run import LoadedRun, load_run
from metapl.apps.pictures.csv_files import CsvRows, written_csv
from metapl.apps.reports import SOFTWARE
from metapl.errors import MetaplError
from metapl.runs.sealed import irregular
from metapl.words import shown, tell

HEADER = ("file", "class", "probability")


@dataclass(frozen=True)
class Prediction:
    """What one example was taken for.

    Args:
        name: the file, with the line where it holds several.
        probabilities: of all classes, in their order.
        x: what the network was given.
    """

    name: str
    probabilities: tuple[float, ...]
    x: Tensor

    def best(self, count: int) -> list[tuple[int, float]]:
        """The most probable classes, by index, each with its probability; of equals the first."""
        ranked = sorted(range(len(self.probabilities)), key=lambda index: -self.probabilities[index])
        return [(index, self.probabilities[index]) for index in ranked[:count]]


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what a run's network takes pictures for: as CSV, with the columns file, class and probability.

    With --top 3 it adds class_2, probability_2, class_3 and probability_3: the classes that come next. A column for
    each class, called p(cat) say, is added by --probabilities; these sum to 1.

    A picture is read like the training data of the run: it is turned as the camera noted, transparent counts as
    white, and the largest centered square of it is brought to the network's size, in colors or grey. Of runs that were
    trained on crops, it is the middle of that square.

    digits: the digit is to fill the picture, which is averaged over an 8x8 grid, and inverted where it is more bright
    than dark. CSV files are read too: an example a row, 64 numbers from 0 to 16 as in scikit-learn's digits, below a
    header or none; file then says FILE:LINE.

    Folders are searched, with all that is in them, for files by their suffixes. A file that cannot be read is left out,
    with the reason on standard error; the exit code is then 1.

    Args:
        run: the run folder; of a comparison, the run that it delivers.
        files: pictures, or folders of them.
        out: write here rather than to standard output, and only when all is predicted.
        top: how many classes to give of each picture, the most probable first.
        probabilities: give the probability of every class.
        grid: draw a PNG file with each class that was predicted: how many pictures, the most and the least probable.
    """

    run: Run
    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE_OR_FOLDER...", help_behavior_hint="")
    ]
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    top: int = 1
    probabilities: Switch = False
    grid: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png", help_behavior_hint="")] = None
    network: Network = "delivered"

    def __call__(self) -> int:
        run = load_run(self.run)
        classes = run.recipe.classes
        self._check(run)
        name = run.name(self.network)
        network = run.network(name).to(run.device)
        inputs = Inputs(run.recipe, self.files, leave=[file for file in (self.out, self.grid) if file is not None])
        count, grid = 0, PredictionGrid(classes)
        with nullcontext(CsvRows(sys.stdout)) if self.out is None else written_csv(self.out) as writer:
            writer.writerow(self._header(classes))
            escape = shown if self.out is None and sys.stdout.isatty() else str  # a terminal obeys control characters
            for prediction in predictions(network, inputs):
                writer.writerow([*map(escape, self._row(prediction, classes))])
                count += 1
                if self.grid is not None:
                    grid.add(*prediction.best(1)[0], prediction.name, prediction.x)
        if self.out is not None:
            tell(f"{count} prediction{'s' * (count != 1)} in {self.out}")
        if self.grid is not None:
            grid.draw(self.grid, f"{run.title}, {run.titled(name)}")
        if inputs.skipped:
            tell(f"metapl: {inputs.skipped} of {inputs.seen} files left out", file=sys.stderr)
        return 1 if inputs.skipped else 0

    def _header(self, classes: Sequence[str]) -> list[str]:
        more = [f"{name}_{rank}" for rank in range(2, self.top + 1) for name in HEADER[1:]]
        return [*HEADER, *more, *(f"p({name})" for name in classes if self.probabilities)]

    def _row(self, prediction: Prediction, classes: Sequence[str]) -> list[str]:
        best = [cell for index, p in prediction.best(self.top) for cell in (classes[index], _six(p))]
        return [prediction.name, *best, *(_six(p) for p in prediction.probabilities if self.probabilities)]

    def _check(self, run: LoadedRun) -> None:
        classes = run.recipe.classes
        if not 1 <= self.top <= len(classes):
            raise MetaplError(f"--top {self.top} was given; expected 1 to {len(classes)}, the number of classes.")
        if not self.files:
            raise MetaplError(
                f"no files were named; expected pictures, or folders of them: metapl predict {self.run} x.png"
            )
        for path in self.files:
            if not os.path.lexists(path):  # a link that leads nowhere is left out, as other files that cannot be read
                raise MetaplError(f"there is no file or folder {shown(path)}.")
        if self.grid is not None and self.grid.suffix.lower() != ".png":
            raise MetaplError(f"--grid {self.grid} is to be a PNG file; expected a name that ends with .png.")
        check_outputs(
            {"--out": self.out, "--grid": self.grid},
            run=self.run,
            read=self.files,
            suffixes=run.recipe.reads,
            header=",".join(HEADER),
        )


def _six(probability: float) -> str:
    return f"{probability:.6f}"


def predictions(network: nn.Module, inputs: Inputs) -> Iterator[Prediction]:
    """What each example is taken for, in order; the network's device does the work.

    Raises:
        MetaplError: the network gives numbers that are not finite; the files are named.
    """
    network.eval()
    device = next(network.parameters()).device
    for batch in inputs.batches():
        with torch.inference_mode():
            logits_BC = network(torch.stack([x for _, x in batch]).to(device))
        require_finite(logits_BC, [name for name, _ in batch])
        for (name, x), p in zip(batch, logits_BC.softmax(dim=1).tolist(), strict=True):
            yield Prediction(name, tuple(p), x)


def check_outputs(
    outputs: Mapping[str, Path | None], *, run: Path, read: Sequence[Path], suffixes: Sequence[str], header: str
) -> None:
    """Refuse files that cannot be written, or whose content would be lost, before anything is read or written.

    Args:
        outputs: by flag.
        run: the run's folder.
        read: the files and folders to be read.
        suffixes: of the files in these folders that are read.
        header: what a file of predictions begins with.

    A file in a folder that is read may be replaced where an earlier call wrote it.
    """
    given = {flag: file for flag, file in outputs.items() if file is not None}
    for flag, file in given.items():
        _check_kind(flag, file)
        where = file.resolve()
        if where.is_relative_to(run.resolve()):
            raise MetaplError(f"{flag} {file} lies in the run folder {run}; expected a file elsewhere.")
        for path in read:
            source = path.resolve()
            within = where.is_relative_to(source) and where.suffix.lower() in suffixes and where.is_file()
            if where == source or (path.is_dir() and within and not _is_ours(where, header)):
                raise MetaplError(
                    f"{flag} {file} is one of the files to be read, and would be lost; expected another file."
                )
    if len({file.resolve() for file in given.values()}) < len(given):
        raise MetaplError(f"{' and '.join(given)} are the same file; expected one for each.")


STREAMS = ("/dev/std", "/dev/fd/", "/proc/")
"""Names of open files of a process: to replace the file behind one would lose what else is written to it."""


def _check_kind(flag: str, file: Path) -> None:
    """Links are followed: the file that one leads to is replaced."""
    if str(file) == "-" or os.path.abspath(file).startswith(STREAMS):
        instead = " Without --out the table goes to standard output." if flag == "--out" else ""
        raise MetaplError(f"{flag} {file} is a stream; expected a file.{instead}")
    where = Path(os.path.realpath(file))
    if where.is_dir():
        why = "is a folder"
    elif not where.parent.is_dir():
        why = f"cannot be written: there is no folder {where.parent}"
    elif where.is_symlink():
        why = "is a link that leads to itself"
    elif where.exists() and not where.is_file():
        why = f"is {irregular(where.stat().st_mode)}"
    else:
        return
    raise MetaplError(f"{flag} {file} {why}; expected a plain file in a folder that exists.")


def _is_ours(file: Path, header: str) -> bool:
    """Whether an earlier call wrote the file."""
    with file.open("rb") as content:
        if content.read(len(header)) == header.encode():
            return True
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except (UnidentifiedImageError, OSError):
        return False
