"""``metapl predict RUN FILE_OR_FOLDER...``"""

from __future__ import annotations

import bisect
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from metapl.apps.commands.inputs import Inputs, Network, check_file, counted
from metapl.apps.commands.parse import Command, File, Run, Switch, unset
from metapl.apps.experiments.folder import load_run
from metapl.apps.experiments.labeling import refuse_infinite
from metapl.apps.pictures.csv_files import CsvRows, written_csv
from metapl.apps.reports.canvas import SOFTWARE
from metapl.apps.reports.gallery import MOST_GROUPS, Gallery, draw_grid, pictures_a_group
from metapl.apps.words import tell
from metapl.errors import MetaplError, few
from metapl.metrics.predictions import logits_of
from metapl.words import shown

HEADER = ("file", "class", "probability")


@dataclass(frozen=True, kw_only=True)
class Predict(Command):
    """Say what a run's network takes pictures for: as CSV, with the columns file, class and probability.

    With --top 3 it adds class_2, probability_2, class_3 and probability_3: the classes that come next. A column for
    each class, called p(cat) say, is added by --probabilities; these sum to 1.

    A picture is read like the training data of the run: turned as the camera noted, transparent as white, the largest
    centered square of it brought to the network's size, in colors or grey; of runs that were trained on crops, the
    middle of that square.

    digits: the digit is to fill the picture, which is averaged over an 8x8 grid, and inverted where it is more bright
    than dark. CSV files are read too: an example a row, 64 numbers from 0 to 16 as in scikit-learn's digits, below a
    header or none; file then says FILE:LINE.

    Folders are searched, with all that is in them, for files by their suffixes. A file that cannot be read is left out,
    with the reason on standard error; the exit code is then 1.

    Args:
        folder: the run folder; of a comparison, the run that it delivers.
        files: pictures, or folders of them.
        out: write here rather than to standard output, and only when all is predicted.
        top: how many classes to give of each picture, the most probable first.
        probabilities: give the probability of every class.
        grid: draw a PNG file with each class that was predicted: how many pictures, the most and the least probable.
    """

    folder: Run
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, unset("FILE_OR_FOLDER...")]
    out: File = None
    top: int = 1
    probabilities: Switch = False
    grid: Annotated[Path | None, unset("FILE.png")] = None
    network: Network = "delivered"

    def run(self) -> int:
        run = load_run(self.folder)
        classes, name = run.recipe.classes, run.name(self.network)
        if not 1 <= self.top <= len(classes):
            raise MetaplError(f"--top {self.top} was given; expected 1 to {len(classes)}, the number of classes.")
        for path in self.files:
            if not os.path.lexists(path):  # a link that leads nowhere is left out, as other files that cannot be read
                raise MetaplError(f"there is no file or folder {shown(path)}.")
        check_file("--grid", self.grid, ".png")
        check_file("--out", self.out)
        outputs = {flag: file for flag, file in (("--out", self.out), ("--grid", self.grid)) if file is not None}
        for flag, file in outputs.items():
            self._refuse_loss(flag, file, run.recipe.reads)
        if len({file.resolve() for file in outputs.values()}) < len(outputs):
            raise MetaplError("--out and --grid are the same file; expected one for each.")
        network = run.network(name).to(run.device)
        inputs = Inputs(run.recipe, self.files, leave=[*outputs.values()])
        count, grid = 0, PredictionGrid(classes)
        more = [f"{column}_{rank}" for rank in range(2, self.top + 1) for column in HEADER[1:]]
        with nullcontext(CsvRows(sys.stdout)) if self.out is None else written_csv(self.out) as writer:
            writer.writerow([*HEADER, *more, *(f"p({label})" for label in classes if self.probabilities)])
            escape = shown if self.out is None and sys.stdout.isatty() else str  # a terminal obeys control characters
            for example, p, x in predictions(network, inputs):
                ranked = sorted(range(len(p)), key=lambda index: -p[index])[: self.top]
                best = [cell for index in ranked for cell in (classes[index], f"{p[index]:.6f}")]
                shares = [f"{share:.6f}" for share in p if self.probabilities]
                writer.writerow([*map(escape, (example, *best, *shares))])
                count += 1
                if self.grid is not None:
                    grid.add(ranked[0], p[ranked[0]], example, x)
        if self.out is not None:
            tell(f"{counted(count, 'prediction')} in {self.out}")
        if self.grid is not None and count:
            grid.draw(self.grid, f"{run.title}, {run.titled(name)}")
        if inputs.skipped:
            tell(f"metapl: {inputs.skipped} of {inputs.seen} files left out", file=sys.stderr)
        return 1 if inputs.skipped else 0

    def _refuse_loss(self, flag: str, file: Path, suffixes: Sequence[str]) -> None:
        """Refuse a file whose content would be lost; one that an earlier call wrote may be replaced."""
        where = file.resolve()
        if where.is_relative_to(self.folder.resolve()):
            raise MetaplError(f"{flag} {file} lies in the run folder {self.folder}; expected a file elsewhere.")
        for path in self.files:
            source = path.resolve()
            within = where.is_relative_to(source) and where.suffix.lower() in suffixes and where.is_file()
            if where == source or (path.is_dir() and within and not _is_ours(where)):
                raise MetaplError(f"{flag} {file} is one of the files to be read, and would be lost; expected another.")


def _is_ours(file: Path) -> bool:
    with file.open("rb") as content:
        head = content.read(1000)
    return head.startswith(",".join(HEADER).encode()) or f"Software\0{SOFTWARE}".encode() in head


def predictions(network: nn.Module, inputs: Inputs) -> Iterator[tuple[str, list[float], Tensor]]:
    """Of each example: where it stands, its probabilities, and what the network was given; never what is not finite."""
    for batch in inputs.batches():
        logits_BC = logits_of(network, [torch.stack([x for _, x in batch])])
        refuse_infinite(logits_BC, [name for name, _ in batch])
        for (name, x), p in zip(batch, logits_BC.softmax(dim=1).tolist(), strict=True):
            yield name, p, x


class PredictionGrid:
    """Collects predictions one by one, and draws each class's surest and least sure pictures: as many as a page has
    room for, eight at most and fewer the more classes there are."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.counts: Counter[int] = Counter()
        self._seen: dict[int, list[tuple[float, str, Tensor]]] = {}  # probability, name, picture

    def add(self, index: int, probability: float, name: str, x: Tensor) -> None:
        """An example (C, H, W), in [0, 1], that was taken for class ``index``."""
        picture = (x.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        kept = self._seen.setdefault(index, [])
        bisect.insort(kept, (probability, name, picture), key=lambda seen: -seen[0])
        self.counts[index] += 1
        # More classes leave less room for each. What stands in the middle now stays there, whatever comes.
        for group in self._seen.values() if len(kept) == 1 else [kept]:
            most = pictures_a_group(len(self._seen))
            while len(group) > most:
                del group[most // 2]

    def draw(self, path: Path, source: str) -> None:
        drawn = sorted(index for index, _ in self.counts.most_common(MOST_GROUPS))
        groups = []
        for index in drawn:
            probabilities, names, pictures = zip(*self._seen[index], strict=True)
            captions = tuple(f"{p:.1%}\n{Path(name).name}" for p, name in zip(probabilities, names, strict=True))
            groups.append(
                Gallery(self.classes[index], counted(self.counts[index], "picture"), torch.stack(pictures), captions)
            )
        total, predicted = self.counts.total(), len(self.counts)
        notes = [f"{source}; {counted(total, 'picture')}, {predicted:,} of {len(self.classes):,} classes predicted"]
        if len(drawn) < predicted:
            notes.append(f"shown: the {len(drawn):,} with the most pictures")
        if max(self.counts.values()) > (each := pictures_a_group(predicted)):
            half = f"{each // 2} " if each > 2 else ""
            notes.append(f"of a class with more than {each}: the {half}most and the {half}least probable")
        absent = [name for index, name in enumerate(self.classes) if index not in self.counts]
        if absent:
            notes.append(f"never predicted: {few(absent)}")
        draw_grid(path, "What the pictures were taken for", "; ".join(notes), groups)
