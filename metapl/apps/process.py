"""The process around a command: its streams, which may be closed, and the signals that stop it."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from metapl.runs.signals import END, is_heard


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


@contextmanager
def streams() -> Iterator[None]:
    """Standard streams that can be written to, whatever the process was started with.

    What is written to a closed standard output fails, as where its reader has gone; a letter that a terminal does not
    have is shown as ?; a byte of a file's name that is not UTF-8 is written as it is; and standard error, which has
    progress and messages, never fails.
    """
    for number in range(3):  # a file of a run must not become standard output
        try:
            os.fstat(number)
        except OSError:
            # Who closed standard output is told so by the exit code, once something is written: it is read alone.
            opened = os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("metapl", _replaced)
        sys.stdout.reconfigure(errors="metapl")
    sys.stderr = cast(Any, _Unfailing(sys.stderr or open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    escaped = b"".join(bytes([ord(x) - 0xDC00]) if 0xDC80 <= ord(x) <= 0xDCFF else b"?" for x in letters)
    return escaped, error.end


def drop_output() -> None:
    """What is buffered for standard output is not written at the process's end, where it would fail again."""
    with suppress(OSError, ValueError):  # it has no file, as in a test
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, sys.stdout.fileno())
        os.close(target)


class _Unfailing:
    """A stream that drops what its file does not take: nobody reads it any more, and the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            written: int = self._stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            return len(text)
        return written

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
