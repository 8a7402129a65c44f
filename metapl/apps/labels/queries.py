"""What is in a store, and stores of some of its rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from metapl.apps.labels.files import DIGEST_BYTES
from metapl.apps.labels.store import LabelStore, Values
from metapl.apps.labels.writer import LabelWriter
from metapl.apps.pictures.folders import Progress, ask, digest, scan_unlabeled, silent
from metapl.errors import MetaplError
from metapl.runs.fields import Range, check_arguments

# Examples with their copies: `LabelStore.rows_with_copies` takes 8 bytes for each, and some memory on top.
MOST_COPIES = 1_000_000_000

BINS = 20
"""Of the histograms of confidence and entropy."""

# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Statistics:
    """What is in a store; :func:`statistics` finds it.

    Args:
        rows, copies: how many examples; each as often as it counts.
        classes: their names.
        counts, class_copies: the same of each class, by the most probable class of each example.
        class_confidence: mean of the confidence over these; None where there are none.
        confidence: examples by confidence, in 20 bins from 0 to 1; of the last, 1 is part.
        entropy: examples by entropy, in 20 bins from 0 to the logarithm of the number of classes.
        mean_confidence, mean_entropy: over all examples; the latter in nats.
    """

    rows: int
    copies: int
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    class_copies: tuple[int, ...]
    class_confidence: tuple[float | None, ...]
    confidence: tuple[int, ...]
    entropy: tuple[int, ...]
    mean_confidence: float
    mean_entropy: float

    @property
    def greatest_entropy(self) -> float:
        """The end of the last bin of ``entropy``, in nats."""
        return _greatest_entropy(len(self.classes))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def _greatest_entropy(classes: int) -> float:
    return math.log(classes) if classes > 1 else 1.0


def statistics(store: LabelStore) -> Statistics:
    """Counts by class, and how confident the labels are.

    Cost: all parts are read once, of the rows some 20 bytes each; memory for a part.

    Raises:
        MetaplError: a part is damaged.
    """
    classes = len(store.classes)
    counts, copies = np.zeros((2, classes), np.int64)
    confidences, entropies = np.zeros((2, BINS), np.int64)
    sums, total = np.zeros(classes), 0.0

    def histogram(values: Values, upper: float) -> Values:
        bins = np.clip(np.floor(values.astype(np.float64) / upper * BINS), 0, BINS - 1)
        return np.bincount(bins.astype(np.int64), minlength=BINS)

    columns = ("label", "confidence", "entropy", "copies")
    for number in range(len(store.parts)):
        table = store.table(number, columns)
        label, confidence, entropy, copies_B = (table[name].to_numpy() for name in columns)
        counts += np.bincount(label, minlength=classes)
        copies += np.bincount(label, copies_B, classes).astype(np.int64)
        sums += np.bincount(label, confidence, classes)
        confidences += histogram(confidence, 1.0)
        entropies += histogram(entropy, _greatest_entropy(classes))
        total += float(entropy.sum(dtype=np.float64))
    means = (float(each / count) if count else None for each, count in zip(sums, counts, strict=True))
    return Statistics(
        rows=len(store),
        copies=int(copies.sum()),
        classes=store.classes,
        counts=tuple(counts.tolist()),
        class_copies=tuple(copies.tolist()),
        class_confidence=tuple(means),
        confidence=tuple(confidences.tolist()),
        entropy=tuple(entropies.tolist()),
        mean_confidence=float(sums.sum()) / len(store),
        mean_entropy=total / len(store),
    )


# ----------------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Selection:
    """How many of the ``rows`` of a store :func:`select` kept, and why others were dropped.

    Args:
        overlapping, unsure, beyond: left out because their files stand in the folder, for their confidence, and because
            others of their class are more confident.
        kept, copies: rows of the new store; each as often as it counts.
        missing: classes of which nothing was kept.
        unread: files of the folder that cannot be read, and were not compared.
    """

    rows: int
    overlapping: int
    unsure: int
    beyond: int
    kept: int
    copies: int
    missing: tuple[str, ...]
    unread: int = 0


def select(
    store: LabelStore,
    out: Path,
    *,
    threshold: Annotated[float, Range(0, 1)] | None = None,
    per_class: Annotated[int, Range(1, most=MOST_COPIES)] | None = None,
    any_class: bool = False,
    balance: bool = False,
    drop_overlap: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """Write a store of some of the rows of another one, with their distributions as they are, in the same order.

    The steps of Noisy Student's section 3.4, and with ``any_class`` that of Meta Pseudo Labels' section 3.3, each where
    it is asked for, in this order:

    1. examples whose file has the same bytes as one in a folder are dropped, such as those that are validated on;
    2. examples are kept whose confidence is above a threshold;
    3. of each class, by the most probable class of each example, the most confident are kept; of equals, those whose
       ids come first. With ``any_class``, those with the greatest stored probability of this class, whatever their most
       probable class is; an example can be kept for several classes, and is kept once;
    4. classes that have fewer are filled up by duplication: of a class with n examples and a goal of N, each counts
       ⌊N / n⌋ times, and N mod n of them, drawn by the MD5 of their ids, once more. How often each counts is in the
       column ``copies``, see :meth:`LabelStore.rows_with_copies`.

    Args:
        store: to select from.
        out: folder of the new store.
        threshold: keep examples of a confidence above it, in [0, 1).
        per_class: the most examples of a class.
        any_class: count an example for every class that a probability is stored of; needs ``per_class``.
        balance: fill classes up to ``per_class``, or without it to the size of the largest one.
        drop_overlap: a folder of pictures, in which all folders are searched.
        resume: go on with a selection that was stopped.
        progress: called with the number of rows written.

    Cost: 16 bytes of memory a row, and 8 more with ``balance``. The parts are read once for the columns that are asked
    for, and once to write.

    Raises:
        MetaplError: nothing is asked for or nothing is left, an argument is out of its range, the examples have no
            files to compare, a part is damaged, or the disk refused.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    check_arguments(select, locals())
    fault = None
    if threshold is None and per_class is None and not balance and drop_overlap is None:
        fault = "nothing was asked for; expected one or more of threshold, per_class, balance and drop_overlap"
    elif any_class and (per_class is None or balance):
        fault = "any_class needs per_class, and no balance: an example can be of several classes"
    elif drop_overlap is not None and not store.has_digests:
        fault = f"the examples of {store.folder} have no files that could be compared with those in {drop_overlap}"
    if fault is not None:
        raise MetaplError(f"{fault}.")
    found = [] if drop_overlap is None else [ask(digest, path) for path in scan_unlabeled(drop_overlap).paths()]
    known = sorted({content[:DIGEST_BYTES] for content in found if content})
    overlap = {"pictures": len(known), "sha256": hashlib.sha256(b"".join(known)).hexdigest()}
    asked = {
        "of_rows": len(store),
        "of_store_sha256": store.sha256,
        "threshold": threshold,
        "per_class": per_class,
        "any_class": any_class,
        "balance": balance,
        "dropped_overlap_with": None if drop_overlap is None else overlap,
    }
    before = store.provenance.get("selected", [])
    provenance = {**store.provenance, "selected": [*(before if isinstance(before, list) else [before]), asked]}
    most = max(part.rows for part in store.parts)
    how: dict[str, Any] = {"top_k": store.top_k, "provenance": provenance, "rows_per_part": most, "resume": resume}
    with LabelWriter(out, store.classes, **how) as writer:
        label, confidence, copies = (store.column(name) for name in ("label", "confidence", "copies"))
        starts = np.cumsum([0, *(part.rows for part in store.parts)])
        rows = np.arange(len(store))
        if drop_overlap is not None:
            held_out = pa.array(known, pa.binary(DIGEST_BYTES))
            digests = (store.table(number, ["digest"])["digest"] for number in range(len(store.parts)))
            rows = np.flatnonzero(~np.concatenate([pc.is_in(each, value_set=held_out).to_numpy() for each in digests]))
        apart = len(rows)
        if threshold is not None:
            rows = rows[np.greater(confidence[rows], np.float32(threshold))]  # 0.3 of float64 is below that of float32
        sure = len(rows)
        if per_class is not None:
            limits = np.full(len(store.classes), per_class)
            if any_class:
                rows = _most_probable(store, rows, limits, starts)
            else:
                # Of numbers that are not negative, the bits are in their order.
                rows = rows[_first_of_each(label[rows], ~confidence[rows].view(np.uint32), limits)]
        if not len(rows):
            raise MetaplError(
                f"nothing is left of the {len(store):,} examples of {store.folder}: {len(store) - apart:,} overlap, "
                f"and {apart - sure:,} are not above the threshold; lower it."
            )
        counts = np.bincount(label[rows], minlength=len(store.classes))
        goal = per_class or int(counts.max())
        total = goal * int(np.count_nonzero(counts)) if balance else int(copies[rows].sum(dtype=np.int64))
        if total > MOST_COPIES:
            fault = f"the new store would count {total:,} examples with their copies"
            raise MetaplError(f"{fault}; expected at most {MOST_COPIES:,}: give a smaller per_class.")
        if balance:
            whole, rest = np.divmod(goal, np.maximum(counts, 1))
            once_more = _first_of_each(label[rows], _hashes(store, rows, starts), rest)
            copies[rows] = whole[label[rows]]
            copies[rows[once_more]] += 1
        if not writer.complete:
            done = writer.rows
            for number, of_part in _by_part(rows[done:], starts):
                table = store.table(number).take(of_part - starts[number])
                place = table.schema.get_field_index("copies")
                writer.add_table(table.set_column(place, table.schema.field(place), pa.array(copies[of_part])))
                done += len(of_part)
                (progress or silent)(done)
    missing = tuple(name for name, count in zip(store.classes, counts.tolist(), strict=True) if not count)
    dropped = len(store) - apart, apart - sure, sure - len(rows)
    return Selection(len(store), *dropped, len(rows), total, missing, unread=found.count(None))


def _by_part(rows: Values, starts: Values) -> Iterator[tuple[int, Values]]:
    """Ascending rows by the number of the part that they are in; parts without any are left out."""
    ends = np.searchsorted(rows, starts[1:])
    pieces = enumerate(np.split(rows, ends[:-1]))
    return ((number, piece) for number, piece in pieces if len(piece))


def _first_of_each(classes: Values, keys: Values, most: Values) -> Values:
    """The places, ascending, of the ``most`` (C,) least keys of each class; of equal keys, the first."""
    order = np.lexsort((keys, classes))  # which is stable
    of = classes[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    return np.sort(order[rank < most[of]])


def _most_probable(store: LabelStore, rows: Values, most: Values, starts: Values) -> Values:
    """Those of the rows that have one of the ``most`` greatest stored probabilities of some class."""
    kept = tuple(np.empty(0, kind) for kind in (np.int64, np.uint16, np.int64))  # classes, keys and rows
    for number, of_part in _by_part(rows, starts):
        table = store.table(number, ["probabilities"] + ["classes"] * (store.top_k is not None)).take(
            of_part - starts[number]
        )
        p = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        width = len(p) // len(of_part)
        classes = np.tile(np.arange(width), len(of_part))
        if store.top_k is not None:
            classes = table["classes"].combine_chunks().flatten().to_numpy()
        new = classes, ~p.view(np.uint16), np.repeat(of_part, width)
        together = [np.concatenate(both) for both in zip(kept, new, strict=True)]
        first = _first_of_each(together[0], together[1], most)
        kept = tuple(column[first] for column in together)
    return np.unique(kept[2])


def _hashes(store: LabelStore, rows: Values, starts: Values) -> Values:
    """The last eight bytes of the MD5 of each id as text, as a little-endian number."""
    found = []
    for number, of_part in _by_part(rows, starts):
        names = store.table(number, ["id"]).take(of_part - starts[number])["id"].to_pylist()
        found += [hashlib.md5(str(name).encode(), usedforsecurity=False).digest()[8:] for name in names]
    return np.frombuffer(b"".join(found), "<u8")
