"""What is in a store of labels, and stores of some of the examples of another one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from metapl.apps.label_store import DIGEST_BYTES, LabelStore, LabelWriter, Values
from metapl.apps.pictures.folders import ask, digest, scan_unlabeled
from metapl.data import draws
from metapl.errors import FieldError, MetaplError
from metapl.runs.fields import Range, check_arguments

# The stream of draws of a uniform share, which keeps it apart from other uses of a seed.
SHARE = 0x5A4E


@dataclass(frozen=True)
class Statistics:
    """What is in a store; :func:`statistics` finds it. Classes are the most probable ones."""

    rows: int
    copies: int  # the rows, each as often as it counts
    classes: tuple[str, ...]
    counts: tuple[int, ...]  # rows of each class
    class_copies: tuple[int, ...]
    class_confidence: tuple[
        float | None, ...
    ]  # mean over the rows of a class; None where there are none
    mean_confidence: float
    mean_entropy: float  # in nats


def statistics(store: LabelStore) -> Statistics:
    """Counts by class, and how confident the labels are; memory for 16 bytes a row."""
    label, confidence, entropy, copies = map(
        store.column, ("label", "confidence", "entropy", "copies")
    )
    counts, sums, copied = (
        np.bincount(label, of, len(store.classes)) for of in (None, confidence, copies)
    )
    return Statistics(
        rows=len(store),
        copies=int(copied.sum()),
        classes=store.classes,
        counts=tuple(counts.tolist()),
        class_copies=tuple(copied.astype(np.int64).tolist()),
        class_confidence=tuple(
            float(total / n) if n else None for total, n in zip(sums, counts, strict=True)
        ),
        mean_confidence=float(confidence.mean(dtype=np.float64)),
        mean_entropy=float(entropy.mean(dtype=np.float64)),
    )


@dataclass(frozen=True)
class Selection:
    """How many of the ``rows`` of a store :func:`select` kept, and why others were dropped."""

    rows: int
    overlapping: int  # dropped: their files stand in the folder
    unsure: int  # dropped for their confidence
    beyond: int  # dropped: others of their class are more confident
    kept: int
    copies: int  # what is kept, each as often as it counts
    missing: tuple[str, ...]  # classes of which nothing was kept
    unread: int = 0  # files of the folder that cannot be read, and were not compared
    too_sure: int = 0  # dropped: more confident than the upper bound
    not_drawn: int = 0  # dropped: none of their copies is in the share that was drawn


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
    seed: int = 0,
    drop_overlap: Path | None = None,
) -> Selection:
    """Write a store of some of the rows of another one, in the same order; or go on with one begun with the same.

    Each step where it is asked for, in this order:

    1. examples are dropped whose file has the same bytes as one in a folder, such as that of the
    test pictures;
    2. examples are kept whose confidence is above a threshold, and not above an upper bound;
    3. of each class, the most probable one of an example, the most confident are kept; of equals,
       those whose ids come first. With ``any_class``, those with the greatest stored probability of
       the class, whatever their most probable one is; an example is kept once;
    4. smaller classes are filled up: of n examples and a goal of N, each counts ⌊N / n⌋ times, and
       N mod n of them, drawn by the MD5 of their ids, once more; see
       :meth:`LabelStore.rows_with_copies`;
    5. of all that is left, each example as often as it counts, a uniform share is drawn by the
       seed; a smaller share of the same seed lies within a larger one.

    Args:
        store: to select from.
        out: folder of the new store.
        threshold: in [0, 1); the lower bound of the interval of confidence, which is not in it.
        at_most: in (0, 1], greater than the threshold; the upper bound, which is in it.
        per_class: the most examples of a class.
        any_class: needs ``per_class``.
        balance: fill classes up to ``per_class``, or without it to the size of the largest one.
        share: in (0, 1]; at least one example is drawn.
        seed: of the share.
        drop_overlap: a folder of pictures, in which all folders are searched.

    Cost: some 40 bytes of memory a row; with ``share`` 24 more for each copy. Source: Noisy
    Student's filtering and balancing of JFT; its Figure 5 for intervals of confidence, its Table 10
    for uniform shares. With ``any_class``, how Meta Pseudo Labels selects the pictures of JFT for
    its ResNet-50.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    check_arguments(select, locals())
    if any_class and (per_class is None or balance):
        raise MetaplError(
            "any_class needs per_class, and no balance: an example can be of several classes."
        )
    check_interval(threshold, at_most)
    if drop_overlap is not None and not store.has_digests:
        raise MetaplError(
            f"the examples of {store.folder} have no files to compare with those in {drop_overlap}."
        )
    label, confidence, copies = map(store.column, ("label", "confidence", "copies"))
    rows, found, overlap = np.arange(len(store)), list[bytes | None](), None
    if drop_overlap is not None:
        found = [ask(digest, path) for path in scan_unlabeled(drop_overlap).paths()]
        known = sorted({content[:DIGEST_BYTES] for content in found if content})
        overlap = {"pictures": len(known), "sha256": hashlib.sha256(b"".join(known)).hexdigest()}
        held_out = pa.array(known, pa.binary(DIGEST_BYTES))
        overlaps = [
            pc.is_in(table["digest"], value_set=held_out).to_numpy() for table in store.tables
        ]
        rows = np.flatnonzero(~np.concatenate(overlaps))
    apart = len(rows)
    if threshold is not None:
        rows = rows[
            confidence[rows] > np.float32(threshold)
        ]  # 0.3 of float64 is below that of float32
    sure = len(rows)
    if at_most is not None:
        rows = rows[confidence[rows] <= np.float32(at_most)]
    within = len(rows)
    most = np.full(len(store.classes), per_class or 0)
    if per_class is not None and any_class:
        kept: list[Values] = [
            np.empty(0, kind) for kind in (np.int64, np.float16, np.int64)
        ]  # classes, keys and rows
        for number, where in store.by_part(
            rows
        ):  # part by part, for the probabilities of all may not fit into memory
            places = rows[where] - store.starts[number]
            p_BK = store.matrix(number, "probabilities")[places]
            classes_BK = np.broadcast_to(np.arange(p_BK.shape[1]), p_BK.shape)
            if store.top_k is not None:
                classes_BK = store.matrix(number, "classes")[places]
            new = classes_BK.ravel(), -p_BK.ravel(), np.repeat(rows[where], p_BK.shape[1])
            kept = [np.concatenate(both) for both in zip(kept, new, strict=True)]
            first = _first_of_each(kept[0], kept[1], most)
            kept = [column[first] for column in kept]
        rows = np.unique(kept[2])
    elif per_class is not None:
        rows = rows[_first_of_each(label[rows], -confidence[rows], most)]
    if not len(rows):
        dropped = (
            f"{len(store) - apart:,} overlap, and {apart - sure:,} are not above the threshold"
        )
        if at_most is not None:
            dropped += f", and {sure - within:,} are above {at_most:g}"
        raise MetaplError(
            f"nothing is left of the {len(store):,} examples of {store.folder}: {dropped}."
        )
    counts = np.bincount(label[rows], minlength=len(store.classes))
    if balance:
        whole, rest = np.divmod(per_class or int(counts.max()), np.maximum(counts, 1))
        names = (
            str(name) for _, table in store.taken(rows, ["id"]) for name in table["id"].to_pylist()
        )
        hashes = [hashlib.md5(name.encode(), usedforsecurity=False).digest()[8:] for name in names]
        once_more = _first_of_each(label[rows], np.frombuffer(b"".join(hashes), "<u8"), rest)
        copies[rows] = whole[label[rows]]
        copies[rows[once_more]] += 1
    balanced = len(rows)
    if share is not None:
        copies = _drawn_share(rows, copies, share=share, seed=seed)
        rows = rows[copies[rows] > 0]
        counts = np.bincount(label[rows], minlength=len(store.classes))
    asked = {
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
    provenance = {**store.provenance, "selected": [*store.provenance.get("selected", []), asked]}
    how: dict[str, Any] = {
        "top_k": store.top_k,
        "rows_per_part": store.rows_per_part,
        "provenance": provenance,
    }
    with LabelWriter(out, store.classes, resume=True, **how) as writer:
        left = rows[writer.rows :]
        for where, table in store.taken(left):
            counted = pa.array(copies[left[where]])
            writer.add_table(
                table.set_column(table.schema.get_field_index("copies"), "copies", counted)
            )
    return Selection(
        rows=len(store),
        overlapping=len(store) - apart,
        unsure=apart - sure,
        beyond=within - balanced,
        kept=len(rows),
        copies=int(copies[rows].sum(dtype=np.int64)),
        missing=tuple(
            name for name, count in zip(store.classes, counts.tolist(), strict=True) if not count
        ),
        unread=found.count(None),
        too_sure=sure - within,
        not_drawn=balanced - len(rows),
    )


def check_interval(threshold: float | None, at_most: float | None) -> None:
    """Refuse an interval of confidence in which nothing can lie.

    >>> check_interval(0.3, 0.4)
    >>> check_interval(0.3, 0.3)
    Traceback (most recent call last):
    ...
    metapl.errors.FieldError: at_most is 0.3, and threshold 0.3: the interval of confidence is empty; expected more.
    """
    if at_most is not None and at_most <= (threshold or 0.0):
        lower = f"{threshold or 0.0:g}"
        raise FieldError(
            f"at_most is {at_most:g}, and threshold {lower}: the interval of confidence is empty; "
            "expected more.",
            "at_most",
            at_most,
            f"more than the threshold, {lower}",
        )


def _drawn_share(rows: Values, copies: Values, *, share: float, seed: int) -> Values:
    """Return how often each example counts in a share of the rows' copies that is drawn without replacement."""
    rows_of_copies = np.repeat(rows, copies[rows])
    keys = draws.bits(seed, 0, torch.arange(len(rows_of_copies)), 1, stream=SHARE)[:, 0].numpy()
    number = max(1, round(share * len(rows_of_copies)))
    # A stable sort, so that of equal keys the first is drawn, on every machine.
    drawn = rows_of_copies[np.argsort(keys, kind="stable")[:number]]
    return np.bincount(drawn, minlength=len(copies)).astype(copies.dtype)


def _first_of_each(classes: Values, keys: Values, most: Values) -> Values:
    """The places, ascending, of the ``most`` (C,) least keys of each class.

    Of equal keys, the first.
    """
    order = np.lexsort((keys, classes))  # which is stable
    of = classes[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    return np.sort(order[rank < most[of]])
