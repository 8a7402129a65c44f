"""Files that are either the old one or the whole new one, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a new file that takes the name ``path`` only when the block ends well and its bytes are on disk.

    Else it is removed, and ``path`` is as it was. Of a link, the file that it leads to is replaced; ``OSError`` where
    something that is no plain file has that name.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # to rename a file to the name of a device would take that away
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    # Not tempfile.mkstemp: it makes files that only the owner can read, and colleagues share result folders.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a rename itself on disk; without it a power cut may bring the old name back."""
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
