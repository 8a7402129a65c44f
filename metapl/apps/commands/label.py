"""``metapl label RUN PICTURES --out STORE``"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from metapl.apps.commands.inputs import Network
from metapl.apps.commands.labels import kept
from metapl.apps.commands.parse import Command, Run, Switch, unset
from metapl.apps.experiments.folder import load_run, weights_file
from metapl.apps.experiments.labeling import BATCH, provenance, rows_per_part, to_label, write_labels
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.recipes.settings import MOST_IN_A_BATCH
from metapl.errors import MetaplError, few
from metapl.runs.fields import Range
from metapl.runs.sealed import sha256_of
from metapl.training.options import MOST_WORKERS
from metapl.words import tell


@dataclass(frozen=True, kw_only=True)
class Label(Command):
    """Store the class probabilities that a run's network gives many pictures, to train other networks on.

    The network runs in eval mode, without dropout and other noise, on pictures as they are: read like the training data
    of the run, and not augmented. The labels go to a folder of Parquet files, part by part. What is stopped, by Ctrl-C
    or otherwise, goes on with --resume, and ends with the same files.

    PICTURES is a folder, in which all folders are searched; or a data set by its name: digits, or cifar10, cifar100,
    svhn, imagenet or imagefolder as torchvision keeps them, of which the training pictures are labeled. In the store, a
    picture of a folder is called by its path there, and one of a data set by its number.

    A file that cannot be read is left out, with the reason on standard error; the exit code is then 1. So it is where
    one cannot be read any more whose labels are in the store that is gone on with; it keeps them.

    Needs pip install 'metapl[labels]'.

    Args:
        folder: the run folder; of a comparison, the run that it delivers.
        pictures: a folder of pictures, or the name of a data set.
        out: the folder of the store; made if need be.
        temperature: of the softmax: below 1 sharpens the probabilities, above 1 evens them out.
        top_k: keep this many of the greatest probabilities of a picture, with their classes; by default all are kept.
            When the store is read, the rest is spread evenly over the other classes.
        data_root: the folder that torchvision calls so, for its data sets; by default the one of the run.
        batch: pictures in a pass of the network.
        num_workers: number of processes that read pictures; it only changes the speed.
        resume: go on with the store that is there.
    """

    folder: Run
    pictures: Annotated[str, tyro.conf.Positional, unset("PICTURES")]
    out: Annotated[Path, tyro.conf.arg(metavar="STORE")]
    temperature: Annotated[float, Range(above=0)] = 1.0
    top_k: Annotated[int | None, unset("K")] = None
    network: Network = "delivered"
    data_root: Annotated[str | None, unset("DIR")] = None
    batch: Annotated[int, Range(1, most=MOST_IN_A_BATCH)] = BATCH
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    resume: Switch = False

    def run(self) -> int:
        run = load_run(self.folder)
        name, classes = run.name(self.network), run.recipe.classes
        if self.top_k is not None and not 1 <= self.top_k <= len(classes):
            raise MetaplError(
                f"--top-k {self.top_k} was given; expected 1 to {len(classes):,}, the number of classes, or no --top-k "
                "for all of them."
            )
        network = run.network(name).to(run.device)
        labeled = to_label(self.pictures, run.recipe, self.batch, self.data_root)
        writer = LabelWriter(
            self.out,
            classes,
            top_k=self.top_k,
            provenance={
                "run": str(self.folder),
                "model": {
                    "recipe": run.recipe.name,
                    "method": run.result["method"],
                    "seed": run.result["seed"],
                    "network": name,
                    "weights_sha256": sha256_of(run.folder.path / weights_file(name)),
                },
                **provenance(network, labeled, run.recipe, temperature=self.temperature),
            },
            rows_per_part=rows_per_part(len(labeled.ids)),
            resume=self.resume,
        )
        unread: list[str] = []
        with writer:
            try:
                write_labels(
                    network,
                    labeled,
                    writer,
                    temperature=self.temperature,
                    num_workers=self.num_workers,
                    skip=lambda reason: tell(f"metapl: left out {reason}", file=sys.stderr),
                    unread=unread.append,
                    tell_progress=True,
                )
            except KeyboardInterrupt:
                tell(f"\nmetapl: {writer.rows:,} labels are in {self.out}; go on with --resume.", file=sys.stderr)
                raise
        store = LabelStore(self.out)
        tell(f"{self.out}: labels of {len(store):,} pictures, {len(store.classes):,} classes, {kept(self.top_k)}")
        tell(f"what is in it: metapl labels stats {self.out}")
        left_out = len(labeled.ids) - len(store)
        if left_out:
            tell(f"metapl: {left_out:,} of {len(labeled.ids):,} files left out", file=sys.stderr)
        if unread:
            files = "1 file" if len(unread) == 1 else f"{len(unread):,} files"
            tell(f"metapl: {files} that were labeled before cannot be read now: {few(unread)}", file=sys.stderr)
        return 1 if left_out or unread else 0
