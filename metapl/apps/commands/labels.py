"""``metapl labels stats STORE`` and ``metapl labels select STORE --out STORE2``"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.commands.folders import check_file
from metapl.apps.commands.parse import Command, File, Switch, unset
from metapl.apps.labels import LabelStore
from metapl.apps.labels.drawing import draw_statistics
from metapl.apps.labels.files import store_around
from metapl.apps.labels.queries import BINS, Statistics, select, statistics
from metapl.errors import MetaplError, few
from metapl.training.progress import counting
from metapl.words import short, shown, table, tell

Store = Annotated[Path, tyro.conf.Positional, unset("STORE")]
"""The folder of a store, by its place."""

MOST_CLASSES, LISTED, BAR = 30, 10, 40
"""Classes that are all shown; of more, so many of the largest and the smallest. Letters of a bar."""

SELECTED = {
    "dropped_overlap_with": "without the pictures of a folder",
    "threshold": "confidence above {}",
    "per_class": "at most {} a class",
    "any_class": "by the probability of any class",
    "balance": "balanced",
}
"""What a selection is asked for, in words."""


@dataclass(frozen=True, kw_only=True)
class Stats(Command):
    """Say what is in a store of labels: examples of each class, how confident the labels are, and their entropy.

    The class of an example is its most probable one, and the confidence is the probability of that.

    Args:
        store: its folder.
        json: print JSON.
        png: draw it too, as a PNG file.
    """

    store: Store
    json: Switch = False
    png: File = None

    def run(self) -> int:
        check_file("--png", self.png, ".png")
        if self.png is not None and (around := store_around(self.png)) is not None:
            raise MetaplError(f"--png {self.png} lies in the store {around}; expected a file elsewhere.")
        store = LabelStore(self.store)
        found = statistics(store)
        if self.json:
            about = {"store": str(self.store), "top_k": store.top_k, "provenance": dict(store.provenance)}
            tell(json.dumps({**about, **found.to_json()}, indent=2))
        else:
            tell(f"{_heading(store, found)}\n\n{_by_class(found)}\n\n{_histograms(found)}")
        if self.png is not None:
            draw_statistics(self.png, found, str(self.store))
            tell(f"metapl: drawn in {self.png}", file=sys.stderr)
        return 0


@dataclass(frozen=True, kw_only=True)
class Select(Command):
    """Write a store of some of the examples of another one, as the papers select and balance their pictures.

    What is asked for is done in this order: pictures that stand in a folder are dropped; those with a confidence above
    a threshold are kept; of each class, the most confident; and classes that have fewer are filled up by duplication.
    Of pictures that are equally confident, those come first whose names do. The same store and flags give the same
    files. Duplicates are not stored twice: each picture has the number of times that it counts.

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
        if found.missing:
            tell(f"metapl: note: nothing is left of {few(found.missing)}.", file=sys.stderr)
        tell(f"what is in it: metapl labels stats {self.out}")
        return 0


COMMANDS = {"stats": Stats, "select": Select}


# ------------------------------------------------------------------------------------------------------- what is shown


def kept(top_k: int | None) -> str:
    """How much of each distribution is stored."""
    return "all probabilities" if top_k is None else f"the {top_k} greatest probabilities"


def _heading(store: LabelStore, found: Statistics) -> str:
    """What is stored, and what the store says of it, which may be anything where somebody else wrote it."""
    copies = f", {found.copies:,} with copies" * (found.copies != found.rows)
    lines = [f"{store.folder}: {found.rows:,} examples{copies}, {len(found.classes):,} classes, {kept(store.top_k)}"]
    about = store.provenance
    model, selected = about.get("model"), about.get("selected")
    if isinstance(model, dict):
        what = ", ".join(str(model[name]) for name in ("recipe", "method", "network") if name in model)
        lines.append(f"by {about.get('run')} ({what}), temperature {about.get('temperature')}")
    if "pictures" in about:
        lines.append(f"of {about['pictures']}, {str(about.get('begun'))[:10]}")
    lines += [_asked(asked) for asked in (selected if isinstance(selected, list) else []) if isinstance(asked, dict)]
    return "\n".join(lines)


def _asked(selected: Mapping[str, Any]) -> str:
    given = {name: value for name, value in selected.items() if value is not None and value is not False}
    told = {name: f"{value:,}" if type(value) is int else value for name, value in given.items()}
    words = ", ".join(words.format(told[name]) for name, words in SELECTED.items() if name in told)
    return f"selected from {told.get('of_rows')}: {words}"


def _by_class(found: Statistics) -> str:
    order, note, classes = [*range(len(found.classes))], "", len(found.classes)
    if classes > MOST_CLASSES:
        order.sort(key=lambda label: -found.counts[label])
        order = [*order[:LISTED], *order[-LISTED:]]
        empty = found.counts.count(0)
        note = f"\n(the {LISTED} largest and the {LISTED} smallest of {classes:,} classes"
        note += f"; {empty:,} have no example)" if empty else ")"
    copied = found.copies != found.rows
    rows: list[tuple[str, ...]] = [("class", "examples", *["with copies"] * copied, "share", "mean confidence")]
    for label in order:
        mean, copies = found.class_confidence[label], found.class_copies[label]
        confidence = "-" if mean is None else f"{mean:.1%}"
        counts = (f"{found.counts[label]:,}", *[f"{copies:,}"] * copied)
        rows.append((short(found.classes[label]), *counts, f"{copies / found.copies:.1%}", confidence))
    return table(rows) + note


def _histograms(found: Statistics) -> str:
    most = found.greatest_entropy
    return (
        f"confidence: mean {found.mean_confidence:.1%}\n{_bars(found.confidence, 1.0)}\n\n"
        f"entropy: mean {found.mean_entropy:.2f} of at most {most:.2f} nats\n{_bars(found.entropy, most)}"
    )


def _bars(counts: Sequence[int], top: float) -> str:
    """A histogram in lines, two bins a line."""
    pairs = [counts[i] + counts[i + 1] for i in range(0, BINS, 2)]
    edges = [f"{top * edge / len(pairs):.2f}" for edge in range(len(pairs) + 1)]
    width = max(len(f"{count:,}") for count in pairs)
    return "\n".join(
        f"  {low} to {high}  {count:>{width},}  {'#' * round(BAR * count / max(*pairs, 1))}".rstrip()
        for low, high, count in zip(edges, edges[1:], pairs, strict=False)
    )
