"""Reading plain files alone: to open a pipe may wait for ever, and a device may never end."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path


def open_plain(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading its bytes.

    Raises:
        OSError: it is missing, may not be read, or is a folder, a device, a pipe or a socket.
    """
    refuse_irregular(path)  # of a socket, the system's own words say nothing
    # Should it have become a pipe since, this does not wait for somebody who writes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_mode(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_plain(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file; raises as :func:`open_plain`."""
    with open_plain(path) as file:
        return file.read()


def refuse_irregular(path: str | os.PathLike[str]) -> None:
    """Stop where something else than a plain file has a name: to rename a file to that of a device takes it away.

    Raises:
        OSError: it is a folder, a device, a pipe or a socket, or it cannot be told. A name that is free passes.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    _refuse_mode(mode, path)


def irregular(mode: int) -> str | None:
    """What it is that is neither a file nor a folder, by its ``st_mode``; None for these two.

    >>> irregular(os.stat(os.curdir).st_mode), irregular(os.stat(os.devnull).st_mode)
    (None, 'a device')
    """
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _refuse_mode(mode: int, path: str | os.PathLike[str]) -> None:
    name = os.fspath(Path(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", name)
    kind = irregular(mode)
    if kind is not None:
        raise OSError(errno.EINVAL, f"it is {kind}, expected a plain file", name)
