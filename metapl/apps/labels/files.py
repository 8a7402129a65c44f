"""How a store lies on disk.

A store is a folder:

store.json                         classes, encoding, provenance and the parts; sealed by a checksum
part-00000-0123456789abcdef.parquet  rows of the store, with the beginning of the file's SHA-256 in its name

A part is a Parquet file of one row group. Its rows are in the order of their ids, and so are the parts. It gets its
name when its bytes are on disk; then the description, which names it, is replaced. So a writer that was killed goes on
behind the last part that the description names, and a part that it does not name yet is written again.

The numbers of the distributions are neither compressed nor encoded, and those of a part lie in one page. So they stand
one after another at the end of their column, and are read from there in a memory map, without a decoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.apps.errors import require_extra
from metapl.apps.machine.sealed import is_temporary, open_plain, read_json
from metapl.errors import MetaplError, few
from metapl.words import shown

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, DESCRIPTION = 1, "store.json"

# Of the SHA-256 of a picture's file: the chance that any two of a billion pictures share them is 1 in 10^21.
DIGEST_BYTES = 16

PAGE_VALUES = 2**24  # numbers of a part's distributions: pages of Parquet end long before 2^31 bytes
PAGE_ROWS = 16_384  # rows of a part: from 20,000 on, pyarrow begins another page

AGAIN = "Put the file back from a copy, or write the labels again to another folder (--out)."

_PART = re.compile(r"part-\d{5,}-[0-9a-f]{16}\.parquet")

require = partial(require_extra, "labels", "stored labels need")
"""Refuse to go on without packages of the extra."""


@dataclass(frozen=True)
class Part:
    """A file of a store, as the description has it, with its first and last id, its bytes and their SHA-256."""

    file: str
    rows: int
    first: str | int
    last: str | int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``store.json`` says."""

    format: int = FORMAT
    complete: bool
    classes: list[str]
    top_k: int | None
    rows_per_part: int
    provenance: dict[str, Any]
    numbers: bool
    digests: bool
    rows: int
    parts: list[Part]


def sealed(content: Mapping[str, Any]) -> bytes:
    """A description as the bytes of its file, with a checksum over all that it says."""
    return (json.dumps({**content, "seal": _seal(content)}, indent=1, sort_keys=True) + "\n").encode()


def _seal(content: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_description(folder: Path) -> Description:
    """What the description of a store says; a MetaplError where it is missing, damaged or of another format."""
    file = folder / DESCRIPTION
    if not file.exists():
        state = "is a file" if folder.exists() else "does not exist"
        state = f"is not a store of labels: there is no {DESCRIPTION} in it" if folder.is_dir() else state
        raise MetaplError(f"{folder} {state}; expected the folder of a store, as metapl label writes it.")
    content = read_json(file, needed=["format"], mend=AGAIN)
    if content["format"] != FORMAT:
        raise MetaplError(
            f"{file} is of format {shown(content['format'])!s:.20}; this metapl reads format {FORMAT}: take the "
            "metapl that wrote it, or write the labels again."
        )
    if content.get("seal") != _seal(content):
        raise MetaplError(f"{file} is damaged: its checksum (seal) is of another content. {AGAIN}")
    names = [*Description.__dataclass_fields__]
    if missing := [name for name in names if name not in content]:
        raise MetaplError(f"{file} does not say {few(missing)}: an earlier metapl began it. {AGAIN}")
    parts = [Part(**part) for part in content["parts"]]
    return Description(**{name: content[name] for name in names} | {"parts": parts})


def classes_fault(classes: Sequence[str], top_k: int | None) -> str | None:
    """What is wrong with the classes of a store, and with how many of them are kept of an example."""
    if not classes or len({*classes}) < len(classes):
        return f"the classes are {few(classes, 10, 30)}; expected one or more names, each once"
    if top_k is not None and not 1 <= top_k <= len(classes):
        return f"top_k is {top_k!s:.30}; expected 1 to {len(classes)}, the number of classes, or None for all"
    return None


# ----------------------------------------------------------------------------------------------------------- the parts

# The columns of lists, whose numbers are read without a decoder.
MAPPED: dict[str, np.dtype[Any]] = {"probabilities": np.dtype(np.float16), "classes": np.dtype(np.int32)}


def schema(*, numbers: bool, sparse: bool, digests: bool) -> pa.Schema:
    """The columns of a part, with ids that are numbers or strings, the most probable classes alone where they are
    sparse, and which file an example was where there are digests."""
    import pyarrow as pa

    def several(kind: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", kind, nullable=False))

    columns = {
        "id": pa.int64() if numbers else pa.string(),
        "label": pa.int32(),
        "confidence": pa.float32(),
        "entropy": pa.float32(),
        "copies": pa.int32(),
        **({"digest": pa.binary(DIGEST_BYTES)} if digests else {}),
        "probabilities": several(pa.float16()),
        **({"classes": several(pa.int32())} if sparse else {}),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def encoded(table: pa.Table) -> pa.Buffer:
    """The bytes of a part: the same rows as the same bytes, with the same pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = table.schema.names
    codecs = dict.fromkeys(names, "zstd") | {f"{name}.list.element": "none" for name in names if name in MAPPED}
    sink = pa.BufferOutputStream()
    how: dict[str, Any] = {"use_dictionary": ["copies"], "data_page_size": 2**30, "write_batch_size": 2**25}
    with pq.ParquetWriter(sink, table.schema, compression=codecs, **how) as writer:
        writer.write_table(table, row_group_size=len(table))
    buffer = sink.getvalue()
    for name, found in mapped_columns(buffer).items():
        if not np.array_equal(found, table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)):
            raise MetaplError(
                f"this pyarrow, {pa.__version__}, lays out the column {name} of a Parquet file in another way than "
                "stores are read; expected a version that pip install 'metapl[labels]' takes (21 to 26 were tried)."
            )
    return buffer


def mapped_columns(buffer: pa.Buffer) -> dict[str, np.ndarray[Any, Any]]:
    """All values of the uncompressed columns of a part, by name, as they lie in the whole file, in memory or mapped;
    nothing is copied."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    group, columns = pq.read_metadata(pa.BufferReader(buffer)).row_group(0), {}
    for chunk in map(group.column, range(group.num_columns)):
        name = chunk.path_in_schema.partition(".")[0]
        if name in MAPPED:
            end, size = int(chunk.data_page_offset) + int(chunk.total_compressed_size), MAPPED[name].itemsize
            columns[name] = np.frombuffer(buffer, MAPPED[name], chunk.num_values, end - chunk.num_values * size)
    return columns


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part; of the columns of these names, None for all."""
    import pyarrow.parquet as pq

    # Not by its path, in which pyarrow would look for names of columns (a folder a=1).
    # In one thread: a part is small, where others use the cores, threads mostly wait for each other, and one that still
    # holds the file when Python ends aborts the process.
    with open_plain(path) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        return parquet.read(None if columns is None else list(columns), use_threads=False)


def part_name(number: int, sha256: str) -> str:
    return f"part-{number:05}-{sha256[:16]}.parquet"


def store_around(path: Path) -> Path | None:
    """The store in whose folder a file or a folder would lie, at any depth; None where there is none."""
    above = path.resolve().parents
    return next((folder for folder in above if (folder / DESCRIPTION).is_file() and parts(folder)), None)


def parts(folder: Path) -> list[str]:
    """The files in a folder that are called as parts are."""
    return sorted(filter(_PART.fullmatch, os.listdir(folder)))


def is_own(name: str) -> bool:
    """Whether a file is one of a store that is not whole yet, or what its killed writer left."""
    return name == DESCRIPTION or name.startswith(".") or bool(_PART.fullmatch(name)) or is_temporary(name)
