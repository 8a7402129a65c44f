"""What is in a store of labels, and stores of some of the examples of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from metapl.data import draws
from metapl.errors import MetaplError, needed_for
from metapl.labels.store import DIGEST_BYTES, LabelStore, LabelWriter, Values
from metapl.pictures.folders import ask, digest, scan_unlabeled
from metapl.runs.fields import Range, check_arguments

# The stream of draws of a uniform share, which keeps it apart from other uses of a seed.
SHARE = 0x5A4E


@dataclass(frozen=True)
class Statistics:
    """What is in a store, as :func:`statistics` finds it.

    The class of an example is its most probable one.

    Args:
        rows: number of examples.
        copies: number of examples, each as often as it counts.
        classes: names of the classes.
        counts: rows of each class.
        class_copies: rows of each class, each as often as it counts.
        class_confidence: mean confidence over the rows of each class; None where it has none.
        mean_confidence: over all rows.
        mean_entropy: over all rows, in nats.
    """

    rows: int
    copies: int
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    class_copies: tuple[int, ...]
    class_confidence: tuple[float | None, ...]
    mean_confidence: float
    mean_entropy: float


def statistics(store: LabelStore) -> Statistics:
    """Count the classes in a store, and measure how confident its labels are.

    Cost: memory for 16 bytes a row.
    """
    label = store.column("label")
    confidence = store.column("confidence")
    classes = len(store.classes)
    counts = np.bincount(label, minlength=classes)
    copies = np.bincount(label, store.column("copies"), classes)
    confidence_sums = np.bincount(label, confidence, classes)
    class_confidence = [
        float(total / count) if count else None
        for total, count in zip(confidence_sums, counts, strict=True)
    ]
    return Statistics(
        rows=len(store),
        copies=int(copies.sum()),
        classes=store.classes,
        counts=tuple(counts.tolist()),
        class_copies=tuple(copies.astype(np.int64).tolist()),
        class_confidence=tuple(class_confidence),
        mean_confidence=float(confidence.mean(dtype=np.float64)),
        mean_entropy=float(store.column("entropy").mean(dtype=np.float64)),
    )


@dataclass(frozen=True)
class Selection:
    """How many of the rows of a store :func:`select` kept, and why others were dropped.

    Args:
        rows: of the store.
        overlapping: dropped, for their files stand in the folder.
        unsure: dropped for their confidence.
        beyond: dropped, for others of their class are more confident.
        kept: rows of the new store.
        copies: what is kept, each as often as it counts.
        missing: classes of which nothing was kept.
        unread: files of the folder that cannot be read, and were not compared.
        too_sure: dropped, for they are more confident than the upper bound.
        not_drawn: dropped, for none of their copies is among those that were drawn.
    """

    rows: int
    overlapping: int
    unsure: int
    beyond: int
    kept: int
    copies: int
    missing: tuple[str, ...]
    unread: int = 0
    too_sure: int = 0
    not_drawn: int = 0


def select(
    store: LabelStore,
    out: Path,
    *,
    threshold: Annotated[float, Range(0, 1)] | None = None,
    at_most: Annotated[float, Range(above=0, most=1)] | None = None,
    per_class: Annotated[int, Range(1, most=2**30)] | None = None,
    any_class: bool = False,
    balance: bool = False,
    share: Annotated[float, Range(above=0, most=1)] | None = None,
    count: Annotated[int, Range(1)] | None = None,
    seed: int = 0,
    drop_overlap: Path | None = None,
) -> Selection:
    """Write a store of some of the rows of another one, in the same order.

    A store that was begun with the same settings is gone on with. Each step is taken where it is
    asked for, in this order:

    1. examples are dropped whose file has the same bytes as one in a folder, such as that of the
       test pictures;
    2. examples are kept whose confidence is above a threshold, and not above an upper bound;
    3. of each class, the most probable one of an example, the most confident are kept; of equals,
       those whose ids come first. With ``any_class``, those with the greatest stored probability of
       the class, whatever their most probable one is; an example of several classes is kept once,
       so that fewer than ``per_class`` times the classes may be left;
    4. smaller classes are filled up: of n examples and a goal of N, each counts ⌊N / n⌋ times, and
       N mod n of them, drawn by the MD5 of their ids, once more; see
       :meth:`~metapl.labels.store.LabelStore.rows_with_copies`;
    5. of all that is left, each example as often as it counts, a uniform share, or so many, are
       drawn by the seed; a smaller share of the same seed lies within a larger one.

    Args:
        store: to select from.
        out: folder of the new store.
        threshold: in [0, 1); the lower bound of the interval of confidence, which is not in it.
        at_most: in (0, 1], greater than the threshold; the upper bound, which is in it.
        per_class: the most examples of a class.
        any_class: needs ``per_class``.
        balance: fill classes up to ``per_class``, or without it to the size of the largest one.
        share: in (0, 1]; at least one example is drawn.
        count: how many are drawn, in the place of a share; refused where there are fewer.
        seed: of the draw.
        drop_overlap: a folder of pictures, in which all folders are searched.

    Cost: some 40 bytes of memory a row; with ``share`` or ``count`` 24 more for each copy. Source:
    Noisy Student's filtering and balancing of JFT; its Figure 5 for intervals of confidence, of
    which each has the same count, its Table 10 for uniform shares. With ``any_class``, how Meta
    Pseudo Labels selects the pictures of JFT for its ResNet-50.
    """
    with needed_for("stored labels"):
        import pyarrow as pa

    check_arguments(select, locals())
    if any_class and (per_class is None or balance):
        raise MetaplError(
            "any_class needs per_class, and no balance: an example can be of several classes."
        )
    if count is not None and share is not None:
        raise MetaplError(f"count={count:,} and share={share:g} were given; expected one of them.")
    check_interval(threshold, at_most)
    if drop_overlap is not None and not store.has_digests:
        raise MetaplError(
            f"the examples of {store.folder} have no files to compare with those in {drop_overlap}."
        )
    label = store.column("label")
    confidence = store.column("confidence")
    copies = store.column("copies")
    classes = len(store.classes)

    # 1. Pictures that stand in the folder are dropped.
    rows = np.arange(len(store))
    unread = 0
    overlap = None
    if drop_overlap is not None:
        digests, unread = _digests_in(drop_overlap)
        overlap = {
            "pictures": len(digests),
            "sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
        }
        rows = _rows_apart(store, digests)
    rows_apart = len(rows)

    # 2. The interval of confidence. The bounds are rounded as the confidence was: 0.3 in float64 is
    # below 0.3 in float32.
    if threshold is not None:
        rows = rows[confidence[rows] > np.float32(threshold)]
    rows_sure = len(rows)
    if at_most is not None:
        rows = rows[confidence[rows] <= np.float32(at_most)]
    rows_within = len(rows)

    # 3. The most confident of each class.
    if per_class is not None and any_class:
        rows = _most_probable_of_any_class(store, rows, per_class)
    elif per_class is not None:
        most = np.full(classes, per_class)
        rows = rows[_first_of_each(label[rows], -confidence[rows], most)]
    if not len(rows):
        dropped = (
            f"{len(store) - rows_apart:,} overlap, and {rows_apart - rows_sure:,} are not above "
            "the threshold"
        )
        if at_most is not None:
            dropped += f", and {rows_sure - rows_within:,} are above {at_most:g}"
        raise MetaplError(
            f"nothing is left of the {len(store):,} examples of {store.folder}: {dropped}."
        )
    counts = np.bincount(label[rows], minlength=classes)

    # 4. Smaller classes are filled up.
    if balance:
        goal = per_class or int(counts.max())
        copies = _balanced_copies(store, rows, label, counts, copies=copies, goal=goal)
    rows_balanced = len(rows)

    # 5. A uniform share, or a count.
    with_copies = int(copies[rows].sum(dtype=np.int64))
    drawn = count
    if share is not None:
        drawn = max(1, round(share * with_copies))
    if drawn is not None:
        if drawn > with_copies:
            raise MetaplError(
                f"{with_copies:,} of the {len(store):,} examples of {store.folder} are left, with "
                f"copies; expected the {drawn:,} that are to be drawn: a smaller count, or a "
                "wider interval of confidence."
            )
        copies = _drawn_copies(rows, copies, count=drawn, seed=seed)
        rows = rows[copies[rows] > 0]
        counts = np.bincount(label[rows], minlength=classes)

    asked: dict[str, Any] = {
        "of_rows": len(store),
        "of_store_sha256": store.sha256,
        "threshold": threshold,
        "per_class": per_class,
        "any_class": any_class,
        "balance": balance,
        "dropped_overlap_with": overlap,
    }
    # Stores of earlier versions do not have these, and are gone on with where they are not asked
    # for.
    if at_most is not None:
        asked["at_most"] = at_most
    if share is not None:
        asked |= {"share": share, "seed": seed}
    if count is not None:
        asked |= {"count": count, "seed": seed}
    writer = LabelWriter(
        out,
        store.classes,
        top_k=store.top_k,
        rows_per_part=store.rows_per_part,
        provenance={
            **store.provenance,
            "selected": [*store.provenance.get("selected", []), asked],
        },
        resume=True,
    )
    with writer:
        remaining = rows[writer.rows :]
        for where, table in store.taken(remaining):
            column = pa.array(copies[remaining[where]])
            number = table.schema.get_field_index("copies")
            writer.add_table(table.set_column(number, "copies", column))
    missing = [
        name for name, count in zip(store.classes, counts.tolist(), strict=True) if not count
    ]
    return Selection(
        rows=len(store),
        overlapping=len(store) - rows_apart,
        unsure=rows_apart - rows_sure,
        beyond=rows_within - rows_balanced,
        kept=len(rows),
        copies=int(copies[rows].sum(dtype=np.int64)),
        missing=tuple(missing),
        unread=unread,
        too_sure=rows_sure - rows_within,
        not_drawn=rows_balanced - len(rows),
    )


def check_interval(threshold: float | None, at_most: float | None) -> None:
    """Refuse an interval of confidence in which nothing can lie.

    >>> check_interval(0.3, 0.4)
    >>> check_interval(0.3, 0.3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    metapl.errors.MetaplError: at_most is 0.3, and threshold 0.3: the interval ... is empty; ...
    """
    if at_most is not None and at_most <= (threshold or 0.0):
        lower = f"{threshold or 0.0:g}"
        raise MetaplError(
            f"at_most is {at_most:g}, and threshold {lower}: the interval of confidence is empty; "
            "expected more."
        )


def _digests_in(folder: Path) -> tuple[list[bytes], int]:
    """Return the sorted digests of the pictures in a folder, and how many cannot be read."""
    digests = set()
    unread = 0
    for path in scan_unlabeled(folder).paths():
        content = ask(digest, path)
        if content is None:
            unread += 1
        elif content:
            digests.add(content[:DIGEST_BYTES])
    return sorted(digests), unread


def _rows_apart(store: LabelStore, digests: Sequence[bytes]) -> Values:
    """Return the rows of a store whose files have other digests."""
    with needed_for("stored labels"):
        import pyarrow as pa
        import pyarrow.compute as pc

    value_set = pa.array(digests, pa.binary(DIGEST_BYTES))
    overlaps = [pc.is_in(table["digest"], value_set=value_set).to_numpy() for table in store.tables]
    return np.flatnonzero(~np.concatenate(overlaps))


def _most_probable_of_any_class(store: LabelStore, rows: Values, per_class: int) -> Values:
    """Return the rows with the greatest stored probabilities of each class, each row once."""
    most = np.full(len(store.classes), per_class)
    best_classes: Values = np.empty(0, np.int64)
    best_keys: Values = np.empty(0, np.float16)
    best_rows: Values = np.empty(0, np.int64)
    # Part by part, for the probabilities of all parts may not fit into memory.
    for number, where in store.by_part(rows):
        places = rows[where] - store.starts[number]
        p_BK = store.matrix(number, "probabilities")[places]
        if store.top_k is None:
            classes_BK = np.broadcast_to(np.arange(p_BK.shape[1]), p_BK.shape)
        else:
            classes_BK = store.matrix(number, "classes")[places]
        best_classes = np.concatenate([best_classes, classes_BK.ravel()])
        best_keys = np.concatenate([best_keys, -p_BK.ravel()])
        best_rows = np.concatenate([best_rows, np.repeat(rows[where], p_BK.shape[1])])
        first = _first_of_each(best_classes, best_keys, most)
        best_classes = best_classes[first]
        best_keys = best_keys[first]
        best_rows = best_rows[first]
    return np.unique(best_rows)


def _balanced_copies(
    store: LabelStore, rows: Values, label: Values, counts: Values, *, copies: Values, goal: int
) -> Values:
    """Return how often each example counts, so that the rows of each class come to the goal."""
    times, remainder = np.divmod(goal, np.maximum(counts, 1))
    hashes = []
    for _, table in store.taken(rows, ["id"]):
        for name in table["id"].to_pylist():
            md5 = hashlib.md5(str(name).encode(), usedforsecurity=False)
            hashes.append(md5.digest()[8:])
    keys = np.frombuffer(b"".join(hashes), "<u8")
    once_more = _first_of_each(label[rows], keys, remainder)
    balanced = copies.copy()
    balanced[rows] = times[label[rows]]
    balanced[rows[once_more]] += 1
    return balanced


def _drawn_copies(rows: Values, copies: Values, *, count: int, seed: int) -> Values:
    """Return how often each example counts among so many copies, drawn without replacement."""
    rows_of_copies = np.repeat(rows, copies[rows])
    keys = draws.bits(seed, 0, torch.arange(len(rows_of_copies)), 1, stream=SHARE)[:, 0].numpy()
    # A stable sort, so that of equal keys the first is drawn, on every machine.
    drawn = rows_of_copies[np.argsort(keys, kind="stable")[:count]]
    return np.bincount(drawn, minlength=len(copies)).astype(copies.dtype)


def _first_of_each(classes: Values, keys: Values, most: Values) -> Values:
    """Return the places, ascending, of the ``most`` (C,) least keys of each class.

    Of equal keys, it takes the first.
    """
    # lexsort is stable.
    order = np.lexsort((keys, classes))
    sorted_classes = classes[order]
    rank = np.arange(len(sorted_classes)) - np.searchsorted(sorted_classes, sorted_classes)
    return np.sort(order[rank < most[sorted_classes]])
