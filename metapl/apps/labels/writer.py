"""Writing a store, part by part, so that a kill at any moment costs the rows of one part and spoils nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from metapl.apps.labels import files as layout
from metapl.apps.labels.files import DESCRIPTION, DIGEST_BYTES, PAGE_ROWS, PAGE_VALUES, Description, Part
from metapl.apps.labels.store import LabelStore
from metapl.apps.machine.environment import environment
from metapl.apps.machine.ownership import owned
from metapl.apps.machine.sealed import remove_temporary, write_whole
from metapl.errors import MetaplError, few
from metapl.execution.checks import described

if TYPE_CHECKING:
    import pyarrow as pa

Ids = Sequence[str] | Sequence[int] | np.ndarray[Any, Any] | Tensor

# How far the sum of an example's probabilities may be from 1; those of a softmax are within a few 1e-6.
TOLERANCE = 1e-3

# What a resumed writer's provenance may say otherwise: when, on which machine, where the run and the pictures are.
FREE = ("begun", "made_with", "run", "pictures")

ELSEWHERE = "give another folder (--out)"


class LabelWriter:
    """Writes a store of class distributions; a context manager, which seals the store when its block ends well.

    Of probabilities p_1, …, p_C of an example, the store keeps float16 numbers: all C, or the k greatest with their
    classes (see :class:`LabelStore`). Beside these stand, of the exact distribution, the label (the most probable
    class, of equals the first), its probability as confidence, and the entropy −Σ p_c ln p_c in nats.

    Args:
        folder: of the store; made where it is missing.
        classes: their names, in the order of the probabilities.
        top_k: how many of the greatest probabilities are kept of an example; None keeps all.
        provenance: what is known of the distributions, such as the model, as values that JSON has.
        rows_per_part: rows of a file, at most 16,384 and 2^24 numbers; what a kill costs.
        resume: go on with a store that is not whole, or find out that it is.

    Cost: the rows of a part in memory, twice while it is written.

    Raises:
        MetaplError: when the block is entered: pyarrow is not installed; the folder holds other files, or a finished
            store; another process is writing to it; or what is resumed was begun otherwise. Later: see :meth:`add`.

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
        fault = layout.classes_fault(classes, top_k)
        if fault is None and not 1 <= rows_per_part <= PAGE_ROWS:
            fault = f"rows_per_part is {rows_per_part}; expected 1 to {PAGE_ROWS:,}"
        if fault is not None:
            raise MetaplError(f"{fault}.")
        self.folder, self.classes, self.top_k, self.resume = Path(folder), tuple(classes), top_k, resume
        self.rows_per_part = max(1, min(rows_per_part, PAGE_VALUES // (top_k or len(classes))))
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.provenance = {"begun": begun, "made_with": environment(), **(provenance or {})}
        self.complete = False  # whether the store that was to be resumed is whole, so that there is nothing to add
        self._there: LabelStore | None = None
        self._parts: list[Part] = []
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.Table] = []
        self._last: str | int | None = None
        self._stack = ExitStack()

    @property
    def rows(self) -> int:
        """How many rows are on disk."""
        return sum(part.rows for part in self._parts)

    @property
    def last(self) -> str | int | None:
        """The id of the last row on disk; a writer that resumes goes on behind it. None where there is none."""
        return self._parts[-1].last if self._parts else None

    def digests(self) -> Iterator[tuple[Any, bytes]]:
        """As :meth:`LabelStore.digests`, of the rows that were on disk when this writer was entered."""
        return iter(()) if self._there is None else self._there.digests()

    def __enter__(self) -> Self:
        layout.require("pyarrow")
        if (around := layout.store_around(self.folder)) is not None:
            raise MetaplError(f"{self.folder} lies in the store {around}; {ELSEWHERE}.")
        if self.folder.exists() and not self.folder.is_dir():
            raise MetaplError(f"{self.folder} is not a folder; expected that of a store, or a new one: {ELSEWHERE}.")
        with ExitStack() as stack:
            stack.enter_context(owned(self.folder))
            if others := sorted(name for name in os.listdir(self.folder) if not layout.is_own(name)):
                raise MetaplError(f"{self.folder} holds files that are not a store's ({few(others)}); {ELSEWHERE}.")
            if (self.folder / DESCRIPTION).exists():
                self._go_on(layout.read_description(self.folder))
            elif layout.parts(self.folder):
                fault = f"{self.folder} has parts of a store and no {DESCRIPTION}"
                raise MetaplError(f"{fault}; put it back from a copy, or {ELSEWHERE}.")
            remove_temporary(self.folder)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # what is on disk stays, for a writer to go on with
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if not self.complete:
                if self._waiting:
                    self._flush(sum(map(len, self._waiting)))
                if not self._parts:
                    raise MetaplError(f"no example was given for the store in {self.folder}; expected one or more.")
                self._describe(complete=True)
                self.complete = True

    def _go_on(self, before: Description) -> None:
        """Go on with what is there, begun as it is now."""
        if not self.resume:
            state, mend = (
                ("a", ELSEWHERE) if before.complete else ("an unfinished", "go on with resume=True (--resume)")
            )
            raise MetaplError(f"{self.folder} holds {state} store of labels; {mend}.")
        then, now = (
            {"classes": [*content.classes], "top_k": content.top_k, "rows_per_part": content.rows_per_part}
            | {f"provenance.{name}": value for name, value in content.provenance.items() if name not in FREE}
            for content in (before, self)
        )
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                begun, asked = (few([repr(content.get(name))], longest=60) for content in (then, now))
                fault = f"the store in {self.folder} was begun with {name} {begun}, and now it is {asked}"
                raise MetaplError(f"{fault}; go on as it was begun, or {ELSEWHERE}.")
        self._there = LabelStore.begun(self.folder, before)
        self._there.verify()
        self.provenance, self.complete = before.provenance, before.complete
        self._parts, self._schema = before.parts, self._there.schema
        self._last = self.last
        # A writer that is killed leaves one part at most that the description does not name yet.
        next_one = layout.part_name(len(self._parts), "").removesuffix(".parquet")
        for name in {*layout.parts(self.folder)} - {part.file for part in self._parts}:
            if self.complete or not name.startswith(next_one):
                fault = f"{self.folder} has {name}, which its {DESCRIPTION} does not name: it is of another store"
                raise MetaplError(f"{fault}; remove it, or {ELSEWHERE}.")
            (self.folder / name).unlink()

    def add(self, ids: Ids, probabilities: Tensor, digests: Sequence[bytes] | None = None) -> None:
        """Add examples behind those that are there.

        Args:
            ids: B strings, or B integers; each greater than the one before, over all calls. Strings are compared by the
                codes of their characters, as Python does.
            probabilities: (B, C), floating point, on any device; each row sums to 1.
            digests: the first 16 bytes of the SHA-256 of each example's file, by which copies are recognized.

        Raises:
            MetaplError: other ids or probabilities; the disk refused. What is on disk is whole then.
        """
        import pyarrow as pa

        shape = (len(ids), len(self.classes))
        is_tensor = isinstance(probabilities, Tensor)
        if not is_tensor or probabilities.shape != shape or not probabilities.is_floating_point():
            given = f"the probabilities are {described(probabilities)}"
            raise MetaplError(f"{given}; expected floating point {shape}, a row an id and a column a class.")
        p_BC = probabilities.detach().to("cpu", torch.float32)
        if not bool(((p_BC >= 0).all(dim=1) & ((p_BC.sum(dim=1) - 1).abs() <= TOLERANCE)).all()):
            raise MetaplError(
                "some of the probabilities are negative or not finite, or those of an example do not sum to 1; "
                "expected what softmax gives."
            )
        names: list[Any] = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
        in_order = names if self._last is None else [self._last, *names]
        if {type(name) for name in in_order} not in (set(), {str}, {int}):
            raise MetaplError(f"the ids are {described(ids)}; expected strings, or integers, over all calls.")
        if wrong := next(((one, other) for one, other in pairwise(in_order) if not one < other), None):
            fault = f"the id {few([wrong[1]])} comes after {few([wrong[0]])}"
            raise MetaplError(f"{fault}; expected each greater than the one before: sort the examples, each once.")
        kept_BK, columns = p_BC, {}
        if self.top_k is not None:
            classes_BK = most_probable(p_BC, self.top_k)
            kept_BK = p_BC.gather(1, classes_BK)
            columns["classes"] = _lists(classes_BK.to(torch.int32).numpy())
        columns |= {
            "label": pa.array(p_BC.numpy().argmax(axis=1).astype(np.int32)),
            "confidence": pa.array(p_BC.numpy().max(axis=1)),
            "entropy": pa.array(entropy(p_BC).numpy()),
            "copies": pa.array(np.ones(len(names), np.int32)),
            "probabilities": _lists(kept_BK.to(torch.float16).numpy()),
        }
        if digests is not None:
            columns["digest"] = pa.array([digest[:DIGEST_BYTES] for digest in digests], pa.binary(DIGEST_BYTES))
        numbers = bool(names) and isinstance(names[0], int)
        schema = layout.schema(numbers=numbers, sparse=self.top_k is not None, digests=digests is not None)
        try:
            columns["id"] = pa.array(names, schema.field("id").type)
        except UnicodeEncodeError as error:
            raise MetaplError(f"an id is not text ({error}); expected strings that UTF-8 can hold.") from error
        self.add_table(pa.table([columns[name] for name in schema.names], schema=schema))

    def add_table(self, table: pa.Table) -> None:
        """Add rows as a part has them, such as those of another store; their ids follow those that are there."""
        if self.complete:
            raise MetaplError(f"the store in {self.folder} is whole; expected nothing more to be added.")
        if not len(table):
            return
        if self._schema is not None and not self._schema.equals(table.schema):
            raise MetaplError(
                f"the store in {self.folder} has the columns {', '.join(self._schema.names)}; expected the same, of "
                "the same types, in all that is added: either all with digests or none."
            )
        table = table.replace_schema_metadata(None)
        self._schema, self._last = table.schema, table["id"][-1].as_py()
        self._waiting.append(table)
        waiting = sum(map(len, self._waiting))
        while waiting >= self.rows_per_part:
            self._flush(self.rows_per_part)
            waiting -= self.rows_per_part

    def _flush(self, rows: int) -> None:
        """Write a part of the first rows that wait."""
        import pyarrow as pa

        together = pa.concat_tables(self._waiting).combine_chunks()
        table = together.slice(0, rows).combine_chunks()
        content = layout.encoded(table)
        if not self._parts:
            self._describe(complete=False)
        sha256 = hashlib.sha256(content).hexdigest()
        name, ids = layout.part_name(len(self._parts), sha256), table["id"]
        self._write(name, content)
        self._parts.append(Part(name, rows, ids[0].as_py(), ids[-1].as_py(), content.size, sha256))
        self._describe(complete=False)
        self._waiting = [together.slice(rows)] if rows < len(together) else []

    def _describe(self, *, complete: bool) -> None:
        content = Description(
            complete=complete,
            classes=list(self.classes),
            top_k=self.top_k,
            rows_per_part=self.rows_per_part,
            provenance=self.provenance,
            numbers=isinstance(self._last, int),
            digests=self._schema is not None and "digest" in self._schema.names,
            rows=self.rows,
            parts=self._parts,
        )
        self._write(DESCRIPTION, layout.sealed(asdict(content)))

    def _write(self, name: str, content: Any) -> None:
        mend = "Mend that (is the disk full?), then go on with resume=True (--resume)."
        write_whole(self.folder / name, content, f"the {self.rows:,} rows that are there are whole. {mend}")


def most_probable(p_BC: Tensor, k: int) -> Tensor:
    """The k most probable classes of each example, the most probable first; of equals the first."""
    values, classes = p_BC.topk(min(k + 1, p_BC.shape[1]), dim=1)  # a sort of all takes several times as long
    chosen = classes[:, :k]
    if values.shape[1] > k:
        tied = values[:, k - 1] == values[:, k]
        if tied.any():  # which of them topk takes is open
            chosen[tied] = p_BC[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = chosen.sort(dim=1).values
    order = p_BC.gather(1, chosen).sort(dim=1, descending=True, stable=True).indices
    return chosen.gather(1, order)


def entropy(p_BC: Tensor) -> Tensor:
    """−Σ_c p_c ln p_c, with 0 ln 0 = 0; several times as fast as torch.special.entr."""
    return -(p_BC * p_BC.clamp(min=torch.finfo(p_BC.dtype).tiny).log()).sum(dim=1)


def _lists(values_BK: np.ndarray[Any, Any]) -> pa.ListArray:
    """The rows of a matrix as lists."""
    import pyarrow as pa

    rows, width = values_BK.shape
    ends = np.arange(0, (rows + 1) * width, width, dtype=np.int32)
    kind = pa.list_(pa.field("element", pa.from_numpy_dtype(values_BK.dtype), nullable=False))
    return pa.ListArray.from_arrays(ends, np.ascontiguousarray(values_BK).reshape(-1), type=kind)
