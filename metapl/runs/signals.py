"""The signals by which a process is asked to end, from outside and from a terminal that is closed."""

from __future__ import annotations

import signal

END = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows has no SIGHUP


def is_heard(number: int) -> bool:
    """Whether this process was not started to ignore a signal: as ``nohup`` and a shell's background commands are."""
    return signal.getsignal(number) is not signal.SIG_IGN
