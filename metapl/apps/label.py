"""``metapl label RUN PICTURES``, and ``metapl labels stats`` and ``select``, of what it stores."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from os.path import relpath
from pathlib import Path
from typing import Annotated

import tyro

from metapl.apps.inputs import Factory, Network, Run, Switch, counted, unset
from metapl.apps.labeling import BATCH, provenance, rows_per_part, to_label, write_labels
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels.queries import Statistics, select, statistics
from metapl.apps.machine.progress import counting
from metapl.apps.machine.sealed import sha256_of, write_whole
from metapl.apps.run import WEIGHTS, EndedRun
from metapl.apps.settings import MOST_IN_A_BATCH
from metapl.apps.words import short, table, tell
from metapl.errors import few
from metapl.runs.fields import Range
from metapl.training.options import MOST_WORKERS
from metapl.words import shown

Store = Annotated[Path, tyro.conf.Positional, unset("STORE")]

LIST = "list.txt"  # in a selection's folder: the paths of its pictures

# Classes that are all shown; of more, so many of the largest and the smallest.
MOST_CLASSES, LISTED = 30, 10


@dataclass(frozen=True, kw_only=True)
class Label:
    """Store the class probabilities that a run's network gives many pictures, to train other networks on.

    The network runs in eval mode on pictures as they are. The labels go to a folder of Arrow files, part by part. What
    is stopped goes on with --resume, and ends with the same files. In the store, a picture is called by its path in
    PICTURES, and a digit by its number. A file that cannot be read is left out, with the reason on standard error; the
    exit code is then 1. Needs pip install 'metapl[labels]'.

    Args:
        folder: the run folder; of a comparison, the run that it delivers.
        pictures: a folder of pictures, or digits.
        out: the folder of the store; made if need be.
        temperature: of the softmax: below 1 sharpens the probabilities, above 1 evens them out.
        top_k: keep this many of the greatest probabilities of a picture, with their classes; by default all are kept.
            When the store is read, the rest is spread evenly over the other classes.
        batch: pictures in a pass of the network.
        num_workers: number of processes that read pictures; it only changes the speed.
        resume: go on with the store that is there.
        check: compare all pictures that are labeled already with what they were, not 1,000 of them.
    """

    folder: Run
    pictures: Annotated[str, tyro.conf.Positional, unset("PICTURES")]
    out: Annotated[Path, tyro.conf.arg(metavar="STORE")]
    temperature: Annotated[float, Range(above=0)] = 1.0
    top_k: Annotated[int | None, unset("K")] = None
    network: Network = "delivered"
    factory: Factory = None
    batch: Annotated[int, Range(1, most=MOST_IN_A_BATCH)] = BATCH
    num_workers: Annotated[int, Range(0, most=MOST_WORKERS)] = 0
    resume: Switch = False
    check: Switch = False

    def run(self) -> int:
        run = EndedRun.load(self.folder)
        name, classes = run.name(self.network), run.classes
        reads = run.cards[name].input
        network = run.network(name, self.factory).to(run.device)
        labeled = to_label(self.pictures, reads, self.batch)
        model = {key: run.result[key] for key in ("recipe", "method", "seed")}
        model |= {"network": name, "weights_sha256": sha256_of(run.folder.path / WEIGHTS[name])}
        about = provenance(network, labeled, temperature=self.temperature)
        writer = LabelWriter(
            self.out,
            classes,
            top_k=self.top_k,
            provenance={"run": str(self.folder), "model": model, **about},
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
                    check=self.check,
                    skip=lambda reason: tell(f"metapl: left out {reason}", file=sys.stderr),
                    unread=unread.append,
                    tell_progress=True,
                )
            except KeyboardInterrupt:
                tell(f"\nmetapl: {writer.rows:,} labels are in {self.out}; go on with --resume.", file=sys.stderr)
                raise
        store = LabelStore(self.out)
        tell(f"{self.out}: labels of {len(store):,} pictures, {len(store.classes):,} classes, {_kept(self.top_k)}")
        tell(f"what is in it: metapl labels stats {self.out}")
        left_out = len(labeled.ids) - len(store)
        if left_out:
            tell(f"metapl: {left_out:,} of {len(labeled.ids):,} files left out", file=sys.stderr)
        if unread:
            files = f"{counted(len(unread), 'file')} that were labeled before cannot be read now: {few(unread)}"
            tell(f"metapl: {files}", file=sys.stderr)
        return 1 if left_out or unread else 0


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Say what is in a store of labels: examples of each class, how confident the labels are, and their entropy.

    The class of an example is its most probable one, and the confidence is the probability of that.

    Args:
        store: its folder.
        json: print JSON.
    """

    store: Store
    json: Switch = False

    def run(self) -> int:
        store = LabelStore(self.store)
        found = statistics(store)
        if self.json:
            about = {"store": str(self.store), "top_k": store.top_k, "provenance": dict(store.provenance)}
            tell(json.dumps({**about, **asdict(found)}, indent=2))
        else:
            tell(f"{_heading(store, found)}\n\n{_by_class(found)}\n")
            tell(f"mean confidence {found.mean_confidence:.1%}, mean entropy {found.mean_entropy:.2f} nats")
        return 0


@dataclass(frozen=True, kw_only=True)
class Select:
    """Write a store of some of the examples of another one, as the papers select and balance their pictures.

    In this order: pictures that stand in a folder are dropped; those with a confidence above a threshold are kept; of
    each class, the most confident, of equals those whose names come first; and classes that have fewer are filled up by
    counting pictures more than once. Beside a selection of files stands list.txt with their paths, which --unlabeled of
    metapl train images takes in the place of a folder.

    Args:
        store: its folder.
        out: folder of the new store; made if need be.
        threshold: keep what the teacher gave a probability above this; 0.3 in Noisy Student.
        per_class: the most examples of a class, by the most probable class of each; 130000 in Noisy Student.
        any_class: of each class, keep the --per-class examples with the greatest probability of it, whatever their most
            probable class is; with 12800, the filter of Meta Pseudo Labels' ResNet-50.
        balance: duplicate examples of classes that have fewer than --per-class, or without it than the largest class.
        drop_overlap: drop pictures whose file has the same bytes as one in this folder, such as your test pictures.
        resume: go on with a selection that was stopped.
    """

    store: Store
    out: Annotated[Path, tyro.conf.arg(metavar="STORE2")]
    threshold: Annotated[float | None, unset()] = None
    per_class: Annotated[int | None, unset("N")] = None
    any_class: Switch = False
    balance: Switch = False
    drop_overlap: Annotated[Path | None, unset("FOLDER")] = None
    resume: Switch = False

    def run(self) -> int:
        asked = {name: value for name, value in vars(self).items() if name not in ("store", "out")}
        with counting("examples", shown=True) as update:
            found = select(LabelStore(self.store), self.out, **asked, progress=update)
        whose = "of any class" if self.any_class else "of its class"
        lines = [
            (True, found.rows, "examples in the store"),
            (self.drop_overlap is not None, found.overlapping, f"dropped: in {shown(self.drop_overlap)}"),
            (found.unread > 0, found.unread, f"files cannot be read in {shown(self.drop_overlap)}"),
            (self.threshold is not None, found.unsure, f"dropped: confidence not above {self.threshold or 0:g}"),
            (self.per_class is not None, found.beyond, f"dropped: not among the {self.per_class or 0:,} {whose}"),
            (True, found.kept, "kept"),
            (found.copies != found.kept, found.copies, "with copies"),
        ]
        width = len(f"{max(found.rows, found.copies):,}")
        tell("\n".join(f"{number:>{width},}  {text}" for known, number, text in lines if known))
        chosen = LabelStore(self.out)
        pictures = Path(str(chosen.provenance.get("pictures")))
        if pictures.is_dir():
            paths = "".join(f"{relpath(pictures / str(name), self.out)}\n" for name in chosen)
            write_whole(self.out / LIST, paths.encode("utf-8", "surrogateescape"), "make room, and select again.")
        if found.missing:
            tell(f"metapl: note: nothing is left of {few(found.missing)}.", file=sys.stderr)
        tell(f"what is in it: metapl labels stats {self.out}")
        return 0


COMMANDS = {"stats": Stats, "select": Select}


def _kept(top_k: int | None) -> str:
    return "all probabilities" if top_k is None else f"the {top_k} greatest probabilities"


def _heading(store: LabelStore, found: Statistics) -> str:
    copies = f", {found.copies:,} with copies" * (found.copies != found.rows)
    lines = [f"{store.folder}: {found.rows:,} examples{copies}, {len(found.classes):,} classes, {_kept(store.top_k)}"]
    about = store.provenance
    if "model" in about:
        what = ", ".join(about["model"][name] for name in ("recipe", "method", "network"))
        lines.append(f"by {about['run']} ({what}), temperature {about['temperature']}")
    if "pictures" in about:
        lines.append(f"of {about['pictures']}, {about['begun'][:10]}")
    for asked in about.get("selected", []):
        given = [f"{name} {value}" for name, value in asked.items() if value and not name.startswith("of_")]
        lines.append(f"selected from {asked['of_rows']:,}: {', '.join(given)}")
    return "\n".join(lines)


def _by_class(found: Statistics) -> str:
    order, note, classes = [*range(len(found.classes))], "", len(found.classes)
    if classes > MOST_CLASSES:
        order.sort(key=lambda label: -found.counts[label])
        order = [*order[:LISTED], *order[-LISTED:]]
        note = f"\n(the {LISTED} largest and the {LISTED} smallest of {classes:,} classes)"
    rows = [("class", "examples", "with copies", "share", "mean confidence")]
    for label in order:
        mean, copies = found.class_confidence[label], found.class_copies[label]
        confidence, share = "-" if mean is None else f"{mean:.1%}", f"{copies / found.copies:.1%}"
        rows.append((short(found.classes[label]), f"{found.counts[label]:,}", f"{copies:,}", share, confidence))
    return table(rows) + note
