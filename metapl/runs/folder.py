"""The folder of a fit, and that one process at a time writes to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError
from metapl.runs.checkpoint import CheckpointFolder

PATIENCE = 10.0  # seconds: the workers of a process that was killed hold its lock until they notice


class Folder:
    """The folder of a fit: checkpoints of its phases, and the rows that it records. It is made when it is held."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: Any = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder against other processes until the block ends; within it, this value may be held again."""
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or FileLock(self.path / ".lock", timeout=PATIENCE)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise MetaplError(f"another process is running in {self.path}; wait for it, or stop it.") from error
        try:
            yield
        finally:
            self._lock.release()

    def checkpoints(self, phase: str, keep: int = 2) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints" / phase, keep=keep)
