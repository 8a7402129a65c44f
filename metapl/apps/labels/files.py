"""How a store lies on disk.

A store is a folder:

store.json                         classes, encoding, provenance and, once it is whole, its parts; sealed by a checksum
part-00000-0123456789abcdef.parquet  rows of the store, with the beginning of the file's SHA-256 in its name

A part is a Parquet file of one row group, which any reader of Parquet understands. Its rows are in the order of their
ids, and so are the parts. It is written to memory, then to a temporary file, and gets its name when its bytes are on
disk: a part that has its name is whole, and a writer that was killed goes on behind the last of them.

The numbers of the distributions are neither compressed nor encoded, and those of a part lie in one page. So they stand
one after another at the end of their column, and are read from there in a memory map, without a decoder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.errors import MetaplError, few, require_extra
from metapl.runs.sealed import misfit, misfit_entries, open_plain, read_plain
from metapl.words import shown

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = 1
"""The layout of stores that this version writes and reads."""

DESCRIPTION = "store.json"

SPILL = ".spill-"
"""What the folder of DuckDB's files begins with, in that of a store that is selected."""

DIGEST_BYTES = 16
"""Of the SHA-256 of a picture's file: the chance that any two of a billion pictures share them is 1 in 10^21."""

PAGE_VALUES = 2**24
"""Numbers of a part's distributions: pages of Parquet end long before 2^31 bytes, and a part is held in memory."""

STORE = b"metapl.store"
"""In the metadata of a part: which store it is of, by the hash of :func:`identity`."""

FREE = ("begun", "made_with", "run", "pictures")
"""What a resumed writer's provenance may say otherwise: when, on which machine, where the run and the pictures are."""

PAGE_ROWS = 16_384
"""Rows of a part: from 20,000 on, pyarrow begins another page."""

_PART = re.compile(r"part-(\d{5,})-([0-9a-f]{16})\.parquet")
_TEMPORARY = re.compile(r"(store\.json|part-\d{5,}-[0-9a-f]{16}\.parquet)\.[0-9a-f]{8}\.tmp")

_ENTRIES: dict[str, Any] = {
    "format": int,
    "complete": bool,
    "classes": list[str],
    "top_k": int | None,
    "rows_per_part": int,
    "provenance": dict[str, Any],
    "numbers": bool,
    "digests": bool,
    "rows": int,
    "parts": list[dict[str, Any]],
}
"""What the description says, with types; those from ``numbers`` on are there once the store is whole."""

_WHOLE = ("numbers", "digests", "rows", "parts")


@dataclass(frozen=True)
class Part:
    """A file of a store, as the description has it.

    Args:
        file: its name.
        rows: how many it has.
        first, last: ids, strings or integers.
        bytes: its size.
        sha256: of its bytes, in hexadecimal.
    """

    file: str
    rows: int
    first: str | int
    last: str | int
    bytes: int
    sha256: str


require = partial(require_extra, "labels", "stored labels need")
"""Refuse to go on without packages of the extra."""


# ------------------------------------------------------------------------------------------------------ the description


def sealed(content: Mapping[str, Any]) -> bytes:
    """A description as the bytes of its file, with a checksum over all that it says."""
    plain = {name: value for name, value in content.items() if name != "seal"}
    seal = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**plain, "seal": seal}, indent=1, sort_keys=True) + "\n").encode()


def read_description(folder: Path) -> dict[str, Any]:
    """What the description of a store says.

    Raises:
        MetaplError: there is none, it is damaged, or it is of a later format.
    """
    file = folder / DESCRIPTION
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise MetaplError(f"{folder} {state}; expected the folder of a store, as metapl label writes it.")
    if not file.exists():
        raise MetaplError(f"{folder} is not a store of labels: there is no {DESCRIPTION} in it.")
    try:
        written = read_plain(file)
        content = json.loads(written)
    except RecursionError as error:
        raise MetaplError(f"{file} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise MetaplError(f"{file} cannot be read: {error}. {AGAIN}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise MetaplError(f"{file} is not of a store of labels: it does not say its format.")
    if content["format"] != FORMAT:
        raise MetaplError(
            f"{file} is of format {shown(content['format'])!s:.20}; this metapl reads format {FORMAT}: take the metapl "
            "that wrote it, or write the labels again."
        )
    needed = [name for name in _ENTRIES if content.get("complete") is True or name not in _WHOLE]
    fault = misfit_entries(content, _ENTRIES)
    fault = fault or next((f"it does not say {name}" for name in needed if name not in content), None)
    if fault is None and written != sealed(content):
        fault = "its checksum (seal) is of another content"
    fault = fault or _contradiction(content)
    if fault is not None:
        raise MetaplError(f"{file} is damaged: {fault}. {AGAIN}")
    return content


def _contradiction(content: Mapping[str, Any]) -> str | None:
    """What in a description, whose types are as they should be, cannot be."""
    classes, top_k, parts = content["classes"], content["top_k"], content.get("parts", [])
    if not classes or len({*classes}) < len(classes):
        return f"its classes are {few(classes, 10, 30)}; expected one or more names, each once"
    if top_k is not None and not 1 <= top_k <= len(classes):
        return f"its top_k is {top_k!s:.30}; expected 1 to {len(classes)}, the number of classes"
    fault = selected_fault(content["provenance"])
    if fault is not None or not content["complete"]:
        return fault
    if not parts:
        return "it has no parts"
    fault = misfit(parts, list[Part], "parts")
    if fault is not None:
        return fault
    if any({*part} != {*Part.__dataclass_fields__} for part in parts):
        return "it does not say all of a part"
    kind = int if content["numbers"] else str
    for number, part in enumerate(parts):
        if part["file"] != part_name(number, part["sha256"]) or not _PART.fullmatch(part["file"]):
            name = few([part["file"]], longest=60)
            return f"its part {number} is the file {name}; expected part-{number:05} and the beginning of its SHA-256"
        if not 1 <= part["rows"] <= PAGE_ROWS:
            return f"its part {number} has {part['rows']!s:.30} rows; expected 1 to {PAGE_ROWS:,}"
        if type(part["first"]) is not kind or type(part["last"]) is not kind:
            return f"the ids of its part {number} are not all of the type that numbers ({content['numbers']}) says"
    if content["rows"] != sum(part["rows"] for part in parts):
        return (
            f"it has {content['rows']!s:.30} rows; expected {sum(part['rows'] for part in parts):,}, those of its parts"
        )
    return None


@dataclass(frozen=True)
class _Overlap:
    pictures: int
    sha256: str


@dataclass(frozen=True)
class _Selected:
    """What a selection was asked for, as its provenance says it."""

    of_rows: int
    of_store_sha256: str
    threshold: float | None
    per_class: int | None
    any_class: bool
    balance: bool
    dropped_overlap_with: _Overlap | None


def selected_fault(provenance: Mapping[str, Any]) -> str | None:
    """What is wrong with the selections that a store says it was made by; None where nothing is."""
    selected = provenance.get("selected", [])
    fault = misfit(selected, list[_Selected], "provenance.selected")
    if fault is None and any({*_Selected.__dataclass_fields__} - {*asked} for asked in selected):
        fault = f"provenance.selected does not say all of {', '.join(_Selected.__dataclass_fields__)}"
    overlaps = [] if fault is not None else [asked["dropped_overlap_with"] for asked in selected]
    if any(overlap is not None and {*overlap} != {"pictures", "sha256"} for overlap in overlaps):
        fault = "provenance.selected does not say all of dropped_overlap_with"
    return fault


AGAIN = "Put the file back from a copy, or write the labels again to another folder (--out)."


# ----------------------------------------------------------------------------------------------------------- the parts


def schema(*, numbers: bool, sparse: bool, digests: bool) -> pa.Schema:
    """The columns of a part.

    Args:
        numbers: whether ids are integers; otherwise they are strings.
        sparse: whether only the most probable classes are kept.
        digests: whether it says which file an example was.
    """
    import pyarrow as pa

    def plain(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    def several(name: str, kind: pa.DataType) -> pa.Field:
        return plain(name, pa.list_(plain("element", kind)))

    columns = [
        plain("id", pa.int64() if numbers else pa.string()),
        plain("label", pa.int32()),
        plain("confidence", pa.float32()),
        plain("entropy", pa.float32()),
        plain("copies", pa.int32()),
    ]
    if digests:
        columns.append(plain("digest", pa.binary(DIGEST_BYTES)))
    columns.append(several("probabilities", pa.float16()))
    if sparse:
        columns.append(several("classes", pa.int32()))
    return pa.schema(columns)


def encoded(table: pa.Table) -> pa.Buffer:
    """The bytes of a part: the same rows as the same bytes, with the same pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [field.name for field in table.schema]
    mapped = {"id"} if pa.types.is_integer(table.schema.field("id").type) else set()
    codecs = {
        **{name: "none" if name in mapped else "zstd" for name in names},
        **{f"{name}.list.element": "none" for name in ("probabilities", "classes")},
    }
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression=codecs, use_dictionary=["copies"], data_page_size=2**30, write_batch_size=2**25
    ) as writer:
        writer.write_table(table, row_group_size=len(table))
    buffer = sink.getvalue()
    for name in (*mapped, "probabilities", *(["classes"] if "classes" in names else [])):
        values = table[name].combine_chunks()
        flat = (values if name == "id" else values.flatten()).to_numpy(zero_copy_only=False).reshape(-1)
        if not np.array_equal(mapped_columns(buffer, {name: flat.dtype})[name], flat):
            raise MetaplError(
                f"this pyarrow, {pa.__version__}, lays out the column {name} of a Parquet file in another way than "
                "stores are read; expected a version that pip install 'metapl[labels]' takes (21 to 26 were tried)."
            )
    return buffer


def mapped_columns(buffer: pa.Buffer, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The values of uncompressed columns of a part, as they lie there; nothing is copied.

    Args:
        buffer: the whole file, in memory or mapped.
        dtypes: of a value, by the names of the columns; of lists, all their values in a row are given.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    group = pq.read_metadata(pa.BufferReader(buffer)).row_group(0)
    chunks = {(chunk := group.column(i)).path_in_schema.partition(".")[0]: chunk for i in range(group.num_columns)}
    columns = {}
    for name, dtype in dtypes.items():
        end = int(chunks[name].data_page_offset) + int(chunks[name].total_compressed_size)
        count = int(chunks[name].num_values)
        columns[name] = np.frombuffer(buffer, dtype, count, end - count * dtype.itemsize)
    return columns


def read_rows(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part; of the columns of these names, None for all."""
    import pyarrow.parquet as pq

    # Not by its path, in which pyarrow would look for names of columns (a folder a=1).
    with open_plain(path) as file, pq.ParquetFile(file) as parquet:
        # In one thread: a part is small, and where others use the cores, threads mostly wait for each other.
        return parquet.read(None if columns is None else list(columns), use_threads=False)


def read_digests(tables: Iterable[pa.Table]) -> Iterator[tuple[Any, bytes]]:
    """Each id with the digest of its file, of tables with these columns."""
    for table in tables:
        yield from zip(table["id"].to_pylist(), table["digest"].to_pylist(), strict=True)


def part_name(number: int, sha256: str) -> str:
    return f"part-{number:05}-{sha256[:16]}.parquet"


def identity(classes: Sequence[str], top_k: int | None, rows_per_part: int, provenance: Mapping[str, Any]) -> bytes:
    """A hash of what a store is of; writers that may go on with each other's store have the same one."""
    plain = {name: value for name, value in provenance.items() if name not in FREE}
    whole = json.dumps([list(classes), top_k, rows_per_part, plain], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest().encode()


def part_fault(
    metadata: pq.FileMetaData, *, numbers: bool, digests: bool, top_k: int | None, classes: int
) -> str | None:
    """What is wrong with a part's columns, by what Parquet says of them; None where they are as they are written.

    Args:
        metadata: of the file.
        numbers: whether ids are integers.
        digests: whether it says which file an example was.
        top_k: how many probabilities of an example are kept; None for all.
        classes: how many there are.
    """
    expected = schema(numbers=numbers, sparse=top_k is not None, digests=digests)
    found = metadata.schema.to_arrow_schema()
    if not found.equals(expected):
        differing = [field for field in expected if field.name not in found.names or found.field(field.name) != field]
        what = f"{differing[0].name} as {differing[0].type}" if differing else f"only {', '.join(expected.names)}"
        return f"its columns are {few(found.names, 10, 30)}; expected {what}"
    if metadata.num_row_groups != 1 or not metadata.num_rows:
        return (
            f"it has {metadata.num_rows:,} rows in {metadata.num_row_groups} groups; expected one or more in one group"
        )
    group, width = metadata.row_group(0), top_k or classes
    for chunk in map(group.column, range(group.num_columns)):
        name = chunk.path_in_schema.partition(".")[0]
        is_list = name in ("probabilities", "classes")
        if is_list and chunk.num_values != metadata.num_rows * width:
            return f"it has {chunk.num_values:,} {name} in {metadata.num_rows:,} rows; expected {width:,} in each"
        if (is_list or (name == "id" and numbers)) and (
            chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page
        ):
            return f"its column {name} is compressed or encoded; expected plain numbers"
        known = chunk.statistics
        has_range = known is not None and known.has_min_max
        if has_range and name == "copies" and known.min < 1:
            return f"its column copies has {known.min}; expected 1 or more"
        if has_range and name in ("label", "classes") and not 0 <= known.min <= known.max < classes:
            return f"its column {name} has {known.min} to {known.max}; expected numbers of {classes:,} classes"
    return None


def parts_there(folder: Path) -> list[tuple[str, str]]:
    """The parts in a folder that is being written to, in their order: the name, and the beginning of its SHA-256.

    Raises:
        MetaplError: one is missing, or there are two of a number.
    """
    parts = sorted(
        (int(match[1]), match[0], match[2]) for name in os.listdir(folder) if (match := _PART.fullmatch(name))
    )
    for expected, (number, name, _) in enumerate(parts):
        if number != expected:
            raise MetaplError(
                f"{folder} has {shown(name)}, and not the part {expected} before it; expected the parts as they were "
                "written, one of each number. Remove those from there on, then go on with resume=True (--resume)."
            )
    return [(name, sha256) for _, name, sha256 in parts]


def store_around(path: Path) -> Path | None:
    """The store in whose folder a file or a folder would lie, at any depth; None where there is none."""
    for folder in path.resolve().parents:
        if (folder / DESCRIPTION).is_file() and any(map(_PART.fullmatch, os.listdir(folder))):
            return folder
    return None


def is_own(name: str) -> bool:
    """Whether a file is one of a store that is not whole yet, or what its killed writer left."""
    return name == DESCRIPTION or name.startswith(".") or bool(_PART.fullmatch(name) or _TEMPORARY.fullmatch(name))


def remove_temporary(folder: Path) -> None:
    """Remove what a killed writer left; for whoever owns the folder."""
    for name in os.listdir(folder):
        if _TEMPORARY.fullmatch(name):
            (folder / name).unlink()
        elif name.startswith(SPILL):
            shutil.rmtree(folder / name)
