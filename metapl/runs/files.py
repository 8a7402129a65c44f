"""Files as they were written, or refused by name, and folders that one process at a time owns.

What is read are plain files alone, of a known SHA-256 where there is one, and JSON. What is written
has its name when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError, reason_of
from metapl.runs.folder import LOCK, Folder, replacing

StrPath = str | os.PathLike[str]
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


# ------------------------------------------------------------------------------------------ reading


def read_sealed(path: StrPath, sha256: str | None = None, *, mend: str) -> bytes:
    """Return all bytes of a plain file; refuse one that is not as it was written.

    Args:
        path: of the file.
        sha256: of its bytes; None where it is not known, as of files of earlier versions.
        mend: what to do about it, the last sentence of the refusal.
    """
    try:
        content = read_plain(path)
    except OSError as error:
        raise MetaplError(f"{path} cannot be read: {reason_of(error)}. {mend}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        reason = "is damaged or of another run: its SHA-256 is not the one that was noted"
        raise MetaplError(f"{path} {reason}. {mend}")
    return content


def read_json(path: StrPath, *, mend: str = "") -> dict[str, Any]:
    """Return the object in a plain file of JSON; ``mend`` ends the message of the refusal."""
    end = f". {mend}" if mend else "."
    try:
        content = json.loads(read_plain(path))
    except RecursionError as error:
        raise MetaplError(f"{path} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise MetaplError(f"{path} cannot be read: {reason_of(error)}{end}") from error
    if not isinstance(content, dict):
        raise MetaplError(f"{path} is damaged: it holds {content!r:.60}; expected an object{end}")
    return content


def sha256_of(path: StrPath) -> str:
    """Return the SHA-256 of a plain file."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a value as sorted JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_plain(path: StrPath) -> io.BufferedReader:
    """Open a plain file for reading its bytes; refuse pipes, devices and folders.

    To open a pipe may wait for ever, and a device may never end.
    """
    flags = os.O_RDONLY
    # Windows has no O_NONBLOCK, and other systems have no O_BINARY.
    flags |= getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", os.fspath(path))
    return open(descriptor, "rb")


def read_plain(path: StrPath) -> bytes:
    """Return the bytes of a plain file."""
    with open_plain(path) as file:
        return file.read()


# ------------------------------------------------------------------------------------------ writing


def is_temporary(name: str) -> bool:
    """Return whether a file is one that :func:`replacing` writes to, as a killed process leaves it.

    >>> is_temporary("recipe.json.0123abcd.tmp"), is_temporary("recipe.tmp")
    (True, False)
    """
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporary(folder: Path) -> None:
    """Remove what killed processes had begun to write; for whoever owns the folder."""
    for name in filter(is_temporary, os.listdir(folder)):
        with suppress(OSError):
            (folder / name).unlink()


def write_whole(path: Path, content: Any, mend: str) -> None:
    """Write a file by :func:`replacing`.

    Args:
        path: of the file.
        content: its bytes.
        mend: what to do where the disk refuses, the end of the message.
    """
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise MetaplError(
            f"{path} could not be written: {error.strerror or error}; {mend}"
        ) from error


# ---------------------------------------------------------------------------------------- one owner


@contextmanager
def owned(
    folder: Path, undone: Collection[str] = (), *, leaves_lock: bool = True
) -> Iterator[None]:
    """Own a folder, against other processes, until the block ends; it is made where it is missing.

    Where the block fails and has made nothing in the folder but the files ``undone``, these are
    removed, and the folder too if it was made here.

    Args:
        folder: the folder.
        undone: names of files that are worth nothing by themselves.
        leaves_lock: whether the file of the lock stays; not in a folder that others get, such as
            what is exported.
    """
    # The folders that are made here, the innermost first.
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names_before = {*os.listdir(folder)}
    except OSError as error:
        raise MetaplError(f"the folder {folder} cannot be made: {error.strerror}.") from error
    try:
        with Folder(folder).locked():
            try:
                yield
            except Exception:
                # A KeyboardInterrupt leaves the files: a stopped run goes on from them.
                new_names = {*os.listdir(folder)} - names_before
                # Where there are others, they are worth keeping.
                if new_names <= {*undone, LOCK}:
                    for name in new_names - {LOCK}:
                        (folder / name).unlink()
                    if LOCK in new_names:
                        # It goes last: until then no other process owns the folder.
                        (folder / LOCK).unlink()
                raise
            finally:
                if not leaves_lock:
                    (folder / LOCK).unlink(missing_ok=True)
    finally:
        for place in missing:
            # A folder with something in it, as there is after a success, is not removed.
            with suppress(OSError):
                place.rmdir()


def is_owned(folder: Path) -> bool:
    """Return whether somebody owns the folder now."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
