"""One owner per folder: the first who takes it, until it lets go or dies, and no trace of one who was refused."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from metapl.apps.machine.sealed import open_plain
from metapl.errors import MetaplError

LOCK = ".lock"  # the file that is locked; in the folder of a run it stays where it is when that is let go
PATIENCE = 3.0  # seconds that are waited for an owner that is just going
BEHIND_CONTENT = 2**30  # where the locked byte lies on Windows
# What the system answers where somebody else has the lock; EACCES and EDEADLK on Windows.
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextmanager
def owned(folder: Path, undone: Collection[str] = (), *, leaves_lock: bool = True) -> Iterator[None]:
    """Own a folder, against other processes and threads, until the block ends; it is made where it is missing.

    Args:
        folder: to be owned.
        undone: names of files. Where the block fails and has made nothing else in the folder, what it has made is
            removed, and the folder too if it was made here.
        leaves_lock: False where the folder is one that others get, such as what is exported.

    Raises: :class:`metapl.MetaplError` where somebody else owns the folder, or it cannot be made or locked.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        file, is_new = _taken(folder)
    except BaseException:
        _remove(made)
        raise
    try:
        there = {*os.listdir(folder)} - ({LOCK} if is_new else set())
        try:
            yield
        except BaseException as error:
            if leaves_lock and not isinstance(error, Exception):
                raise  # a run that was stopped is gone on with
            with suppress(OSError, MemoryError):
                new = {*os.listdir(folder)} - there
                if new <= {*undone, LOCK}:  # else there is more, which is worth keeping
                    # The lock last: from then on another may own the folder, which keeps it from being removed.
                    _remove([folder / name for name in sorted(new, key=LOCK.__eq__)])
                    _remove(made)
            raise
    finally:
        if not leaves_lock:
            _remove([folder / LOCK])  # on Windows it cannot be removed while it is open
            _remove(made)  # where nothing was written to it, and there was no memory to list it
        file.close()


def is_owned(folder: Path) -> bool:
    """Whether somebody owns the folder now; nothing is made or changed, and nobody is kept from owning it."""
    try:
        file = open_plain(folder / LOCK)
    except OSError:
        return False
    with file:
        try:
            lock(file, wait=False, shared=True)
        except OSError as error:
            return error.errno in HELD
    return False


def _remove(paths: Collection[Path]) -> None:
    with suppress(OSError, MemoryError):
        for path in paths:
            path.rmdir() if path.is_dir() else path.unlink()


def _taken(folder: Path) -> tuple[IO[bytes], bool]:
    """The locked file, and whether it was made for this."""
    give_up = time.monotonic() + PATIENCE
    made: os.stat_result | None = None  # by this call, though another may have locked it first
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file, is_new = _opened(folder / LOCK)
        except OSError as error:
            # Who was refused here may be removing the folder.
            gone = isinstance(error, FileNotFoundError) or (isinstance(error, FileExistsError) and not folder.exists())
            if gone and time.monotonic() < give_up:
                continue
            raise MetaplError(f"the run folder {folder} cannot be made or locked: {error.strerror}.") from error
        found = os.fstat(file.fileno())
        made = found if is_new else made
        try:
            lock(file, wait=False)
            # The file may have been removed by its owner before it was locked here; the name is what others look for.
            if os.path.samestat(found, os.stat(folder / LOCK)):
                _close_in_forks(weakref.ref(file))
                return file, made is not None and os.path.samestat(found, made)
        except OSError as error:
            if error.errno not in (*HELD, errno.ENOENT):
                file.close()
                raise MetaplError(
                    f"the file system of {folder} has no locks ({error.strerror}), so two processes could write to one "
                    "folder; expected a folder on another disk."
                ) from error
        file.close()
        if time.monotonic() > give_up:
            raise MetaplError(f"another process is running in {folder}; wait for it, or stop it.")
        time.sleep(0.05)


def _opened(path: Path) -> tuple[IO[bytes], bool]:
    """The file, and whether it is new; its content is not touched."""
    # A pipe must not be waited for, and a link not be followed to a file of somebody else.
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.fdopen(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), "rb+"), True
    except FileExistsError:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise MetaplError(f"{path} is a link, a pipe or a folder; expected a plain file: remove it.") from None
    return os.fdopen(os.open(path, flags), "rb+"), False


def _close_in_forks(held: weakref.ref[IO[bytes]]) -> None:
    """A forked process shares the lock: workers that outlive a parent that was killed would hold it."""
    if hasattr(os, "register_at_fork"):  # Windows has no forks
        os.register_at_fork(after_in_child=lambda: (file := held()) and file.close())


def lock(file: IO[Any], *, wait: bool, shared: bool = False) -> None:
    """Lock an open file against other processes until it is closed, however they end; ``OSError`` where another holds
    it, unless that is to be waited for (on Windows, for ten seconds at most). Locks that are ``shared`` do not keep
    each other out (on Windows, they do)."""
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

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
