"""One owner per folder: the first who takes it, until it lets go or dies, and no trace of one who was refused."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metapl.errors import MetaplError
from metapl.runs.folder import Folder

LOCK = ".lock"  # the file that is locked; in the folder of a run it stays where it is when that is let go


@contextmanager
def owned(folder: Path, undone: Collection[str] = (), *, leaves_lock: bool = True) -> Iterator[None]:
    """Own a folder, against other processes, until the block ends; it is made where it is missing.

    Where the block fails and has made nothing in the folder but the files ``undone``, these are removed, and the folder
    too if it was made here. ``leaves_lock`` is False for a folder that others get, such as what is exported.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {*os.listdir(folder)}
    except OSError as error:
        raise MetaplError(f"the folder {folder} cannot be made: {error.strerror}.") from error
    try:
        with Folder(folder).held():
            try:
                yield
            except Exception:  # what was stopped is gone on with
                new = {*os.listdir(folder)} - there
                if new <= {*undone, LOCK}:  # else there is more, which is worth keeping
                    for name in sorted(new, key=LOCK.__eq__):
                        (folder / name).unlink()
                raise
            finally:
                if not leaves_lock:
                    (folder / LOCK).unlink(missing_ok=True)
    finally:
        for place in made:
            with suppress(OSError):  # there is something in it
                place.rmdir()


def is_owned(folder: Path) -> bool:
    """Whether somebody owns the folder now."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
