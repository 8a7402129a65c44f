"""``metapl labels stats STORE`` and ``metapl labels select STORE --out STORE2``"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from metapl.apps.commands.parse import Switch
from metapl.apps.labels import LabelStore
from metapl.apps.labels.drawing import draw_statistics
from metapl.apps.labels.files import store_around
from metapl.apps.labels.queries import BINS, Statistics, select, statistics
from metapl.errors import MetaplError, few
from metapl.runs.sealed import refuse_irregular
from metapl.training.progress import counting
from metapl.words import short, shown, table, tell

Store = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE", help_behavior_hint="")]
"""The folder of a store, by its place."""

MOST_CLASSES, LISTED, BAR = 30, 10, 40
"""Classes that are all shown; of more, so many of the largest and the smallest. Letters of a bar."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Say what is in a store of labels: examples of each class, how confident the labels are, and their entropy.

    The class of an example is its most probable one, and the confidence is the probability of that.

    Args:
        store: its folder.
        json: print JSON.
        png: draw it too, as a PNG file.
    """

    store: Store
    json: Switch = False
    png: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None

    def __call__(self) -> int:
        if self.png is not None and self.png.suffix.lower() != ".png":
            raise MetaplError(f"--png {self.png} is to be a PNG file; expected a name that ends with .png.")
        if self.png is not None:
            _check_picture(self.png)
        store = LabelStore(self.store)
        content = statistics(store)
        if self.json:
            about = {"store": str(self.store), "top_k": store.top_k, "provenance": dict(store.provenance)}
            tell(json.dumps({**about, **content.to_json()}, indent=2))
        else:
            tell(f"{_heading(store, content)}\n\n{_by_class(content)}\n\n{_histograms(content)}")
        if self.png is not None:
            draw_statistics(self.png, content, str(self.store))
            tell(f"metapl: drawn in {self.png}", file=sys.stderr)
        return 0


def _check_picture(png: Path) -> None:
    """Refuse what cannot be drawn to, before a store is read."""
    around = store_around(png)
    if around is not None:
        raise MetaplError(f"--png {png} lies in the store {around}; expected a file elsewhere.")
    try:
        refuse_irregular(png)
    except OSError as error:
        raise MetaplError(f"--png {png} cannot be written: {error.strerror}; expected the name of a file.") from error


@dataclass(frozen=True, kw_only=True)
class Select:
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
    threshold: float | None = None
    per_class: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    any_class: Switch = False
    balance: Switch = False
    drop_overlap: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    resume: Switch = False

    def __call__(self) -> int:
        store = LabelStore(self.store)
        with counting("examples", shown=True) as update:
            selection = select(
                store,
                self.out,
                threshold=self.threshold,
                per_class=self.per_class,
                any_class=self.any_class,
                balance=self.balance,
                drop_overlap=self.drop_overlap,
                resume=self.resume,
                progress=update,
            )
        lines = [("examples in the store", selection.rows)]
        if self.drop_overlap is not None:
            lines.append((f"dropped: in {shown(self.drop_overlap)}", selection.overlapping))
        if selection.unread:
            lines.append((f"files cannot be read in {shown(self.drop_overlap)}", selection.unread))
        if self.threshold is not None:
            lines.append((f"dropped: confidence not above {self.threshold:g}", selection.unsure))
        if self.per_class is not None:
            whose = "of any class" if self.any_class else "of its class"
            lines.append((f"dropped: not among the {self.per_class:,} {whose}", selection.beyond))
        lines.append(("kept", selection.kept))
        if selection.copies != selection.kept:
            lines.append(("with copies", selection.copies))
        width = max(len(f"{number:,}") for _, number in lines)
        tell("\n".join(f"{number:>{width},}  {text}" for text, number in lines))
        if selection.missing:
            tell(f"metapl: note: nothing is left of {few(selection.missing)}.", file=sys.stderr)
        tell(f"what is in it: metapl labels stats {self.out}")
        return 0


COMMANDS: dict[str, type[Callable[[], int]]] = {"stats": Stats, "select": Select}


# ------------------------------------------------------------------------------------------------------- what is shown


def kept(top_k: int | None) -> str:
    """How much of each distribution is stored."""
    return "all probabilities" if top_k is None else f"the {top_k} greatest probabilities"


def _heading(store: LabelStore, content: Statistics) -> str:
    """What is stored, and what the store says of it, which may be anything where somebody else wrote it."""
    copies = f", {content.copies:,} with copies" * (content.copies != content.rows)
    lines = [
        f"{store.folder}: {content.rows:,} examples{copies}, {len(content.classes):,} classes, {kept(store.top_k)}"
    ]
    about = store.provenance
    model, selected = about.get("model"), about.get("selected")
    if isinstance(model, dict):
        what = ", ".join(str(model[name]) for name in ("recipe", "method", "network") if name in model)
        lines.append(f"by {about.get('run')} ({what}), temperature {about.get('temperature')}")
    if "pictures" in about:
        lines.append(f"of {about['pictures']}, {str(about.get('begun'))[:10]}")
    lines += [_asked(asked) for asked in (selected if isinstance(selected, list) else []) if isinstance(asked, dict)]
    return "\n".join(lines)


SELECTED = {
    "dropped_overlap_with": "without the pictures of a folder",
    "threshold": "confidence above {}",
    "per_class": "at most {} a class",
    "any_class": "by the probability of any class",
    "balance": "balanced",
}
"""What a selection is asked for, in words."""


def _asked(selected: Mapping[str, Any]) -> str:
    given = {name: value for name, value in selected.items() if value is not None and value is not False}
    told = {name: f"{value:,}" if type(value) is int else value for name, value in given.items()}
    words = ", ".join(words.format(told[name]) for name, words in SELECTED.items() if name in told)
    return f"selected from {told.get('of_rows')}: {words}"


def _by_class(content: Statistics) -> str:
    order: Sequence[int] = range(len(content.classes))
    note = ""
    if len(content.classes) > MOST_CLASSES:
        by_size = sorted(order, key=lambda label: (-content.counts[label], label))
        order = [*by_size[:LISTED], *by_size[-LISTED:]]
        empty = sum(not count for count in content.counts)
        note = f"\n(the {LISTED} largest and the {LISTED} smallest of {len(content.classes):,} classes"
        note += f"; {empty:,} have no example)" if empty else ")"
    with_copies = content.copies != content.rows
    rows: list[tuple[str, ...]] = [("class", "examples", *["with copies"] * with_copies, "share", "mean confidence")]
    for label in order:
        mean = content.class_confidence[label]
        copies = [f"{content.class_copies[label]:,}"] * with_copies
        share = f"{content.class_copies[label] / content.copies:.1%}"
        confidence = "-" if mean is None else f"{mean:.1%}"
        rows.append((short(content.classes[label]), f"{content.counts[label]:,}", *copies, share, confidence))
    return table(rows) + note


def _histograms(content: Statistics) -> str:
    low, middle, high = content.quartiles_of_confidence
    most = content.greatest_entropy
    return (
        f"confidence: mean {content.mean_confidence:.1%}, quartiles {low:.1%}, {middle:.1%}, {high:.1%}\n"
        f"{_bars(content.confidence, 1.0)}\n\n"
        f"entropy: mean {content.mean_entropy:.2f} of at most {most:.2f} nats\n{_bars(content.entropy, most)}"
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
