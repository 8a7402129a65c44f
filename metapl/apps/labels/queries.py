"""What is in a store, and stores of some of its rows, by DuckDB: in bounded memory, whatever the number of rows."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.apps.labels import files as layout
from metapl.apps.labels.files import DIGEST_BYTES
from metapl.apps.labels.store import LabelStore, is_text
from metapl.apps.labels.writer import LabelWriter
from metapl.apps.pictures.folders import Progress, ask, digest, scan_unlabeled
from metapl.errors import MetaplError, reason_of
from metapl.runs.cores import available_cores
from metapl.words import shown

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

MEMORY = "768MiB"
"""What DuckDB may hold; what takes more goes to files."""

MOST_OF_ANY_CLASS = 1_000_000
"""DuckDB takes fewer of the greatest values."""

MOST_COPIES = 1_000_000_000
"""Examples with their copies: :meth:`LabelStore.rows_with_copies` takes 8 bytes for each, and some memory on top."""

_LAST_ROW = 2**32 - 1

BINS = 20
"""Of the histograms of confidence and entropy."""


def greatest_entropy(classes: int) -> float:
    """That of evenly spread probabilities, in nats; 1 for a single class, so that a histogram has a width.

    >>> greatest_entropy(1), round(greatest_entropy(10), 3)
    (1.0, 2.303)
    """
    return math.log(classes) if classes > 1 else 1.0


@dataclass(frozen=True)
class Statistics:
    """What is in a store; :func:`statistics` finds it.

    Args:
        rows: how many examples.
        copies: how many, each as often as it counts.
        classes: their names.
        counts: examples of each class, by the most probable class of each.
        class_copies: the same, each as often as it counts.
        class_confidence: mean of the confidence over these; None where there are none.
        confidence: examples by confidence, in 20 bins from 0 to 1; of the last, 1 is part.
        entropy: examples by entropy, in 20 bins from 0 to the logarithm of the number of classes.
        mean_confidence: over all examples.
        quartiles_of_confidence: three numbers, of the examples in order of their confidence.
        mean_entropy: in nats.
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
    quartiles_of_confidence: tuple[float, ...]
    mean_entropy: float

    @property
    def greatest_entropy(self) -> float:
        """The end of the last bin of ``entropy``, in nats."""
        return greatest_entropy(len(self.classes))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Selection:
    """How many rows :func:`select` kept, and why others were dropped.

    Args:
        rows: of the store selected from.
        overlapping: left out because their files stand in the folder.
        unsure: left out for their confidence.
        beyond: left out because others of their class are more confident.
        kept: rows of the new store.
        copies: how many these are, each as often as it counts.
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


@dataclass(frozen=True)
class _Rule:
    """Which rows are kept: the arguments of :func:`select` that say so."""

    threshold: float | None
    per_class: int | None
    any_class: bool
    balance: bool
    drop_overlap: Path | None

    @property
    def sure(self) -> str:
        """In SQL, what holds for an example of enough confidence."""
        # Confidence is stored as float32, in which 0.3 is above 0.3.
        return "true" if self.threshold is None else f"confidence > {self.threshold!r}::FLOAT"

    def check(self, store: LabelStore) -> None:
        """Refuse a rule that says nothing, or that a store cannot be selected by."""
        threshold, per_class = self.threshold, self.per_class
        if threshold is None and per_class is None and not self.balance and self.drop_overlap is None:
            raise MetaplError(
                "nothing was asked for; expected one or more of threshold, per_class, balance and drop_overlap."
            )
        if threshold is not None and not 0 <= threshold < 1:
            raise MetaplError(f"the threshold is {threshold}; expected a confidence in [0, 1).")
        if per_class is not None and not 1 <= per_class <= MOST_COPIES:
            raise MetaplError(f"{per_class!s:.30} examples a class were asked for; expected 1 to {MOST_COPIES:,}.")
        if self.any_class and (per_class is None or self.balance or not per_class < MOST_OF_ANY_CLASS):
            raise MetaplError(
                f"any_class was asked for; expected per_class with it, below {MOST_OF_ANY_CLASS:,}, and no balance: an "
                "example can be of several classes."
            )
        if self.drop_overlap is not None and not store.has_digests:
            raise MetaplError(
                f"the examples of {store.folder} have no files that could be compared with those in "
                f"{self.drop_overlap}; expected a store of the pictures in a folder."
            )


def statistics(store: LabelStore) -> Statistics:
    """Counts by class, and how confident the labels are.

    Cost: all parts are read once, for their checksums; of the rows, some 20 bytes each.

    Raises:
        MetaplError: a part is damaged, or DuckDB is not installed.
    """
    top = greatest_entropy(len(store.classes))
    with tempfile.TemporaryDirectory() as spill, _database(Path(spill)) as database:
        columns = ["label", "confidence", "entropy", "copies"]
        _load(database, store, "CREATE TEMP TABLE example AS SELECT * FROM incoming", columns, _numbered)
        by_class = database.execute(
            "SELECT label, count(*), sum(copies), avg(confidence::DOUBLE) FROM example GROUP BY label ORDER BY label"
        ).fetchall()
        whole = database.execute(
            "SELECT sum(copies), avg(confidence::DOUBLE), avg(entropy::DOUBLE), "
            "quantile_cont(confidence::DOUBLE, [0.25, 0.5, 0.75]) FROM example"
        ).fetchone()
        histograms = [
            database.execute(
                f"SELECT least(greatest(floor({column}::DOUBLE / $top * {BINS}), 0), {BINS - 1})::INTEGER AS bin, "
                "count(*) FROM example GROUP BY bin",
                {"top": upper},
            ).fetchall()
            for column, upper in (("confidence", 1.0), ("entropy", top))
        ]
    assert whole is not None
    counts, copies = [0] * len(store.classes), [0] * len(store.classes)
    means: list[float | None] = [None] * len(store.classes)
    for label, count, counted, mean in by_class:
        counts[label], copies[label], means[label] = count, int(counted), mean
    bins = [[dict(histogram).get(number, 0) for number in range(BINS)] for histogram in histograms]
    return Statistics(
        rows=len(store),
        copies=int(whole[0]),
        classes=store.classes,
        counts=tuple(counts),
        class_copies=tuple(copies),
        class_confidence=tuple(means),
        confidence=tuple(bins[0]),
        entropy=tuple(bins[1]),
        mean_confidence=whole[1],
        quartiles_of_confidence=tuple(whole[3]),
        mean_entropy=whole[2],
    )


def select(
    store: LabelStore,
    out: Path,
    *,
    threshold: float | None = None,
    per_class: int | None = None,
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
    3. of each class, by the most probable class of each example, the most confident are kept; of examples that are
       equally confident, those whose ids come first. With ``any_class``, of each class those are kept of which the
       stored probability of this class is greatest, whatever their most probable class is; an example can be kept for
       several classes, and is kept once;
    4. classes that have fewer are filled up by duplication: of a class with n examples and a goal of N, each counts
       ⌊N / n⌋ times, and N mod n of them once more: the first in the order of the number that the last eight bytes of
       the MD5 of an id (as UTF-8 text, numbers in decimal) make in little-endian order. The rows stay unique; how often
       each counts is in the column ``copies``, see :meth:`LabelStore.rows_with_copies`.

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

    Cost: memory for DuckDB within 768 MiB (what is more goes to files in ``out``) and a few parts; the parts are read
    twice.

    Raises:
        MetaplError: nothing is asked for or nothing is left, an argument is out of its range, the examples have no
            files to compare, a part is damaged, or the disk refused.
    """
    rule = _Rule(threshold, per_class, any_class, balance, drop_overlap)
    rule.check(store)
    overlap, unread = (None, 0) if drop_overlap is None else _digests(drop_overlap)
    asked = {
        "of_rows": len(store),
        "of_store_sha256": store.sha256,
        "threshold": threshold,
        "per_class": per_class,
        "any_class": any_class,
        "balance": balance,
        "dropped_overlap_with": None if overlap is None else _summary(overlap),
    }
    provenance = {**store.provenance, "selected": [*store.provenance.get("selected", []), asked]}
    writer = LabelWriter(
        out,
        store.classes,
        top_k=store.top_k,
        provenance=provenance,
        rows_per_part=max(part.rows for part in store.parts),
        resume=resume,
    )
    layout.require("duckdb")
    with writer, tempfile.TemporaryDirectory(prefix=layout.SPILL, dir=out) as spill, _database(Path(spill)) as database:
        selection = _choose(database, store, rule, overlap)
        if not writer.complete:
            _copy(database, store, writer, progress)
    return replace(selection, unread=unread)


def _digests(folder: Path) -> tuple[list[bytes], int]:
    """What each picture's file of a folder begins with as SHA-256, each once; and how many cannot be read."""
    found = [ask(digest, path) for path in scan_unlabeled(folder).paths()]
    return sorted({content[:DIGEST_BYTES] for content in found if content}), found.count(None)


def _summary(digests: Sequence[bytes]) -> dict[str, Any]:
    return {"pictures": len(digests), "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}


# ------------------------------------------------------------------------------------------------------------- DuckDB


@contextmanager
def _database(spill: Path) -> Iterator[DuckDBPyConnection]:
    """A database in memory, with what it says when it fails in a line."""
    layout.require("duckdb")
    import duckdb

    if not is_text(str(spill)):  # DuckDB would say std::bad_cast
        raise MetaplError(
            f"DuckDB cannot keep its files in {shown(spill.parent)}: the name is not UTF-8; expected another "
            "folder (--out), or rename it."
        )
    settings: dict[str, Any] = {
        "memory_limit": MEMORY,
        "threads": available_cores(),
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
    }
    with duckdb.connect(config=settings) as database:
        database.execute("SET enable_progress_bar = false")  # it would be written to standard output
        try:
            yield database
        except duckdb.InterruptException as error:
            raise KeyboardInterrupt from error
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            raise MetaplError(
                f"DuckDB could not go on: {reason_of(error)}; expected room for its files in {spill.parent} beyond "
                f"{MEMORY} of memory."
            ) from error
        except duckdb.Error as error:
            raise MetaplError(
                f"DuckDB could not go on: {reason_of(error)}; expected a store as metapl label writes it, and a "
                "version of DuckDB that pip install 'metapl[labels]' takes."
            ) from error


def _load(
    database: DuckDBPyConnection,
    store: LabelStore,
    sql: str,
    columns: Sequence[str],
    rows_of: Callable[[pa.Table, int], pa.Table],
) -> None:
    """Run a statement that reads the table ``incoming`` once, which is made of the parts as it is read.

    Args:
        sql: the statement.
        columns: of the parts.
        rows_of: makes rows of ``incoming`` of those of a part, and the number of its first row.
    """
    import pyarrow as pa

    refusals: list[MetaplError] = []

    def batches(first: pa.Table) -> Iterator[pa.RecordBatch]:
        yield from first.to_batches()
        start = store.parts[0].rows
        try:
            for number in range(1, len(store.parts)):
                table = store.table(number, columns)
                yield from rows_of(table, start).to_batches()
                start += len(table)
        except MetaplError as error:  # DuckDB would wrap it in words of its own
            refusals.append(error)
            raise

    first = rows_of(store.table(0, columns), 0)
    database.register("incoming", pa.RecordBatchReader.from_batches(first.schema, batches(first)))
    try:
        database.execute(sql)
    except Exception:
        if refusals:
            raise refusals[0] from None
        raise
    database.unregister("incoming")


def _numbered(table: pa.Table, start: int) -> pa.Table:
    """With the numbers of the rows as the column ``row``."""
    import pyarrow as pa

    return table.add_column(0, "row", pa.array(np.arange(start, start + len(table))))


def _by_class(table: pa.Table, start: int) -> pa.Table:
    """A row for each stored probability: its class and a key, which is greater for a more probable example.

    Probabilities are not negative, so their bits as float32 are in their order. Behind these stands the number of the
    row, counted backwards: of equals, the first is the greatest.
    """
    import pyarrow as pa

    p = table["probabilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    width = len(p) // len(table)
    rows = np.repeat(np.arange(start, start + len(table), dtype=np.uint64), width)
    key = (p.view(np.uint32).astype(np.uint64) << np.uint64(32)) | (np.uint64(_LAST_ROW) - rows)
    if "classes" in table.schema.names:
        classes = table["classes"].combine_chunks().flatten()
    else:
        classes = pa.array(np.tile(np.arange(width, dtype=np.int32), len(table)))
    return pa.table({"class": classes, "key": pa.array(key), "row": pa.array(rows.astype(np.int64))})


def _choose(database: DuckDBPyConnection, store: LabelStore, rule: _Rule, overlap: Sequence[bytes] | None) -> Selection:
    """Make the table ``chosen`` of the rows to be kept and their copies."""
    _load_examples(database, store, rule.balance, overlap)
    overlapping, unsure = _keep(database, store, rule)
    counts = dict(database.execute("SELECT label, count(*) FROM kept GROUP BY label").fetchall())
    kept = sum(counts.values())
    if not kept:
        raise MetaplError(
            f"nothing is left of the {len(store):,} examples of {store.folder}: {overlapping:,} overlap, and "
            f"{unsure:,} are not above the threshold; lower it."
        )
    return Selection(
        rows=len(store),
        overlapping=overlapping,
        unsure=unsure,
        beyond=len(store) - overlapping - unsure - kept,
        kept=kept,
        copies=_count_copies(database, counts, (rule.per_class or max(counts.values())) if rule.balance else None),
        missing=tuple(name for label, name in enumerate(store.classes) if label not in counts),
    )


def _load_examples(
    database: DuckDBPyConnection, store: LabelStore, balance: bool, overlap: Sequence[bytes] | None
) -> None:
    """Make the table ``example`` of all rows: what is selected by, and whether their files are known."""
    import pyarrow as pa

    columns, selected = ["label", "confidence", "copies"], "row, label, confidence, copies"
    if balance:
        columns, selected = [*columns, "id"], f"{selected}, md5_number_lower(id::VARCHAR) AS tie"
    if overlap is not None:
        database.register("known", pa.table({"digest": pa.array(overlap, pa.binary())}))
        columns, selected = [*columns, "digest"], f"{selected}, digest::BLOB IN (SELECT digest FROM known) AS is_known"
    else:
        selected = f"{selected}, false AS is_known"
    _load(database, store, f"CREATE TEMP TABLE example AS SELECT {selected} FROM incoming", columns, _numbered)


def _keep(database: DuckDBPyConnection, store: LabelStore, rule: _Rule) -> tuple[int, int]:
    """Make the table ``kept`` of ``example``, which is dropped; how many overlap, and how many others are not sure."""
    limit = ""
    if rule.any_class:
        database.execute(f"CREATE TEMP TABLE sure AS SELECT row FROM example WHERE NOT is_known AND {rule.sure}")
        best = f"SELECT unnest(max(key, {rule.per_class})) AS key FROM incoming WHERE row IN (FROM sure) GROUP BY class"
        columns = ["probabilities", *(["classes"] if store.top_k is not None else [])]
        sql = f"CREATE TEMP TABLE best AS SELECT DISTINCT {_LAST_ROW} - (key & {_LAST_ROW}) AS row FROM ({best})"
        _load(database, store, sql, columns, _by_class)
        limit = "AND row IN (FROM best)"
    elif rule.per_class is not None:
        limit = f"QUALIFY row_number() OVER (PARTITION BY label ORDER BY confidence DESC, row) <= {rule.per_class}"
    database.execute(
        f"CREATE TEMP TABLE kept AS SELECT * EXCLUDE (confidence, is_known) FROM example "
        f"WHERE NOT is_known AND {rule.sure} {limit}"
    )
    counted = database.execute(
        f"SELECT count(*) FILTER (is_known), count(*) FILTER (NOT is_known AND NOT {rule.sure}) FROM example"
    ).fetchone()
    assert counted is not None
    database.execute("DROP TABLE example")
    return counted[0], counted[1]


def _count_copies(database: DuckDBPyConnection, counts: Mapping[int, int], goal: int | None) -> int:
    """Make the table ``chosen`` of ``kept``, which is dropped; how many examples it counts.

    Args:
        counts: rows of each class that is left.
        goal: of each class, with copies; None: each row counts as often as it did.
    """
    copies = "copies"
    if goal is not None:
        _refuse_many_copies(goal * len(counts), f"{len(counts):,} classes of {goal:,} each")
        size, place = "count(*) OVER (PARTITION BY label)", "row_number() OVER (PARTITION BY label ORDER BY tie, row)"
        copies = f"({goal} // {size} + CASE WHEN {place} <= {goal} % {size} THEN 1 ELSE 0 END)::INTEGER"
    database.execute(f"CREATE TEMP TABLE chosen AS SELECT row, {copies} AS copies FROM kept ORDER BY row")
    database.execute("DROP TABLE kept")
    total = database.execute("SELECT sum(copies) FROM chosen").fetchone()
    assert total is not None
    _refuse_many_copies(int(total[0]), "those of the store")
    return int(total[0])


def _refuse_many_copies(copies: int, made_of: str) -> None:
    if copies > MOST_COPIES:
        raise MetaplError(
            f"the new store would count {copies:,} examples with their copies, {made_of}; expected at most "
            f"{MOST_COPIES:,}: give a smaller per_class."
        )


def _copy(database: DuckDBPyConnection, store: LabelStore, writer: LabelWriter, progress: Progress | None) -> None:
    """Write the chosen rows behind those that the writer has."""
    import pyarrow as pa

    start, done = 0, 0
    last: Any = writer.last
    behind = -1 if last is None else int(store.rows([last])[0])
    for number, part in enumerate(store.parts):
        rows = database.execute(
            "SELECT row, copies FROM chosen WHERE row >= $first AND row < $end AND row > $behind ORDER BY row",
            {"first": start, "end": start + part.rows, "behind": behind},
        ).fetchnumpy()
        if len(rows["row"]):
            table = store.table(number).take(rows["row"] - start)
            place = table.schema.get_field_index("copies")
            column = pa.array(np.asarray(rows["copies"], dtype=np.int32))
            writer.add_table(table.set_column(place, table.schema.field(place), column))
            done += len(rows["row"])
            if progress is not None:
                progress(done)
        start += part.rows
