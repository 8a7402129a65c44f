"""The folder of a fit, to which one process at a time writes: files that are the old one or the
whole new one whatever interrupts the writing, and ``metrics.jsonl`` with a row for each logged step
of a phase."""

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

PATIENCE = 10.0  # seconds: the workers of a process that was killed hold its lock until they notice

LOCK = ".lock"  # stays in the folder when it is let go


class Folder:
    """The folder of a fit.

    Checkpoints of its phases, and the rows that it records. It is made when it is held.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: Any = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Own the folder against other processes until the block ends.

        Within it, this value may be held again.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MetaplError(
                f"{self.path} cannot be made ({error.strerror}); expected a folder for out."
            ) from error
        self._lock = self._lock or FileLock(self.path / LOCK, timeout=PATIENCE)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise MetaplError(
                f"another process is running in {self.path}; wait for it, or stop it."
            ) from error
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a new file that takes the name ``path`` only when the block ends well and its bytes are on disk.

    Else it is removed, and ``path`` is as it was. Of a link, the file that it leads to is replaced;
    ``OSError`` where something that is no plain file has that name.
    """
    path = Path(os.path.realpath(path))
    if (
        path.exists() and not path.is_file()
    ):  # to rename a file to the name of a device would take that away
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
    """The rows of a run so far, of one phase or of all.

    Damaged lines and a torn last one are left out.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    except OSError as error:
        raise MetaplError(f"{file} cannot be read: {error.strerror}.") from error
    rows = []
    for line in lines:
        with suppress(
            ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError
        ):
            row = json.loads(line)
            _ = [
                value + 0.0 for name, value in row.items() if name != "phase" and value is not None
            ]
            if (
                isinstance(row["phase"], str)
                and isinstance(row["step"], int)
                and phase in (None, row["phase"])
            ):
                rows.append(row)
    return rows


class Records:
    """The rows of one phase, in ``metrics.jsonl`` and a copy for TensorBoard where there is a folder ``out``.

    Rows and events after step ``start`` belong to work that was lost, and are removed: the file of
    a resumed run equals that of an uninterrupted one. A copy that fails is said once and ends.
    ``history`` has the rows so far.
    """

    def __init__(
        self, out: Path | None, phase: str, start: int, say: Callable[[str], object]
    ) -> None:
        self.phase, self.start, self.say = phase, start, say
        self.history: list[dict[str, float]] = []
        self.file = None if out is None else out / "metrics.jsonl"
        self.curves = None if out is None else str(out / "tensorboard" / phase)
        self.events: Any = None
        if self.file is None:
            return
        if start and not self.file.exists():
            say(
                f"{self.file} is missing: it begins again after step {start:,}, without earlier "
                "rows"
            )
        rows = read_rows(self.file)
        if not rows and self.file.exists() and self.file.stat().st_size:
            raise MetaplError(
                f"{self.file} has no rows of a run, and is another's; expected another folder."
            )
        own = [row for row in rows if row["phase"] == phase and row["step"] <= start]
        with _writing(), replacing(self.file) as file:
            file.writelines(
                _line(row) for row in [*(row for row in rows if row["phase"] != phase), *own]
            )
        for row in own:  # JSON knows no NaN, which is null there
            values = {
                name: math.nan if value is None else value
                for name, value in row.items()
                if name != "phase"
            }
            self.history.append(values)

    def add(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.file is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with _writing(), self.file.open("ab") as file:
            file.write(_line({"phase": self.phase, **plain}))
        try:
            if self.curves is not None and self.events is None:
                with needed_for("curves for TensorBoard"):
                    # The import takes a second.
                    from torch.utils.tensorboard import SummaryWriter

                self.events = SummaryWriter(
                    self.curves, purge_step=self.start + 1 if self.start else None
                )
            for name in row.keys() - {"step"} if self.events is not None else ():
                self.events.add_scalar(name, row[name], int(row["step"]))
        except Exception as error:
            self.curves = self.events = None
            self.say(
                f"note: no more curves for TensorBoard ({type(error).__name__}: {error}); "
                "metrics.jsonl goes on"
            )

    def flush(self) -> None:
        """Bring the rows to the disk: those before a checkpoint are not written again."""
        if self.file is not None:
            with _writing(), self.file.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        with suppress(Exception):  # of a full disk
            if self.events is not None:
                self.events.close()


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetaplError(
            f"the rows of the fit could not be written: {reason_of(error)}"
        ) from error
