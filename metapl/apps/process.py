"""The process around a command: the signals that stop it, its streams, and too little memory."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from metapl.runs.terminal import END, is_heard


class Terminated(KeyboardInterrupt):
    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def exit_code(stopped: KeyboardInterrupt) -> int:
    return 128 + int(getattr(stopped, "signal_number", signal.SIGINT))


@contextmanager
def stoppable(*, for_good: bool) -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that temporary files are removed; what comes meanwhile is not heard.
    With ``for_good`` the process ends with the block: signals that come after it has begun to end are not heard either.
    """
    stopping = False

    def unwind(number: int, frame: Any) -> None:
        nonlocal stopping
        # Who stops a group of processes may reach one of them twice; a second Ctrl-C is meant.
        # A fit that was stopped has saved its step already, and says so when this has unwound.
        if number in END and (stopping or isinstance(sys.exc_info()[1], KeyboardInterrupt)):
            return
        stopping = True
        raise Terminated(number) if number in END else KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = {number: signal.signal(number, unwind) for number in filter(is_heard, (signal.SIGINT, *END))}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if for_good and stopping else handler or signal.SIG_DFL)


def accept_all_letters() -> None:
    """Letters that a terminal does not have are written as their escapes, and bytes of names that are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


def drop_output() -> None:
    """What is buffered for standard output is not written at the process's end, where it would fail again."""
    with suppress(OSError, ValueError):  # it has no file, as in a test
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, sys.stdout.fileno())
        os.close(target)


# However it is said: Python, NumPy, torch on the host and on a GPU each have a way of their own.
_SAID = re.compile(
    r"can't allocate memory|not enough memory|out of memory|MemoryError|bad_alloc|cannot allocate memory|"
    r"could not create a (primitive|memory)",  # oneDNN
    re.IGNORECASE,
)

LESS = (  # not every recipe has all of these
    "lower the batch sizes (--labeled-batch, --unlabeled-batch), --image-size or --num-workers, raise --accumulate, or "
    "take --precision bfloat16"
)


def out_of_memory(error: BaseException | None) -> str | None:
    """Whose memory did not suffice, where that is the error or one that it came from; None for any other error, and for
    a refusal that says so itself."""
    torch = sys.modules.get("torch")
    while error is not None and "does not suffice" not in str(error):
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            return "of the GPU"
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | OSError) and _SAID.search(str(error))):
            return "of the GPU" if "CUDA" in str(error) else "of this machine"
        error = error.__cause__ or error.__context__
    return None
