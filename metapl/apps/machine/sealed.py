"""Files that are read as they were written, or refused by name: plain files alone, of a known SHA-256 where there is
one, and JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from metapl.errors import MetaplError, reason_of
from metapl.runs import atomic

StrPath = str | os.PathLike[str]
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")


def read_sealed(path: StrPath, sha256: str | None = None, *, mend: str) -> bytes:
    """All bytes of a plain file that is as it was written; ``sha256`` is None where it is not known, as of files of
    earlier versions. ``mend`` ends the message of the refusal."""
    try:
        content = read_plain(path)
    except OSError as error:
        raise MetaplError(f"{path} cannot be read: {reason_of(error)}. {mend}") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise MetaplError(f"{path} is damaged or of another run: its SHA-256 is not the one that was noted. {mend}")
    return content


def read_json(path: StrPath, *, needed: Iterable[str] = (), mend: str = "") -> dict[str, Any]:
    """The object that a plain file of JSON holds, with the ``needed`` entries; ``mend`` ends the message of the
    refusal."""
    end = f". {mend}" if mend else "."
    try:
        content = json.loads(read_plain(path))
    except RecursionError as error:
        raise MetaplError(f"{path} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise MetaplError(f"{path} cannot be read: {reason_of(error)}{end}") from error
    if not isinstance(content, dict):
        raise MetaplError(f"{path} is damaged: it holds {content!r:.60}; expected an object{end}")
    if missing := [name for name in needed if name not in content]:
        raise MetaplError(f"{path} is damaged: it has no {missing[0]}{end}")
    return content


def sha256_of(file: IO[bytes] | StrPath) -> str:
    if isinstance(file, str | os.PathLike):
        with open_plain(file) as opened:
            return sha256_of(opened)
    return hashlib.file_digest(typing.cast(io.BufferedReader, file), "sha256").hexdigest()


def open_plain(path: StrPath) -> io.BufferedReader:
    """Open a file for reading its bytes: to open a pipe may wait for ever, and a device may never end.

    Raises: ``OSError`` where it is missing, may not be read, or is a folder, a device, a pipe or a socket.
    """
    refuse_irregular(path)  # of a socket, the system's own words say nothing
    # Should it have become a pipe since, this does not wait for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        refuse_irregular(path, os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_plain(path: StrPath) -> bytes:
    with open_plain(path) as file:
        return file.read()


def is_there(path: StrPath) -> bool:
    """Whether something has a name, a link that leads nowhere too; ``OSError`` where the system does not say."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def refuse_irregular(path: StrPath, mode: int | None = None) -> None:
    """Stop where something else than a plain file has a name (an ``OSError``): to rename a file to the name of a device
    would take that away. A name that is free passes."""
    try:
        mode = os.stat(path).st_mode if mode is None else mode
    except FileNotFoundError:
        return
    name, kind = os.fspath(Path(path)), irregular(mode)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", name)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, expected a plain file", name)


def irregular(mode: int) -> str | None:
    """What it is that is neither a file nor a folder, by its ``st_mode``; None for these two."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


# -------------------------------------------------------------------------------------------------------------- writing


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """:func:`metapl.runs.atomic.replacing`, which says what kind of thing is in the way where it is no plain file."""
    refuse_irregular(os.path.realpath(path))
    with atomic.replacing(path) as file:
        yield file


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
