"""Tar files of pictures, as WebDataset has them: what is in them, and any picture without the others.

A picture in one has the path ``many/000000.tar/cats/1.png``, so it is listed, checked, cached and labeled like a
file, and drawn like one: the batches are a function of the seed and the step, on any number of processes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metapl.apps.machine import open_plain
from metapl.errors import MetaplError, reason_of
from metapl.words import shown

SUFFIX = ".tar"


def members(path: str | Path) -> Iterator[tuple[str, int, int]]:
    """The plain files of a tar file, from its headers alone (20 µs a member): the name without a leading ``./`` or
    ``/``, where its bytes begin, and how many they are. A MetaplError where it is no tar file, compressed, or cut."""
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isreg():
                    yield posixpath.normpath(entry.name).lstrip("/"), entry.offset_data, entry.size
            # tarfile takes a header that is cut, or missing, for the end, which is two blocks of zeros.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            if file.read().strip(b"\0") or size < 2 * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise MetaplError(
            f"{shown(path)} cannot be read as a tar file: {reason_of(error)}; expected a whole, uncompressed one."
        ) from error


def open_picture(path: str | os.PathLike[str]) -> io.BufferedReader | io.BytesIO:
    """Open a file, or a member of a tar file, for reading its bytes; an OSError where there is none."""
    tar = _split(path)
    if tar is None:
        return open_plain(path)
    start, size = _found(*tar)
    with open_plain(tar[0]) as file:
        file.seek(start)
        return io.BytesIO(file.read(size))


def size_of(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a plain file, or of a member of a tar file; an OSError where there is none."""
    if (tar := _split(path)) is not None:
        return _found(*tar)[1]
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    return status.st_size


def _split(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The tar file and the name in it of a path that leads into one."""
    text, at = os.fspath(path), -1
    while (at := text.find(f"{SUFFIX}/", at + 1)) >= 0:
        end = at + len(SUFFIX)
        if os.path.isfile(text[:end]):
            return text[:end], text[end + 1 :]
    return None


def _found(tar: str, name: str) -> tuple[int, int]:
    """Where a member of a tar file starts, and its size."""
    status, wanted = os.stat(tar), _hash(name)
    hashes, starts, sizes = _index(tar, status.st_size, status.st_mtime_ns)
    row = int(np.searchsorted(hashes, wanted))
    if row == len(hashes) or hashes[row] != wanted:
        raise FileNotFoundError(errno.ENOENT, "No such file in the tar file")
    return int(starts[row]), int(sizes[row])


@cache
def _index(tar: str, size: int, changed: int) -> NDArray[np.int64]:
    """The members of a tar file of this size and time of change, read once in a process: hashes of the names in rising
    order, starts and sizes. These are 24 bytes a member, in arrays that forked worker processes share."""
    try:
        found = sorted((_hash(name), start, length) for name, start, length in members(tar))
    except MetaplError as error:
        raise OSError(errno.EIO, str(error)) from error
    index = np.array(found, dtype=np.int64).reshape(-1, 3).T.copy()
    if not np.diff(index[0]).all():
        raise OSError(errno.EIO, f"{tar} has a name twice")
    return index


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
