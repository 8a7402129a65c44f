"""Exclusive locks on open files, which the system releases when the process ends, however it ends."""

from __future__ import annotations

import os
import sys
from typing import IO, Any


def lock(file: IO[Any], *, wait: bool) -> None:
    """Lock an open file against other processes until it is closed.

    Args:
        file: opened for writing.
        wait: wait for the process that holds the lock; on Windows, for ten seconds at most.

    Raises:
        OSError: another process holds the lock.
    """
    if sys.platform == "win32":
        import msvcrt

        # Windows locks ranges of bytes and keeps other processes from reading them, so this one lies behind any
        # content. The range starts at the file's position, which is put back.
        before = os.lseek(file.fileno(), 0, os.SEEK_CUR)
        os.lseek(file.fileno(), BEHIND_CONTENT, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(file.fileno(), before, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


BEHIND_CONTENT = 2**30
"""Where the locked byte lies on Windows."""
