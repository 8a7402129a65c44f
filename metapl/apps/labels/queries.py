"""What is in a store, and stores of some of its rows: read part by part, in memory that more rows take no more of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from metapl.apps.labels.files import DIGEST_BYTES
from metapl.apps.labels.store import LabelStore, Values
from metapl.apps.labels.writer import LabelWriter
from metapl.apps.pictures.folders import Progress, ask, digest, scan_unlabeled, silent
from metapl.errors import MetaplError
from metapl.runs.fields import Range, check_arguments

if TYPE_CHECKING:
    import pyarrow as pa

# Examples with their copies: `LabelStore.rows_with_copies` takes 8 bytes for each, and some memory on top.
MOST_COPIES = 1_000_000_000

COUNTERS = 2**22  # of 8 bytes each, by which the first of each class are found

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
    for table in _every(store)({*columns}):
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

    Cost: memory for a few parts, and 100 MB; no more for more rows. The parts are read once for each step that is asked
    for, two or three times more for ``per_class`` and for ``balance`` each, and once to write.

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
        digests = pa.array(known, pa.binary(DIGEST_BYTES))
        least = pa.scalar(threshold, pa.float32())  # as confidence is stored: in float64, 0.3 is below 0.3 of float32
        steps: list[tuple[object, Callable[[Tables], Tables]]] = [
            (drop_overlap, lambda rows: _where(rows, "digest", lambda a: pc.invert(pc.is_in(a, value_set=digests)))),
            (threshold, lambda rows: _where(rows, "confidence", lambda a: pc.greater(a, least))),
            (per_class, lambda rows: _most_confident(rows, store, per_class or 0, any_class)),
        ]
        rows = _every(store)
        left = [_by_class(rows, store)]
        for wanted, step in steps:
            rows = rows if wanted is None else step(rows)
            left.append(left[-1] if wanted is None else _by_class(rows, store))
        counts = left[-1]
        overlapping, unsure, beyond = (int(a.sum() - b.sum()) for a, b in pairwise(left))
        if not counts.any():
            raise MetaplError(
                f"nothing is left of the {len(store):,} examples of {store.folder}: {overlapping:,} overlap, and "
                f"{unsure:,} are not above the threshold; lower it."
            )
        goal = per_class or int(counts.max())
        copies = goal * int(np.count_nonzero(counts))
        if not balance:
            copies = sum(int(table["copies"].to_numpy().sum(dtype=np.int64)) for table in rows({"copies"}))
        if copies > MOST_COPIES:
            fault = f"the new store would count {copies:,} examples with their copies"
            raise MetaplError(f"{fault}; expected at most {MOST_COPIES:,}: give a smaller per_class.")
        if not writer.complete:
            names, last, done = store.schema.names, writer.last, 0
            for table in (_balanced(rows, counts, goal) if balance else rows)({*names}):
                behind = table if last is None else table.filter(pc.greater(table["id"], last))
                writer.add_table(behind.select(names))
                done += len(behind)
                (progress or silent)(done)
    missing = tuple(name for name, count in zip(store.classes, counts.tolist(), strict=True) if not count)
    kept = int(counts.sum())
    return Selection(len(store), overlapping, unsure, beyond, kept, copies, missing, unread=found.count(None))


# -------------------------------------------------------------------------------------------------- rows that are left

Tables = Callable[[set[str]], Iterator["pa.Table"]]
"""A pass over the rows of a store that are left, in their order: a table of each part that has any, with the columns of
these names at least."""

Keys = tuple[Values, Values]
"""Classes and keys, (n,) of each row of a table in turn, where of each class the least keys are looked for."""


def _every(store: LabelStore) -> Tables:
    return lambda columns: (store.table(number, sorted(columns)) for number in range(len(store.parts)))


def _where(rows: Tables, column: str, holds: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> Tables:
    def left(columns: set[str]) -> Iterator[pa.Table]:
        kept = (table.filter(holds(table[column])) for table in rows(columns | {column}))
        return (table for table in kept if len(table))

    return left


def _by_class(rows: Tables, store: LabelStore) -> Values:
    """How many rows are left of each class."""
    counts = np.zeros(len(store.classes), np.int64)
    for table in rows({"label"}):
        counts += np.bincount(table["label"].to_numpy(), minlength=len(counts))
    return counts


def _most_confident(rows: Tables, store: LabelStore, per_class: int, any_class: bool) -> Tables:
    """The most confident rows of each class; with ``any_class``, those with the greatest probability of it."""

    def by_confidence(table: pa.Table) -> Keys:
        # Of numbers that are not negative, the bits are in their order.
        return table["label"].to_numpy(), ~table["confidence"].to_numpy().view(np.uint32)

    def by_probability(table: pa.Table) -> Keys:
        p = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if store.top_k is None:
            return np.tile(np.arange(len(store.classes)), len(table)), ~p.view(np.uint16)
        return table["classes"].combine_chunks().flatten().to_numpy(), ~p.view(np.uint16)

    most = np.full(len(store.classes), per_class)
    lists = {"probabilities"} if store.top_k is None else {"probabilities", "classes"}
    needs, keys, bits = (lists, by_probability, 16) if any_class else ({"label", "confidence"}, by_confidence, 32)
    marked = _first_of_each(rows, needs, keys, most, bits)
    return lambda columns: (table.filter(is_first) for table, is_first in marked(columns) if is_first.any())


def _balanced(rows: Tables, counts: Values, goal: int) -> Tables:
    """The rows with so many copies that each class has ``goal``."""
    import pyarrow as pa

    whole, rest = np.divmod(goal, np.maximum(counts, 1))

    def by_hash(table: pa.Table) -> Keys:
        # The last eight bytes of the MD5 of an id as text, as a little-endian number.
        digests = (hashlib.md5(str(name).encode(), usedforsecurity=False).digest() for name in table["id"].to_pylist())
        return table["label"].to_numpy(), np.frombuffer(b"".join(digests), "<u8")[1::2]

    marked = _first_of_each(rows, {"label", "id"}, by_hash, rest, 64)

    def left(columns: set[str]) -> Iterator[pa.Table]:
        for table, once_more in marked(columns | {"copies"}):
            place = table.schema.get_field_index("copies")
            copies = whole[table["label"].to_numpy()] + once_more
            yield table.set_column(place, table.schema.field(place), pa.array(copies.astype(np.int32)))

    return left


def _first_of_each(
    rows: Tables, needs: set[str], keys: Callable[[pa.Table], Keys], most: Values, bits: int
) -> Callable[[set[str]], Iterator[tuple[pa.Table, Values]]]:
    """A pass over the rows: tables, and which of their rows, (n,), have one of the ``most`` least keys of some class;
    of equal keys, the first rows have. Arguments as of :func:`_cut`."""
    prefix, ties, shift = _cut(rows, needs, keys, most, bits)

    def marked(columns: set[str]) -> Iterator[tuple[pa.Table, Values]]:
        left = ties
        for table in rows(columns | needs):
            classes, of_rows = keys(table)
            begins = of_rows.astype(np.uint64) >> np.uint64(shift)
            is_first = begins < prefix[classes]
            tied = np.flatnonzero(begins == prefix[classes])
            tied = tied[np.argsort(classes[tied], kind="stable")]
            of = classes[tied]
            is_first[tied[np.arange(len(of)) - np.searchsorted(of, of) < left[of]]] = True
            left = np.maximum(left - np.bincount(of, minlength=len(left)), 0)
            yield table, np.any(is_first.reshape(len(table), -1), axis=1)

    return marked


def _cut(
    rows: Tables, needs: set[str], keys: Callable[[pa.Table], Keys], most: Values, bits: int
) -> tuple[Values, Values, int]:
    """Find the ``most`` (C,) least keys, of so many bits, of each class, digit by digit from the highest: a pass over
    the rows, of the columns ``needs``, for each, until the digits tell which rows these are.

    Returns prefix, ties, shift: of each class, those rows are of the first whose bits from ``shift`` on are less than
    this, and so many of those of which they are equal, in the order of the rows.
    """
    each, digit_bits = np.arange(len(most)), max(1, COUNTERS.bit_length() - 1 - len(most).bit_length())
    prefix, wanted, shift = np.zeros(len(most), np.uint64), most, bits
    while shift:
        step = min(digit_bits, shift)
        shift -= step
        counts = np.zeros((len(most), 1 << step), np.int64)
        for table in rows(needs):
            of, key = keys(table)
            begins = key.astype(np.uint64) >> np.uint64(shift)
            undecided = begins >> np.uint64(step) == prefix[of]
            digits = begins[undecided].astype(np.int64) & ((1 << step) - 1)
            np.add.at(counts.reshape(-1), (of[undecided].astype(np.int64) << step) + digits, 1)
        totals = counts.cumsum(axis=1)
        wanted = np.minimum(wanted, totals[:, -1])
        digit = (totals < wanted[:, None]).sum(axis=1)
        there = counts[each, digit]
        wanted = wanted - (totals[each, digit] - there)
        prefix = (prefix << np.uint64(step)) | digit.astype(np.uint64)
        if ((wanted == 0) | (wanted == there)).all():
            break
    return prefix, wanted, shift
