"""Files that are either the old one or the whole new one, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metapl.errors import MetaplError
from metapl.runs.sealed import refuse_irregular

_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes the name `path` only when the block ends well and its bytes are on disk.

    It is in the same folder, with a random ending `.tmp`: a rename works only within one file system. When the block or
    the disk fails, it is removed and `path` is as it was. Of a link, the file that it leads to is replaced.

    Raises: ``OSError`` where the disk refuses, or there is a folder, a device, a pipe or a socket of that name.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "note.txt") as file:
    ...     _ = file.write(b"whole")
    >>> [found.name for found in folder.iterdir()]
    ['note.txt']
    """
    path = Path(os.path.realpath(path))
    refuse_irregular(path)
    # Not tempfile.mkstemp: it makes files that only the owner can read, and colleagues share result folders.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    file = open(temporary, "xb")  # noqa: SIM115 - it must be closed before the rename, within the `try`
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, path)
    except BaseException:
        # Closing flushes what the disk has just refused, so it may fail in the same way again.
        for clean in (file.close, temporary.unlink):
            with contextlib.suppress(OSError):
                clean()
        raise
    sync_folder(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a file is what :func:`replacing` writes to, such as one that a killed process left.

    >>> is_temporary("recipe.json.0123abcd.tmp"), is_temporary("recipe.tmp")
    (True, False)
    """
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes had begun to write; for whoever owns the folder."""
    for name in filter(is_temporary, os.listdir(folder)):
        with contextlib.suppress(OSError):
            (folder / name).unlink()


def write_whole(path: Path, content: Any, mend: str) -> None:
    """Write a file by :func:`replacing`; ``mend`` says what to do where the disk refuses, and ends the message."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise MetaplError(f"{path} could not be written: {error.strerror or error}; {mend}") from error


@contextlib.contextmanager
def written_last(path: Path, content: bytes) -> Iterator[None]:
    """A file that appears when the block ends well, such as one whose pictures the block writes. Its bytes are on disk
    before the block begins, so a full disk leaves neither it nor what the block writes."""
    with replacing(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        yield


def sync_folder(folder: Path) -> None:
    """Puts the rename itself on disk; without it a power cut may bring the old name back."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; the file itself is synced by then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
