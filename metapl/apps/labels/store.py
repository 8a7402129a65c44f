"""Reading a store, in any order."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from metapl.apps.labels import files as layout
from metapl.apps.labels.files import Description, Part
from metapl.apps.machine.sealed import open_plain, sha256_of
from metapl.errors import MetaplError, few
from metapl.execution.checks import described

if TYPE_CHECKING:
    import pyarrow as pa

MAPPED_PARTS = 16_384  # parts that are mapped; Linux gives a process 65,530 maps
KNOWN_PARTS = 64  # parts whose names are held in memory

Values = np.ndarray[Any, Any]


class LabelStore:
    """Class distributions of many examples by their ids, in a folder that a :class:`LabelWriter` has sealed.

    Of an example, K float16 numbers s_1, …, s_K are stored, of its K most probable classes; K = C where all are kept.
    What is read is the distribution

        q_c ∝ s_c for a stored class c, and q_c ∝ max(0, 1 − Σ_j s_j) / (C − K) for every other class,

    divided by its sum, in float32: the remainder is spread evenly. Of probabilities above 6·10⁻⁵ float16 keeps 11 bits:
    they are off by two parts in 2,048 at most, one of their own and one of the sum that is divided by.

    Args:
        folder: of the store. Worker processes may be given a copy, which reads for itself.

    Cost: some 200 bytes a part. A part is checked whole by its SHA-256 when something of it is first read (about 1 ms a
    MB); then its numbers are read from a memory map: 2 K bytes a row (6 K with classes), in any order. To find rows by
    their ids, a part's ids are decoded (about 1 ms for 10,000) and kept for the 64 parts used last: of examples that
    are read again and again, ask for the rows once, by :meth:`rows`, and read by :meth:`at`.

    Raises:
        MetaplError: there is no store, or it is not whole, damaged or of a later format; later, when it is read: a part
            is damaged, or there is no example of an id. The file is named.

    >>> import tempfile
    >>> from metapl.apps.labels import LabelWriter
    >>> folder = Path(tempfile.mkdtemp()) / "store"
    >>> with LabelWriter(folder, ["ant", "bee", "cat"], top_k=1) as writer:
    ...     writer.add([7, 9], torch.tensor([[0.5, 0.375, 0.125], [0.0, 0.0, 1.0]]))
    >>> store = LabelStore(folder)
    >>> store[[9, 7]]
    tensor([[0.0000, 0.0000, 1.0000],
            [0.5000, 0.2500, 0.2500]])
    >>> store.rows([9]), list(store), len(store)
    (array([1]), [7, 9], 2)
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        layout.require("pyarrow")
        content = layout.read_description(Path(folder))
        if not content.complete:
            raise MetaplError(
                f"the store in {folder} is not whole: its writer was stopped. Go on with the command that began it, "
                "and resume=True (--resume)."
            )
        self._open(Path(folder), content)

    @classmethod
    def begun(cls, folder: Path, content: Description) -> LabelStore:
        """What there is of a store, whole or not, by its description."""
        store = cls.__new__(cls)
        store._open(folder, content)
        return store

    def _open(self, folder: Path, content: Description) -> None:
        self.folder, self.classes, self.top_k = folder, tuple(content.classes), content.top_k
        self.provenance: Mapping[str, Any] = content.provenance
        self.parts, self.has_digests, self._numbers = tuple(content.parts), content.digests, content.numbers
        self._starts = np.cumsum([0, *(part.rows for part in self.parts)])
        self._firsts = [part.first for part in self.parts]
        self._kinds: tuple[type, ...] = (int, np.integer) if content.numbers else (str,)  # what an id may be
        self._sound: set[int] = set()
        for part in self.parts:
            self._check_size(part)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_sound": set()}  # what was found sound stays with the process

    @property
    def sha256(self) -> str:
        """SHA-256 of the labels, from the checksums of the parts; when they were written is left out."""
        return hashlib.sha256("".join(part.sha256 for part in self.parts).encode()).hexdigest()

    @property
    def schema(self) -> pa.Schema:
        """The columns of its parts."""
        return layout.schema(numbers=self._numbers, sparse=self.top_k is not None, digests=self.has_digests)

    def __len__(self) -> int:
        """Number of rows, each of another example."""
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str | int]:
        """The ids, in the order of the rows, a part at a time."""
        for number in range(len(self.parts)):
            yield from self.table(number, ["id"]).column(0).to_pylist()

    def __contains__(self, example: object) -> bool:
        return isinstance(example, self._kinds) and bool(self._find([example])[0] >= 0)

    def __getitem__(self, ids: str | int | Sequence[str] | Sequence[int] | Values | Tensor) -> Tensor:
        """The distributions of examples by B ids in any order, float32 (B, C) on the CPU, each row summing to 1; (C,)
        of one id. A MetaplError where there is no such example."""
        if isinstance(ids, str | int | np.integer):
            return self.at(self.rows([cast(Any, ids)]))[0]
        return self.at(self.rows(ids))

    def rows(self, ids: Sequence[str] | Sequence[int] | Values | Tensor) -> Values:
        """The rows of examples, int64 (B,). A MetaplError where there is no such example."""
        wanted = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
        if not all(isinstance(name, self._kinds) for name in wanted):
            raise MetaplError(f"the ids are {described(ids)}; expected {'integers' if self._numbers else 'strings'}.")
        rows = self._find(wanted)
        if missing := [name for name, row in zip(wanted, rows.tolist(), strict=True) if row < 0]:
            raise MetaplError(f"{self.folder} has no labels of {few(missing)}; expected examples that it was made of.")
        return rows

    def _find(self, ids: Sequence[Any]) -> Values:
        """The rows of examples; −1 where there is none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.full(len(ids), -1, dtype=np.int64)
        parts = np.array([bisect.bisect_right(self._firsts, name) - 1 for name in ids], dtype=np.int64)
        for number, where in _by_part(parts):
            if number >= 0:  # before the first part there is nothing
                names = _names(self._checked(number))
                given = [ids[i] if _is_storable(ids[i]) else None for i in where.tolist()]
                places = pc.fill_null(pc.index_in(pa.array(given, names.type), value_set=names), -1)
                within = np.asarray(places.to_numpy(zero_copy_only=False), dtype=np.int64)
                rows[where] = np.where(within >= 0, within + self._starts[number], -1)
        return rows

    def at(self, rows: Sequence[int] | Values | Tensor) -> Tensor:
        """The distributions of B rows of 0, …, len − 1 in any order, float32 (B, C) on the CPU, each summing to 1; read
        from memory maps. A MetaplError where there is no such row, or a part is damaged."""
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if outside := wanted[(wanted < 0) | (wanted >= len(self))].tolist():
            raise MetaplError(f"{self.folder} has no row {few(outside)}; expected 0 to {len(self) - 1:,}.")
        width, lists = self.top_k or len(self.classes), [*layout.MAPPED][: 1 if self.top_k is None else 2]
        stored = {name: np.empty((len(wanted), width), layout.MAPPED[name]) for name in lists}
        for number, where in _by_part(np.searchsorted(self._starts, wanted, side="right") - 1):
            columns, places = _columns(self._checked(number)), wanted[where] - self._starts[number]
            for name, values in stored.items():
                values[where] = columns[name].reshape(-1, width)[places]
        return spread(stored["probabilities"], stored.get("classes"), len(self.classes))

    def rows_with_copies(self) -> Values:
        """The rows, int64, each as often as it counts: what to draw from where classes were balanced by duplication."""
        return np.repeat(np.arange(len(self)), self.column("copies"))

    def column(self, name: str) -> Values:
        """The numbers of all rows in a column: their label, confidence, entropy or copies."""
        return np.concatenate([self.table(number, [name])[name].to_numpy() for number in range(len(self.parts))])

    def verify(self) -> None:
        """Check the bytes of all parts, whether or not they were read; a MetaplError names one that is damaged."""
        self._sound.clear()
        for number in range(len(self.parts)):
            self._checked(number)

    def table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a part by its number, as pyarrow reads them: all columns, or those of these names."""
        return layout.read_rows(self._checked(number), columns)

    def digests(self) -> Iterator[tuple[Any, bytes]]:
        """The ids, each with the first 16 bytes of the SHA-256 of its file; none where the store does not have them."""
        for number in range(len(self.parts) if self.has_digests else 0):
            table = self.table(number, ["id", "digest"])
            yield from zip(table["id"].to_pylist(), table["digest"].to_pylist(), strict=True)

    def _check_size(self, part: Part) -> None:
        path = self.folder / part.file
        try:
            with open_plain(path) as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise MetaplError(f"{path} cannot be read: {error.strerror}. {layout.AGAIN}") from error
        if size != part.bytes:
            state = f"{'truncated' if size < part.bytes else 'damaged'}: it has {size:,} bytes"
            raise MetaplError(f"{path} is {state}, and {part.bytes:,} were written. {layout.AGAIN}")

    def _checked(self, number: int) -> Path:
        """The file of a part, which is refused where it is not as it was written; asked once."""
        part, path = self.parts[number], self.folder / self.parts[number].file
        if number not in self._sound:
            self._check_size(part)
            with open_plain(path) as file:
                if sha256_of(file) != part.sha256:
                    noted = f"its SHA-256 is not the one in {layout.DESCRIPTION}"
                    raise MetaplError(f"{path} is damaged: {noted}. {layout.AGAIN}")
            self._sound.add(number)
        return path


@lru_cache(MAPPED_PARTS)
def _columns(path: Path) -> dict[str, Values]:
    """The columns of a part that are read without a decoder."""
    import pyarrow as pa

    # Unlike mmap.mmap, pyarrow's map does not need its file to stay open: a process may have few of these.
    with pa.memory_map(os.fsencode(path)) as file:
        return layout.mapped_columns(file.read_buffer())


@lru_cache(KNOWN_PARTS)
def _names(path: Path) -> pa.Array:
    return layout.read_rows(path, ["id"]).column(0).combine_chunks()


def _by_part(parts: Values) -> Iterator[tuple[int, Values]]:
    """Each part that occurs, and where."""
    order = np.argsort(parts, kind="stable")
    for where in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1):
        if len(where):
            yield int(parts[where[0]]), where


def is_text(name: str) -> bool:
    """Whether UTF-8 can hold it; nothing else is stored."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_storable(name: str | int) -> bool:
    return is_text(name) if isinstance(name, str) else -(2**63) <= name < 2**63


def spread(stored_BK: Values, classes_BK: Values | None, classes: int) -> Tensor:
    """Distributions, float32 (B, C), of the stored probabilities of some classes, or of all C in their order (None);
    see :class:`LabelStore`. By numpy, in one thread: torch's would wait for each other at every small batch."""
    s_BK = stored_BK.astype(np.float32)
    sum_B1 = s_BK.sum(axis=1, keepdims=True)
    # NaN is not above 0 either.
    if not (s_BK.min(initial=0) >= 0 and sum_B1.min(initial=1) > 0 and sum_B1.max(initial=1) < np.inf):
        raise MetaplError(
            "stored probabilities are negative, infinite, NaN or all 0; expected distributions: write the labels again."
        )
    if classes_BK is None:
        return torch.from_numpy(s_BK / sum_B1)
    remainder_B1 = np.maximum(0, 1 - sum_B1) if s_BK.shape[1] < classes else np.zeros_like(sum_B1)
    whole_B1 = sum_B1 + remainder_B1
    q_BC = np.empty((len(s_BK), classes), np.float32)
    q_BC[:] = remainder_B1 / whole_B1 / max(classes - s_BK.shape[1], 1)
    np.put_along_axis(q_BC, classes_BK, s_BK / whole_B1, axis=1)
    return torch.from_numpy(q_BC)
