"""Stored class distributions of many examples: written part by part by a teacher, read in any order, selected from.

A store is a folder:

store.json                         classes, encoding, provenance and the parts; sealed by a checksum
part-00000-0123456789abcdef.arrow  rows of the store, with the beginning of the file's SHA-256 in
its name

A part is an Arrow file of one batch, uncompressed, read in a memory map. Rows are in the order of
their ids. A part gets its name when its bytes are on disk; then the description, which names it, is
replaced. So a writer that was killed goes on behind the last part that the description names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import torch
from torch import Tensor

from metapl.apps.machine import (
    environment,
    is_temporary,
    json_sha256,
    owned,
    read_json,
    remove_temporary,
    sha256_of,
    write_whole,
)
from metapl.apps.pictures.folders import ask, digest, scan_unlabeled
from metapl.apps.words import require_packages
from metapl.data import draws
from metapl.errors import FieldError, MetaplError, few, reason_of
from metapl.execution.checks import described
from metapl.runs.fields import Range, check_arguments

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, DESCRIPTION = 3, "store.json"

# Of the SHA-256 of a picture's file: the chance that any two of a billion pictures share them is 1
# in 10^21.
DIGEST_BYTES = 16

# The stream of draws of a uniform share, which keeps it apart from other uses of a seed.
SHARE = 0x5A4E

# How far the sum of an example's probabilities may be from 1; those of a softmax are within a few
# 1e-6.
TOLERANCE = 1e-3

# What a resumed writer's provenance may say otherwise: when, on which machine, where the run and
# the pictures are.
FREE = ("begun", "made_with", "run", "pictures")

AGAIN = (
    "A store is expected as it was written: put it back, or write the labels again to another "
    "folder (--out)."
)

Values = np.ndarray[Any, Any]
Ids = Sequence[str] | Sequence[int] | Values | Tensor

require = partial(require_packages, "stored labels", "pyarrow")


@dataclass(frozen=True)
class Part:
    """A file of a store, as the description has it."""

    file: str
    rows: int
    sha256: str


class LabelStore:
    """Class distributions of many examples by their ids, in a folder that a :class:`LabelWriter` has sealed.

    Of an example, K float16 numbers s_1, …, s_K are stored, of its K most probable classes; K = C
    where all are kept. What is read is the distribution

        q_c ∝ s_c for a stored class c, and q_c ∝ max(0, 1 − Σ_j s_j) / (C − K) for every other class,

    divided by its sum, in float32: the remainder is spread evenly. Of probabilities above 6·10⁻⁵
    float16 keeps 11 bits: they are off by two parts in 2,048 at most, one of their own and one of
    the sum that is divided by.

    Args:
        folder: of the store.

    Cost: all parts are checked by their SHA-256 when something is first read (about 1 ms a MB);
    then numbers are read from memory maps: 2 K bytes a row (6 K with classes), in any order. To
    find rows by their ids, all ids are hashed: of examples that are read again and again, ask for
    the rows once, by :meth:`find`, and read by :meth:`at`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "store"
    >>> with LabelWriter(folder, ["ant", "bee", "cat"], top_k=1) as writer:
    ...     writer.add([7, 9], torch.tensor([[0.5, 0.375, 0.125], [0.0, 0.0, 1.0]]))
    >>> store = LabelStore(folder)
    >>> store[[9, 7]]
    tensor([[0.0000, 0.0000, 1.0000],
            [0.5000, 0.2500, 0.2500]])
    >>> store.find([9, 8]), list(store), len(store)
    (array([ 1, -1]), [7, 9], 2)
    """

    def __init__(self, folder: str | os.PathLike[str], *, whole: bool = True) -> None:
        require()
        self.folder = Path(folder)
        file = self.folder / DESCRIPTION
        content = read_json(file, mend=AGAIN)
        if content.get("format") != FORMAT or content.pop("seal", None) != json_sha256(content):
            raise MetaplError(
                f"{file} is damaged, or its format is not {FORMAT}, that of this version. {AGAIN}"
            )
        if whole and not content["complete"]:
            raise MetaplError(
                f"the store in {folder} is not whole: go on with resume=True (--resume)."
            )
        self.complete: bool = content["complete"]
        self.classes: tuple[str, ...] = tuple(content["classes"])
        self.top_k: int | None = content["top_k"]
        self.rows_per_part: int = content["rows_per_part"]
        self.provenance: Mapping[str, Any] = content["provenance"]
        self.parts = tuple(Part(**part) for part in content["parts"])
        self.starts = np.cumsum([0, *(part.rows for part in self.parts)])

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name != "tables"
        }  # a process maps its own

    @cached_property
    def tables(self) -> list[pa.Table]:
        """The rows of each part, in a memory map.

        A MetaplError names a file that is not as it was written.
        """
        import pyarrow as pa

        found = []
        for part in self.parts:
            path = self.folder / part.file
            try:
                whole = sha256_of(path) == part.sha256
            except OSError as error:
                raise MetaplError(f"{path} cannot be read: {reason_of(error)}. {AGAIN}") from error
            if not whole:
                raise MetaplError(
                    f"{path} is damaged: its SHA-256 is not the one in {DESCRIPTION}. {AGAIN}"
                )
            # pyarrow's map does not need its file to stay open: a process may have few of these.
            found.append(pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all())
        return found

    @property
    def sha256(self) -> str:
        """SHA-256 of the labels, from the checksums of the parts.

        When they were written is left out.
        """
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()

    @property
    def has_digests(self) -> bool:
        """Whether the examples are files, of which the store has the beginning of the SHA-256."""
        return "digest" in self.tables[0].column_names

    def __len__(self) -> int:
        """Number of rows, each of another example."""
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[str | int]:
        """The ids, in the order of the rows, a part at a time."""
        for table in self.tables:
            yield from table["id"].to_pylist()

    def __getitem__(self, ids: str | int | Ids) -> Tensor:
        """The distributions of examples by B ids, as of :meth:`at`; (C,) of one id."""
        if isinstance(ids, str | int | np.integer):
            return self[np.asarray([ids])][0]
        rows = self.find(ids)
        if missing := [name for name, row in zip(ids, rows.tolist(), strict=True) if row < 0]:
            raise MetaplError(
                f"{self.folder} has no labels of {few(missing)}; expected examples that it was "
                "made of."
            )
        return self.at(rows)

    def find(self, ids: Ids) -> Values:
        """The rows of examples, int64 (B,); −1 where there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        asked: Any = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
        wanted = [name if is_text(name) else None for name in asked]
        known = pa.chunked_array([table["id"].chunk(0) for table in self.tables])
        rows = pc.index_in(pa.array(wanted, known.type), value_set=known).fill_null(-1)
        return np.asarray(rows.to_numpy(zero_copy_only=False), dtype=np.int64)

    def at(self, rows: Sequence[int] | Values | Tensor) -> Tensor:
        """The distributions of B rows in any order, float32 (B, C) on the CPU.

        A MetaplError where there is none.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if outside := wanted[(wanted < 0) | (wanted >= len(self))].tolist():
            raise MetaplError(
                f"{self.folder} has no row {few(outside)}; expected 0 to {len(self) - 1:,}."
            )
        width = self.top_k or len(self.classes)
        s_BK, classes_BK = (
            np.empty((len(wanted), width), np.float32),
            np.empty((len(wanted), width), np.int32),
        )
        for number, where in self.by_part(wanted):
            places = wanted[where] - self.starts[number]
            s_BK[where] = self.matrix(number, "probabilities")[places]
            if self.top_k is not None:
                classes_BK[where] = self.matrix(number, "classes")[places]
        # By numpy, in one thread: torch's threads would wait for each other at every small batch.
        others, sum_B1 = len(self.classes) - width, s_BK.sum(axis=1, keepdims=True)
        if self.top_k is None:
            return torch.from_numpy(s_BK / sum_B1)
        remainder_B1 = np.maximum(0, 1 - sum_B1) * (others > 0)
        whole_B1 = sum_B1 + remainder_B1
        q_BC = np.repeat(remainder_B1 / whole_B1 / max(others, 1), len(self.classes), axis=1)
        np.put_along_axis(q_BC, classes_BK, s_BK / whole_B1, axis=1)
        return torch.from_numpy(q_BC)

    def by_part(self, rows: Values) -> Iterator[tuple[int, Values]]:
        """Each part that has some of the rows, in the order of the parts, and where these stand among ``rows``."""
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(parts, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
            if len(where):
                yield int(parts[where[0]]), where

    def taken(
        self, rows: Values, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[Values, pa.Table]]:
        """Copies of the rows, part by part, and where these stand among ``rows``."""
        for number, where in self.by_part(rows):
            table = self.tables[number] if columns is None else self.tables[number].select(columns)
            yield where, table.take(rows[where] - self.starts[number])

    def matrix(self, number: int, name: str) -> Values:
        """The ``probabilities`` of a part, or with ``top_k`` their ``classes``, (rows, K), as they lie in the file."""
        lists = self.tables[number][name].chunk(0)
        return np.asarray(lists.flatten().to_numpy().reshape(len(lists), -1))

    def column(self, name: str) -> Values:
        """The numbers of all rows in a column.

        Their label, confidence, entropy or copies, or an id that is one.
        """
        return np.concatenate([table[name].to_numpy() for table in self.tables])

    def rows_with_copies(self) -> Values:
        """The rows, int64, each as often as it counts.

        What to draw from where classes were balanced by duplication.
        """
        return np.repeat(np.arange(len(self)), self.column("copies"))


class LabelWriter:
    """Writes a store of class distributions; a context manager, which seals the store when its block ends well.

    Of probabilities p_1, …, p_C of an example, the store keeps float16 numbers: all C, or the k
    greatest with their classes (see :class:`LabelStore`). Beside these stand, of the exact
    distribution, the label (the most probable class, of equals the first), its probability as
    confidence, and the entropy −Σ p_c ln p_c in nats.

    Args:
        folder: of the store; made where it is missing.
        classes: their names, in the order of the probabilities.
        top_k: how many of the greatest probabilities are kept of an example; None keeps all.
        provenance: what is known of the distributions, such as the model, as values that JSON has.
        rows_per_part: rows of a file; what a kill costs.
        resume: go on with a store that is not whole, or find out that it is.

    Cost: the rows of a part in memory, twice while it is written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "store"
    >>> with LabelWriter(folder, ["cat", "dog"]) as writer:
    ...     writer.add(["a.png", "b.png"], torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    >>> LabelStore(folder)["a.png"]
    tensor([0.2500, 0.7500])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        classes: Sequence[str],
        *,
        top_k: int | None = None,
        provenance: Mapping[str, Any] | None = None,
        rows_per_part: int = 8192,
        resume: bool = False,
    ) -> None:
        require()
        if not classes or len({*classes}) < len(classes):
            raise MetaplError(
                f"the classes are {few(classes, 10, 30)}; expected one or more names, each once."
            )
        if top_k is not None and not 1 <= top_k <= len(classes):
            expected = f"1 to {len(classes):,}, the number of classes"
            raise FieldError(f"top_k is {top_k}; expected {expected}.", "top_k", top_k, expected)
        self.folder, self.classes, self.top_k, self.resume = (
            Path(folder),
            tuple(classes),
            top_k,
            resume,
        )
        self.rows_per_part = rows_per_part
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.provenance: Mapping[str, Any] = {
            "begun": begun,
            "made_with": environment(),
            **(provenance or {}),
        }
        self.there: LabelStore | None = None  # what was on disk when this writer was entered
        self.complete = False  # whether that is whole, so that there is nothing to add
        self.last: str | int | None = (
            None  # the id of the last row that was added; of a writer that resumes, on disk
        )
        self._parts: list[Part] = []
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.Table] = []
        self._block = self._written()

    @property
    def rows(self) -> int:
        """How many rows are on disk."""
        return sum(part.rows for part in self._parts)

    def __enter__(self) -> Self:
        self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)

    @contextmanager
    def _written(self) -> Iterator[None]:
        with owned(self.folder, (DESCRIPTION,)):
            if (self.folder / DESCRIPTION).exists():
                # Go on with what is there, if it was begun as it is now.
                self.there = there = LabelStore(self.folder, whole=False)
                if not self.resume:
                    mend = (
                        "give another folder (--out)"
                        if there.complete
                        else "go on with resume=True (--resume)"
                    )
                    raise MetaplError(f"{self.folder} holds a store of labels already; {mend}.")
                then, now = (
                    {
                        "classes": each.classes,
                        "top_k": each.top_k,
                        "rows_per_part": each.rows_per_part,
                    }
                    | {
                        f"provenance.{name}": value
                        for name, value in each.provenance.items()
                        if name not in FREE
                    }
                    for each in (there, self)
                )
                changed = [name for name in sorted(then | now) if then.get(name) != now.get(name)]
                if differing := [
                    f"{name} {then.get(name)!r}, now {now.get(name)!r}" for name in changed
                ]:
                    fault = (
                        f"the store in {self.folder} was begun with {few(differing, longest=160)}"
                    )
                    raise MetaplError(
                        f"{fault}; go on as it was begun, or give another folder (--out)."
                    )
                self.provenance, self.complete, self._parts = (
                    there.provenance,
                    there.complete,
                    [*there.parts],
                )
                if there.tables:
                    self._schema, self.last = (
                        there.tables[0].schema,
                        there.tables[-1]["id"][-1].as_py(),
                    )
            elif others := [
                name
                for name in os.listdir(self.folder)
                if name[0] != "." and not is_temporary(name)
            ]:
                fault = (
                    f"{self.folder} holds no {DESCRIPTION} and other files ({few(sorted(others))})"
                )
                raise MetaplError(f"{fault}; give another folder (--out).")
            else:
                self._describe()
            remove_temporary(self.folder)
            yield  # where the block fails, what is on disk stays, for a writer to go on with
            if not self.complete:
                if waiting := sum(map(len, self._waiting)):
                    self._flush(waiting)
                if not self._parts:
                    raise MetaplError(
                        f"no example was given for the store in {self.folder}; expected one or "
                        "more."
                    )
                self.complete = True
                self._describe()

    def add(self, ids: Ids, probabilities: Tensor, digests: Sequence[bytes] | None = None) -> None:
        """Add examples behind those that are there.

        Args:
            ids: B strings, or B integers; each greater than the one before, over all calls. Strings
                are compared by the codes of their characters, as Python does.
            probabilities: (B, C), floating point, on any device; each row sums to 1.
            digests: the first 16 bytes of the SHA-256 of each example's file, by which copies are
                recognized.
        """
        import pyarrow as pa

        shape = (len(ids), len(self.classes))
        if probabilities.shape != shape or not probabilities.is_floating_point():
            raise MetaplError(
                f"the probabilities are {described(probabilities)}; expected floating point "
                f"{shape}."
            )
        p_BC = probabilities.detach().to("cpu", torch.float32)
        if not bool(((p_BC >= 0).all(dim=1) & ((p_BC.sum(dim=1) - 1).abs() <= TOLERANCE)).all()):
            fault = (
                "some of the probabilities are negative or not finite, or those of an example do "
                "not sum to 1"
            )
            raise MetaplError(f"{fault}; expected what softmax gives.")
        names: list[Any] = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
        in_order = names if self.last is None else [self.last, *names]
        kinds = {type(name) for name in in_order}
        if kinds not in (set(), {str}, {int}) or not all(map(is_text, names)):
            expected = "integers, or strings that UTF-8 can hold, over all calls"
            raise MetaplError(f"the ids are {described(ids)}; expected {expected}.")
        if wrong := next(
            ((one, other) for one, other in pairwise(in_order) if not one < other), None
        ):
            fault = f"the id {few([wrong[1]])} comes after {few([wrong[0]])}"
            raise MetaplError(
                f"{fault}; expected each greater than the one before: sort the examples, each once."
            )

        def lists(values_BK: Tensor) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(
                pa.array(values_BK.numpy().reshape(-1)), values_BK.shape[1]
            )

        confidence_B, label_B = p_BC.max(dim=1)  # of equals the first
        columns = {
            "id": pa.array(names, pa.string() if kinds == {str} else pa.int64()),
            "label": pa.array(label_B.to(torch.int32).numpy()),
            "confidence": pa.array(confidence_B.numpy()),
            "entropy": pa.array(-(p_BC * p_BC.clamp(min=1e-38).log()).sum(dim=1).numpy()),
            "copies": pa.array(np.ones(len(names), np.int32)),
        }
        if digests is not None:
            columns["digest"] = pa.array(
                [digest[:DIGEST_BYTES] for digest in digests], pa.binary(DIGEST_BYTES)
            )
        if self.top_k is not None:
            p_BC, classes_BC = p_BC.sort(
                dim=1, descending=True, stable=True
            )  # topk may take any of equals
            columns["classes"] = lists(classes_BC[:, : self.top_k].to(torch.int32))
        columns["probabilities"] = lists(p_BC[:, : self.top_k].to(torch.float16))
        self.add_table(pa.table(columns))

    def add_table(self, table: pa.Table) -> None:
        """Add rows as a part has them, such as those of another store.

        Their ids follow those that are there.
        """
        if self.complete:
            raise MetaplError(
                f"the store in {self.folder} is whole; expected nothing more to be added."
            )
        if self._schema is not None and not self._schema.equals(table.schema):
            raise MetaplError(
                f"expected {', '.join(self._schema.names)} again: either all have digests or none."
            )
        if len(table):
            self._schema, self.last = table.schema, table["id"][-1].as_py()
            self._waiting.append(table)
        while sum(map(len, self._waiting)) >= self.rows_per_part:
            self._flush(self.rows_per_part)

    def _flush(self, rows: int) -> None:
        """Write a part of the first rows that wait."""
        import pyarrow as pa

        together = pa.concat_tables(self._waiting)
        # A copy, since a slice would be written with what lies behind it: the same rows are to give
        # the same bytes.
        table, sink = (
            together.take(pa.array(np.arange(rows))).combine_chunks(),
            pa.BufferOutputStream(),
        )
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        content = sink.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        part = Part(f"part-{len(self._parts):05}-{sha256[:16]}.arrow", rows, sha256)
        self._write(part.file, content)
        self._parts.append(part)
        self._describe()
        self._waiting = [together.slice(rows)]

    def _describe(self) -> None:
        content = {
            "format": FORMAT,
            "complete": self.complete,
            "classes": self.classes,
            "top_k": self.top_k,
            "rows_per_part": self.rows_per_part,
            "provenance": self.provenance,
            "parts": [asdict(part) for part in self._parts],
        }
        self._write(
            DESCRIPTION,
            (json.dumps({**content, "seal": json_sha256(content)}, indent=1) + "\n").encode(),
        )

    def _write(self, name: str, content: Any) -> None:
        mend = "Mend that (is the disk full?), then go on with resume=True (--resume)."
        write_whole(
            self.folder / name, content, f"the {self.rows:,} rows that are there are whole. {mend}"
        )


def is_text(name: str | int) -> bool:
    """Whether UTF-8 can hold it; nothing else is stored."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(name))


# --------------------------------------------------------------- what is in a store, and selections


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
