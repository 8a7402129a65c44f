"""The folder of a fit, to which one process at a time writes.

A file in it is the old one or the whole new one, whatever interrupts the writing. ``metrics.jsonl``
has a row for each logged step of a phase.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from metapl.errors import MetaplError, needed_for, reason_of

# Seconds that a process waits for the lock. The workers of a process that was killed hold its lock
# until they notice.
PATIENCE = 10.0

# The name of the lock, which stays in the folder when it is let go.
LOCK = ".lock"


class Folder:
    """The folder of a fit, with checkpoints of its phases and the rows that it records.

    It is made when a process first locks it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: Any = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other processes until the block ends.

        Within it, this value may be locked again.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"{self.path} cannot be made ({error.strerror}); expected a folder for out."
            raise MetaplError(text) from error
        if self._lock is None:
            self._lock = FileLock(self.path / LOCK, timeout=PATIENCE)
        try:
            self._lock.acquire()
        except Timeout as error:
            text = f"another process is running in {self.path}; wait for it, or stop it."
            raise MetaplError(text) from error
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a new file that takes the name ``path`` when the block ends.

    It does so only if the block ends well and the bytes are on disk. Else the new file is removed,
    and ``path`` is as it was. Of a link, the file that it leads to is replaced. Raises: ``OSError``
    where something that is no plain file has that name.
    """
    path = Path(os.path.realpath(path))
    # To rename a file to the name of a device would take the device away.
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    # Not tempfile.mkstemp: it makes files that only the owner can read, and colleagues share result
    # folders.
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
        # Some network and FUSE file systems cannot sync a folder; the file itself is synced by
        # then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_rows(file: Path, phase: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of a run so far, of one phase or of all.

    Damaged lines and a torn last one are left out.
    """
    try:
        if not file.exists():
            return []
        content = file.read_bytes()
    except OSError as error:
        raise MetaplError(f"{file} cannot be read: {error.strerror}.") from error
    # What follows the last end of a line is empty, or a line that was torn.
    *lines, _ = content.split(b"\n")
    rows = []
    for line in lines:
        row = _read_row(line)
        if row is not None and phase in (None, row["phase"]):
            rows.append(row)
    return rows


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line, or None where the line is damaged."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return None
        for name, value in row.items():
            if name != "phase" and value is not None:
                # This fails of what is no number, and of a whole number too large for a float.
                _ = value + 0.0
    except (ValueError, RecursionError, TypeError, OverflowError):
        return None
    is_named = isinstance(row.get("phase"), str) and isinstance(row.get("step"), int)
    return row if is_named else None


class Records:
    """The rows of one phase, in ``metrics.jsonl`` and in a copy for TensorBoard.

    These are written where there is a folder ``out``. Rows and events after step ``start`` belong
    to work that was lost, and are removed: the file of a resumed run equals that of an
    uninterrupted one. A copy that fails is said once and ends. ``history`` has the rows so far.
    """

    def __init__(
        self, out: Path | None, phase: str, start: int, say: Callable[[str], object]
    ) -> None:
        self.phase = phase
        self.start = start
        self.say = say
        self.history: list[dict[str, float]] = []
        # None: without a folder, or after a copy that failed.
        self.curves_folder: str | None = None
        # The writer of TensorBoard's files, made with the first row.
        self.events: Any = None
        self.file: Path | None = None
        if out is None:
            return
        self.file = out / "metrics.jsonl"
        self.curves_folder = str(out / "tensorboard" / phase)
        if start and not self.file.exists():
            say(
                f"{self.file} is missing: it begins again after step {start:,}, without earlier "
                "rows"
            )
        rows = read_rows(self.file)
        if not rows and self.file.exists() and self.file.stat().st_size:
            raise MetaplError(f"{self.file} has no rows of a run; expected another folder.")
        other_phases = [row for row in rows if row["phase"] != phase]
        this_phase = [row for row in rows if row["phase"] == phase and row["step"] <= start]
        with _writing(), replacing(self.file) as file:
            file.writelines(_line(row) for row in [*other_phases, *this_phase])
        for row in this_phase:
            numbers = {}
            for name, value in row.items():
                if name != "phase":
                    # JSON knows no NaN, which is null there.
                    numbers[name] = math.nan if value is None else value
            self.history.append(numbers)

    def add(self, row: dict[str, float]) -> None:
        """Write a row, with null in the place of what is not finite."""
        self.history.append(row)
        if self.file is None:
            return
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with _writing(), self.file.open("ab") as file:
            file.write(_line({"phase": self.phase, **values}))
        try:
            self._add_to_curves(row)
        except Exception as error:
            self.curves_folder = None
            self.events = None
            self.say(
                f"note: no more curves for TensorBoard ({type(error).__name__}: {error}); "
                "metrics.jsonl goes on"
            )

    def _add_to_curves(self, row: dict[str, float]) -> None:
        if self.curves_folder is None:
            return
        if self.events is None:
            with needed_for("curves for TensorBoard"):
                # The import takes a second.
                from torch.utils.tensorboard import SummaryWriter

            purge_step = self.start + 1 if self.start else None
            self.events = SummaryWriter(self.curves_folder, purge_step=purge_step)
        for name in row.keys() - {"step"}:
            self.events.add_scalar(name, row[name], int(row["step"]))

    def flush(self) -> None:
        """Bring the rows to the disk: those before a checkpoint are not written again."""
        if self.file is not None:
            with _writing(), self.file.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the copy for TensorBoard, if the disk has room for what it has not written yet."""
        with suppress(Exception):
            if self.events is not None:
                self.events.close()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an error of the system in this block into one that says what was being written."""
    try:
        yield
    except OSError as error:
        text = f"the rows of the fit could not be written: {reason_of(error)}"
        raise MetaplError(text) from error
