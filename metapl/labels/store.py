"""Stored class distributions of many examples, written part by part and read in any order.

A store is a folder:

store.json                         classes, encoding, provenance and the parts; sealed by a checksum
part-00000-0123456789abcdef.arrow  rows; the beginning of the file's SHA-256 is in its name

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
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from metapl.errors import (
    MetaplError,
    few,
    needed_for,
    reason_of,
    require_packages,
)
from metapl.execution.checks import described
from metapl.machine import environment
from metapl.runs.files import (
    is_temporary,
    json_sha256,
    owned,
    read_json,
    remove_temporary,
    sha256_of,
    write_whole,
)
from metapl.words import composed

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 3
DESCRIPTION = "store.json"

# Of the SHA-256 of a picture's file: the chance that any two of a billion pictures share them is 1
# in 10^21.
DIGEST_BYTES = 16

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
    """Class distributions of many examples by their ids, as a :class:`LabelWriter` sealed them.

    Of an example, K float16 numbers s_1, …, s_K are stored, of its K most probable classes; K = C
    where all are kept. What is read is the distribution

        q_c ∝ s_c for a stored class c,
        q_c ∝ max(0, 1 − Σ_j s_j) / (C − K) for every other class,

    divided by its sum, in float32: the remainder is spread evenly. Of probabilities above 6·10⁻⁵
    float16 keeps 11 bits: they are off by two parts in 2,048 at most, one of their own and one of
    the sum that is divided by.

    Args:
        folder: of the store.
        must_be_complete: whether a store that is still being written is refused.

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

    def __init__(self, folder: str | os.PathLike[str], *, must_be_complete: bool = True) -> None:
        require()
        self.folder = Path(folder)
        file = self.folder / DESCRIPTION
        content = read_json(file, mend=AGAIN)
        if content.get("format") != FORMAT or content.pop("seal", None) != json_sha256(content):
            raise MetaplError(
                f"{file} is damaged, or its format is not {FORMAT}, that of this version. {AGAIN}"
            )
        if must_be_complete and not content["complete"]:
            raise MetaplError(
                f"the store in {folder} is not whole; go on with metapl label --resume, or "
                "LabelWriter(resume=True)."
            )
        self.complete: bool = content["complete"]
        self.classes: tuple[str, ...] = tuple(map(composed, content["classes"]))
        self.top_k: int | None = content["top_k"]
        self.rows_per_part: int = content["rows_per_part"]
        self.provenance: Mapping[str, Any] = content["provenance"]
        self.parts = tuple(Part(**part) for part in content["parts"])
        self.starts = np.cumsum([0, *(part.rows for part in self.parts)])

    def __getstate__(self) -> dict[str, Any]:
        # Each process maps the files itself.
        return {name: value for name, value in vars(self).items() if name != "tables"}

    @cached_property
    def tables(self) -> list[pa.Table]:
        """Return the rows of each part, in a memory map.

        Raises:
            MetaplError: a file is not as it was written; the message names it.
        """
        with needed_for("stored labels"):
            import pyarrow as pa

        tables = []
        for part in self.parts:
            path = self.folder / part.file
            try:
                is_whole = sha256_of(path) == part.sha256
            except OSError as error:
                raise MetaplError(f"{path} cannot be read: {reason_of(error)}. {AGAIN}") from error
            if not is_whole:
                raise MetaplError(
                    f"{path} is damaged: its SHA-256 is not the one in {DESCRIPTION}. {AGAIN}"
                )
            # pyarrow's map does not need its file to stay open: a process may have few of these.
            memory_map = pa.memory_map(os.fsencode(path))
            tables.append(pa.ipc.open_file(memory_map).read_all())
        return tables

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the labels, whenever they were written.

        It is that of the parts' checksums.
        """
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()

    @property
    def has_digests(self) -> bool:
        """Return whether the examples are files, of whose SHA-256 the store has the beginning."""
        return "digest" in self.tables[0].column_names

    def __len__(self) -> int:
        """Return the number of rows, each of another example."""
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[str | int]:
        """Yield the ids in the order of the rows, a part at a time."""
        for table in self.tables:
            yield from table["id"].to_pylist()

    def __getitem__(self, ids: str | int | Ids) -> Tensor:
        """Return the distributions of B ids, float32 (B, C), or of one id, (C,)."""
        if isinstance(ids, str | int | np.integer):
            return self[np.asarray([ids])][0]
        rows = self.find(ids)
        missing = [name for name, row in zip(ids, rows.tolist(), strict=True) if row < 0]
        if missing:
            raise MetaplError(
                f"{self.folder} has no labels of {few(missing)}; expected examples that it was "
                "made of."
            )
        return self.at(rows)

    def ids_of_files(self, root: Path, names: Sequence[str]) -> list[str]:
        """Return the ids of files: their paths in the folder that was labeled.

        Where that folder was moved, the paths are those in the root.

        Args:
            root: the folder of the files.
            names: their paths in it.
        """
        labeled_folder = Path(str(self.provenance.get("pictures", "-"))).resolve()
        inside = Path()
        # The root of a list of files is the folder that they have in common, which may lie deeper.
        if root.resolve().is_relative_to(labeled_folder):
            inside = root.resolve().relative_to(labeled_folder)
        return [(inside / name).as_posix() for name in names]

    def find(self, ids: Ids) -> Values:
        """Return the rows of examples, int64 (B,), with −1 for one that has none."""
        with needed_for("stored labels"):
            import pyarrow as pa
            import pyarrow.compute as pc

        names: Any = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids
        stored_ids = pa.chunked_array([table["id"].chunk(0) for table in self.tables])
        # Those of another kind, or that no store can hold, have no row.
        form = text_of if pa.types.is_string(stored_ids.type) else whole_number_of
        wanted = [*map(form, names)]
        wanted_ids = pa.array(wanted, stored_ids.type)
        rows = pc.index_in(wanted_ids, value_set=stored_ids)
        if rows.null_count and pa.types.is_string(stored_ids.type):
            # Names of files may have changed their Unicode form on the way.
            composed_ids = pc.utf8_normalize(stored_ids, "NFC")
            composed_rows = pc.index_in(pc.utf8_normalize(wanted_ids, "NFC"), composed_ids)
            rows = pc.coalesce(rows, composed_rows)
        return np.asarray(rows.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)

    def at(self, rows: Sequence[int] | Values | Tensor) -> Tensor:
        """Return the distributions of B rows in any order, float32 (B, C) on the CPU.

        Raises:
            MetaplError: the store has no such row.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= len(self))].tolist()
        if outside:
            raise MetaplError(
                f"{self.folder} has no row {few(outside)}; expected 0 to {len(self) - 1:,}."
            )
        width = self.top_k or len(self.classes)
        s_BK = np.empty((len(wanted), width), np.float32)
        classes_BK = np.empty((len(wanted), width), np.int32)
        for number, where in self.by_part(wanted):
            places = wanted[where] - self.starts[number]
            s_BK[where] = self.matrix(number, "probabilities")[places]
            if self.top_k is not None:
                classes_BK[where] = self.matrix(number, "classes")[places]
        # By numpy, in one thread: torch's threads would wait for each other at every small batch.
        others = len(self.classes) - width
        sum_B1 = s_BK.sum(axis=1, keepdims=True)
        if self.top_k is None:
            return torch.from_numpy(s_BK / sum_B1)
        remainder_B1 = np.maximum(0, 1 - sum_B1) * (others > 0)
        whole_B1 = sum_B1 + remainder_B1
        q_BC = np.repeat(remainder_B1 / whole_B1 / max(others, 1), len(self.classes), axis=1)
        np.put_along_axis(q_BC, classes_BK, s_BK / whole_B1, axis=1)
        return torch.from_numpy(q_BC)

    def by_part(self, rows: Values) -> Iterator[tuple[int, Values]]:
        """Yield each part that has some of the rows, and where these stand among ``rows``.

        The parts come in their order.
        """
        parts = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(parts, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
            if len(where):
                yield int(parts[where[0]]), where

    def taken(
        self, rows: Values, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[Values, pa.Table]]:
        """Yield copies of the rows, part by part, and where these stand among ``rows``."""
        for number, where in self.by_part(rows):
            table = self.tables[number] if columns is None else self.tables[number].select(columns)
            yield where, table.take(rows[where] - self.starts[number])

    def matrix(self, number: int, name: str) -> Values:
        """Return the ``probabilities`` of a part, (rows, K), as they lie in the file.

        With ``top_k`` there are their ``classes`` too.
        """
        lists = self.tables[number][name].chunk(0)
        return np.asarray(lists.flatten().to_numpy().reshape(len(lists), -1))

    def column(self, name: str) -> Values:
        """Return the numbers of all rows in a column.

        Columns are label, confidence, entropy and copies, and ids that are numbers.
        """
        return np.concatenate([table[name].to_numpy() for table in self.tables])

    def rows_with_copies(self) -> Values:
        """Return the rows, int64, each as often as it counts.

        Draw from these where classes were balanced by duplication.
        """
        return np.repeat(np.arange(len(self)), self.column("copies"))


class LabelWriter:
    """Writes a store of class distributions, and seals it when its ``with`` block ends well.

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
        names = [] if isinstance(classes, str) else [*classes]
        are_texts = all(isinstance(name, str) for name in names)
        if not names or not are_texts or len({*map(composed, names)}) < len(names):
            raise MetaplError(
                f"the classes are {few(names, 10, 30)}; expected one or more texts, each once."
            )
        if top_k is not None and not 1 <= top_k <= len(names):
            raise MetaplError(
                f"top_k is {top_k}; expected 1 to {len(names):,}, the number of classes."
            )
        self.folder = Path(folder)
        self.classes = tuple(map(composed, names))
        self.top_k = top_k
        self.resume = resume
        self.rows_per_part = rows_per_part
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.provenance: Mapping[str, Any] = {
            "begun": begun,
            "made_with": environment(),
            **(provenance or {}),
        }

        # What was on disk when this writer was entered, and whether that is whole, so that there is
        # nothing to add.
        self.there: LabelStore | None = None
        self.complete = False

        # The id of the last row that was added; of a writer that resumes, of the last one on disk.
        self.last: str | int | None = None

        self._parts: list[Part] = []
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.Table] = []
        self._block = self._written()

    @property
    def rows(self) -> int:
        """Return the number of rows that are on disk."""
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
                self._go_on()
            else:
                self._begin()
            remove_temporary(self.folder)
            # Where the block fails, what is on disk stays, for a writer to go on with.
            yield
            if not self.complete:
                self._seal()

    def _begin(self) -> None:
        """Describe a store without rows; refuse a folder with other files."""
        others = [
            name
            for name in os.listdir(self.folder)
            if not name.startswith(".") and not is_temporary(name)
        ]
        if others:
            raise MetaplError(
                f"{self.folder} holds no {DESCRIPTION} and other files ({few(sorted(others))}); "
                "give another folder (--out)."
            )
        self._describe()

    def _go_on(self) -> None:
        """Take over the store that is there, if it was begun as this one."""
        there = LabelStore(self.folder, must_be_complete=False)
        self.there = there
        if not self.resume:
            if there.complete:
                mend = "give another folder (--out)"
            else:
                mend = "go on with resume=True (--resume)"
            raise MetaplError(f"{self.folder} holds a store of labels already; {mend}.")
        stored_settings = _settings_of(there)
        settings = _settings_of(self)
        differing: list[str] = []
        for name in sorted(stored_settings | settings):
            stored_value = stored_settings.get(name)
            value = settings.get(name)
            if stored_value != value:
                differing.append(f"{name} {stored_value!r}, now {value!r}")
        if differing:
            raise MetaplError(
                f"the store in {self.folder} was begun with {few(differing, longest=160)}; go on "
                "as it was begun, or give another folder (--out)."
            )
        self.provenance = there.provenance
        self.complete = there.complete
        self._parts = [*there.parts]
        if there.tables:
            last_table = there.tables[-1]
            self._schema = last_table.schema
            self.last = last_table["id"][-1].as_py()

    def _seal(self) -> None:
        """Write the rows that wait, and say that the store is whole."""
        waiting = sum(map(len, self._waiting))
        if waiting:
            self._flush(waiting)
        if not self._parts:
            raise MetaplError(
                f"no example was given for the store in {self.folder}; expected one or more."
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
        with needed_for("stored labels"):
            import pyarrow as pa

        shape = (len(ids), len(self.classes))
        if probabilities.shape != shape or not probabilities.is_floating_point():
            raise MetaplError(
                f"the probabilities are {described(probabilities)}; expected floating point "
                f"{shape}."
            )
        p_BC = probabilities.detach().to("cpu", torch.float32)
        are_positive_B = (p_BC >= 0).all(dim=1)
        sum_to_1_B = (p_BC.sum(dim=1) - 1).abs() <= TOLERANCE
        if not bool((are_positive_B & sum_to_1_B).all()):
            raise MetaplError(
                "some of the probabilities are negative or not finite, or those of an example do "
                "not sum to 1; expected what softmax gives."
            )
        names: list[Any] = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
        in_order = names if self.last is None else [self.last, *names]
        kinds = {type(name) for name in in_order}
        if kinds not in (set(), {str}, {int}) or not all(map(is_text, names)):
            expected = "integers, or strings that UTF-8 can hold, over all calls"
            raise MetaplError(f"the ids are {described(ids)}; expected {expected}.")
        for previous, following in pairwise(in_order):
            if not previous < following:
                raise MetaplError(
                    f"the id {few([following])} comes after {few([previous])}; expected each "
                    "greater than the one before: sort the examples, each once."
                )

        def lists(values_BK: Tensor) -> pa.Array:
            return pa.FixedSizeListArray.from_arrays(
                pa.array(values_BK.numpy().reshape(-1)), values_BK.shape[1]
            )

        # Of equal probabilities, this takes the first.
        confidence_B, label_B = p_BC.max(dim=1)
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
            # topk may take any of equals.
            p_BC, classes_BC = p_BC.sort(dim=1, descending=True, stable=True)
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
            self._schema = table.schema
            self.last = table["id"][-1].as_py()
            self._waiting.append(table)
        while sum(map(len, self._waiting)) >= self.rows_per_part:
            self._flush(self.rows_per_part)

    def _flush(self, rows: int) -> None:
        """Write a part of the first rows that wait."""
        with needed_for("stored labels"):
            import pyarrow as pa

        together = pa.concat_tables(self._waiting)
        # A copy, since a slice would be written with what lies behind it: the same rows are to give
        # the same bytes.
        table = together.take(pa.array(np.arange(rows))).combine_chunks()
        sink = pa.BufferOutputStream()
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
        """Write what stands in store.json."""
        content = {
            "format": FORMAT,
            "complete": self.complete,
            "classes": self.classes,
            "top_k": self.top_k,
            "rows_per_part": self.rows_per_part,
            "provenance": self.provenance,
            "parts": [asdict(part) for part in self._parts],
        }
        sealed = {**content, "seal": json_sha256(content)}
        self._write(DESCRIPTION, (json.dumps(sealed, indent=1) + "\n").encode())

    def _write(self, name: str, content: Any) -> None:
        """Write a file of the store, whole or not at all."""
        mend = (
            f"the {self.rows:,} rows that were written are whole. Mend that (is the disk full?), "
            "then repeat it, with resume=True where that is an option (metapl label --resume)."
        )
        write_whole(self.folder / name, content, mend)


def _settings_of(store: LabelStore | LabelWriter) -> dict[str, Any]:
    """Return what a store was begun with, and a writer that goes on with it has to have too."""
    settings: dict[str, Any] = {
        "classes": store.classes,
        "top_k": store.top_k,
        "rows_per_part": store.rows_per_part,
    }
    for name, value in store.provenance.items():
        if name not in FREE:
            settings[f"provenance.{name}"] = value
    return settings


def text_of(name: Any) -> str | None:
    """Return an id that is a text as a store may hold it; None for any other."""
    return name if isinstance(name, str) and is_text(name) else None


def whole_number_of(name: Any) -> int | None:
    """Return an id that is a whole number as a store may hold it; None for any other."""
    value = name.item() if isinstance(name, Tensor | np.generic) else name
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        return None
    # Arrow has no greater ones.
    return int(value) if abs(value) < 2**63 else None


def is_text(name: str | int) -> bool:
    """Return whether UTF-8 can hold a name; nothing else is stored."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(name))
