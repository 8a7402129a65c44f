"""``metapl predict RUN FILE_OR_FOLDER...``"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn

from metapl.apps.inputs import Factory, Inputs, Network, Run, check_file, plural
from metapl.apps.labeling import refuse_infinite
from metapl.apps.printing import CsvRows, tell, written_csv
from metapl.apps.progress import count_bar
from metapl.errors import MetaplError
from metapl.metrics.predictions import logits_of
from metapl.run_folder import EndedRun
from metapl.words import shown

HEADER = ("file", "class", "probability")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the classes of pictures by a run's network, as CSV.

    The columns are file, class and probability. With --top 3 there are also class_2, probability_2,
    class_3 and probability_3: the classes that come next. With --probabilities there is a column
    for each class, such as p(cat); these sum to 1. A name that a spreadsheet would take for a
    formula, such as =held or +, begins with an apostrophe.

    A picture is read like the training data of the run: its largest centered square is resized to
    the network's size, in colors or grey. For runs that were trained on crops, the middle of that
    square is taken. A picture of a digit should be filled by the digit; it is inverted if it is
    more bright than dark.

    Folders are searched for pictures, with all folders in them. A file that cannot be read is left
    out, with the reason on standard error; the exit code is then 1.

    Args:
        folder: folder of a run.
        files: pictures, or folders of pictures.
        out: new file to write to in the place of standard output. It is written when all is
            predicted.
        top: number of classes to give of each picture, the most probable first.
        probabilities: give the probability of every class too.
    """

    folder: Run
    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE_OR_FOLDER...")
    ]
    out: Path | None = None
    top: int = 1
    probabilities: bool = False
    network: Network = "delivered"
    factory: Factory = None

    def run(self) -> int:
        """Print or write the predictions; return 1 where files were left out."""
        run = EndedRun.load(self.folder)
        classes = run.classes
        name = run.name(self.network)
        if not 1 <= self.top <= len(classes):
            raise MetaplError(
                f"--top {self.top} was given; expected 1 to {len(classes)}, the number of classes."
            )
        if not self.files:
            raise MetaplError("no picture was named; expected metapl predict RUN FILE_OR_FOLDER...")
        for path in self.files:
            # A link that leads nowhere is left out, as other files that cannot be read.
            if not os.path.lexists(path):
                raise MetaplError(f"there is no file or folder {shown(path)}.")
        check_file(self.out, ".csv")
        if self.out is not None and self.out.exists():
            raise MetaplError(
                f"--out {self.out} is there already; expected the name of a new file."
            )
        network = run.network(name, self.factory).to(run.device)
        inputs = Inputs(run.cards[name].input, self.files)
        count = 0
        # Rows on a terminal show by themselves how far it is.
        is_bar_shown = self.out is not None or not sys.stdout.isatty()
        header = list(HEADER)
        for rank in range(2, self.top + 1):
            header += [f"class_{rank}", f"probability_{rank}"]
        if self.probabilities:
            header += [f"p({label})" for label in classes]
        rows: AbstractContextManager[CsvRows] = nullcontext(CsvRows(sys.stdout))
        if self.out is not None:
            rows = written_csv(self.out)
        with rows as writer, count_bar("pictures", is_bar_shown, len(inputs.files)) as update:
            writer.writerow(header)
            for example, p in predictions(network, inputs):
                row = [example]
                for index in sorted(range(len(p)), key=lambda index: -p[index])[: self.top]:
                    row += [classes[index], f"{p[index]:.6f}"]
                if self.probabilities:
                    row += [f"{probability:.6f}" for probability in p]
                writer.writerow(row)
                count += 1
                update(count + inputs.skipped)
        if self.out is not None:
            tell(f"{plural(count, 'prediction')} in {self.out}")
        if inputs.skipped:
            tell(f"metapl: {inputs.skipped} of {len(inputs.files)} files left out", file=sys.stderr)
        return 1 if inputs.skipped else 0


def predictions(network: nn.Module, inputs: Inputs) -> Iterator[tuple[str, list[float]]]:
    """Yield each example's place and probabilities; refuse those that are not finite."""
    for names, x in inputs.batches():
        logits_BC = logits_of(network, [x])
        refuse_infinite(logits_BC, names)
        yield from zip(names, logits_BC.softmax(dim=1).tolist(), strict=True)
