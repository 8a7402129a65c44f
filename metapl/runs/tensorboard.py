"""Event files for TensorBoard, written where they are asked for.

torch's ``SummaryWriter`` writes from a thread of its own: what is on disk when a process is killed is up to that
thread, and a full disk ends it with a traceback that nobody can catch.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Events:
    """An event file in a folder, which may hold those of earlier parts of the run; what these say of steps after
    ``start`` is void.

    >>> import tempfile
    >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    >>> folder = tempfile.mkdtemp()
    >>> with Events(Path(folder), start=0) as events:
    ...     events.scalars(1, {"loss": 0.5})
    >>> [(event.step, event.value) for event in EventAccumulator(folder).Reload().Scalars("loss")]
    [(1, 0.5)]
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # The files are read in the order of their names.
        self._file = (folder / f"events.out.tfevents.{time.time_ns():020d}.{platform.node()}").open("xb")
        self._records = RecordWriter(self._file)
        self._write(0, file_version="brain.Event:2")
        self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A point on the curve of each name."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def counts(self, step: int, counts: Mapping[str, Sequence[int]]) -> None:
        """A histogram of each name, with a bucket per class."""
        from torch.utils.tensorboard.summary import histogram_raw

        for name, per_class in counts.items():
            pairs = list(enumerate(per_class))
            total, first, second = (sum(n * k**power for k, n in pairs) for power in range(3))
            limits = [k + 0.5 for k, _ in pairs]
            summary = histogram_raw(name, 0, len(pairs) - 1, total, first, second, limits, list(per_class))
            self._write(step, summary=summary)

    def flush(self) -> None:
        """Put what was written out of the process's own memory."""
        self._file.flush()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # the error under way says more
                raise

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())
