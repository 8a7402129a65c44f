"""Tar files of pictures, as WebDataset has them: what is in them, and any picture without the others.

A picture of a shard has the path ``shards/000000.tar/cats/1.png``, so it is listed, checked, cached and labeled like a
file, and drawn like one: the batches are a function of the seed and the step, on any number of processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metapl.errors import MetaplError, few, reason_of
from metapl.runs.sealed import open_plain, read_plain
from metapl.words import shown

SUFFIX = ".tar"
MANIFEST = "shards.json"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """Where the members of a tar file lie.

    Args:
        names: the first eight bytes of a hash of each name, in rising order. With the places these are 24 bytes a
            member, in arrays that forked worker processes share.
        starts, sizes: of the bytes of each, in this order.
    """

    names: NDArray[np.uint64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def find(self, name: str) -> tuple[int, int]:
        """Where a member starts, and its size.

        Raises:
            FileNotFoundError: there is no such member.
        """
        wanted = _hash(name)
        row = int(np.searchsorted(self.names, wanted))
        if row == len(self.names) or self.names[row] != wanted:
            raise FileNotFoundError(2, "No such file in the tar file")
        return int(self.starts[row]), int(self.sizes[row])


class Member(NamedTuple):
    """A file in a tar file: its name without a leading ``./`` or ``/``, and where its bytes are."""

    name: str
    start: int
    size: int


def members(path: str | Path) -> Iterator[Member]:
    """The plain files of a tar file, from its headers alone.

    Cost: about 20 µs a member.

    Raises:
        MetaplError: it is no tar file, compressed, or cut.
    """
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isreg():
                    yield Member(posixpath.normpath(entry.name).lstrip("/"), entry.offset_data, entry.size)
            # tarfile takes a header that is cut, or missing, for the end, which is two blocks of zeros.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            if file.read().strip(b"\0") or size < 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError) as error:
        raise MetaplError(
            f"{shown(path)} cannot be read as a tar file: {reason_of(error)}; expected a whole, "
            "uncompressed one, such as `metapl shards` writes."
        ) from error
    except OSError as error:
        raise MetaplError(f"{shown(path)} cannot be read: {error.strerror}.") from error


def open_picture(path: str | os.PathLike[str]) -> io.BufferedReader | io.BytesIO:
    """Open a file, or a member of a tar file, for reading its bytes.

    Raises:
        OSError: as :func:`~metapl.runs.sealed.open_plain`; there is no such member.
    """
    parts = _split(path)
    if parts is None:
        return open_plain(path)
    tar, name = parts
    start, size = _shard(tar, *_version(tar)).find(name)
    with open_plain(tar) as file:
        file.seek(start)
        return io.BytesIO(file.read(size))


def status_of(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """The mode, the size and the time of change of a file, or of a member of a tar file, which has the time of that.

    Raises:
        OSError: there is no such file or member.
    """
    parts = _split(path)
    if parts is None:
        status = os.stat(path)
        return status.st_mode, status.st_size, status.st_mtime_ns
    status = os.stat(parts[0])
    return status.st_mode, _shard(parts[0], *_version(parts[0])).find(parts[1])[1], status.st_mtime_ns


def size_of(path: str | os.PathLike[str]) -> int:
    """The size of a file, or of a member of a tar file, in bytes; raises as :func:`status_of`."""
    return status_of(path)[1]


@dataclass(frozen=True)
class Manifest:
    """What ``metapl shards`` notes of the shards that it has written, in ``shards.json`` beside them.

    Args:
        listing: SHA-256 of the names and sizes of all pictures.
        pictures: of the folder.
        per_shard: pictures of a shard, but for the last.
        shards: what is written: the file, its pictures, its bytes and their SHA-256.
    """

    listing: str
    pictures: int
    per_shard: int
    shards: tuple[ShardFile, ...] = ()

    @property
    def total(self) -> int:
        """The number of shards when all are written."""
        return -(-self.pictures // self.per_shard)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, if it has one.

        Raises:
            MetaplError: it cannot be read.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            content = json.loads(read_plain(path))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            shards = tuple(ShardFile(**shard) for shard in content.pop("shards"))
            return cls(**content, shards=shards)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise MetaplError(
                f"{shown(path)} cannot be read ({reason_of(error)}); expected what `metapl shards` wrote: "
                "write the shards again, or remove this file and the tar files are taken as they are."
            ) from error

    def check_files(self, folder: Path, *, whole: bool) -> None:
        """Refuse shards that are missing or of another size, and, where ``whole``, fewer than there are to be."""
        if whole and len(self.shards) < self.total:
            raise MetaplError(
                f"{shown(folder)} has {len(self.shards)} of {self.total} shards, as their writing was stopped; give "
                "the command that wrote them once more, and it goes on."
            )
        wrong = [shard.file for shard in self.shards if _size_or_none(folder / shard.file) != shard.bytes]
        if wrong:
            raise MetaplError(
                f"{shown(folder)}: {few(wrong)} {'is' if len(wrong) == 1 else 'are'} not as written (missing, or of "
                f"another size than in {MANIFEST}); copy the folder again, or write the shards again."
            )


@dataclass(frozen=True)
class ShardFile:
    """A shard in a manifest: its name, its pictures, its bytes and their SHA-256."""

    file: str
    pictures: int
    bytes: int
    sha256: str


def _size_or_none(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _split(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The tar file and the name in it of a path that leads into one."""
    text = os.fspath(path)
    at = text.find(f"{SUFFIX}/")
    while at >= 0:
        tar = text[: at + len(SUFFIX)]
        if os.path.isfile(tar):
            return tar, text[at + len(SUFFIX) + 1 :]
        at = text.find(f"{SUFFIX}/", at + 1)
    return None


def _version(tar: str) -> tuple[int, int]:
    status = os.stat(tar)
    return status.st_size, status.st_mtime_ns


@cache
def _shard(tar: str, size: int, changed: int) -> Shard:
    """A tar file of this size and time of change; read once in a process."""
    try:
        found = list(members(tar))
    except MetaplError as error:
        raise OSError(5, str(error)) from error
    names = np.array([_hash(member.name) for member in found], dtype=np.uint64)
    order = np.argsort(names, kind="stable")
    names = names[order]
    twice = np.flatnonzero(names[1:] == names[:-1])
    if len(twice):
        raise OSError(5, f"{tar} has {found[order[twice[0]]].name} twice")
    starts = np.array([member.start for member in found], dtype=np.int64)[order]
    return Shard(names, starts, np.array([member.size for member in found], dtype=np.int64)[order])


def _hash(name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
