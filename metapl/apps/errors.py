"""Errors of the application: where something failed, which package it lacks, and what a stopped command exits with."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from metapl.errors import MetaplError


def require_extra(extra: str, need: str, *packages: str) -> None:
    """Refuse to go on without the packages of an extra; ``need`` is what the message begins with, "ONNX needs" say."""
    missing = " and ".join(name for name in packages if importlib.util.find_spec(name) is None)
    if missing:
        raise MetaplError(f"{need} {missing}: not installed; get it by: pip install 'metapl[{extra}]'")


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Say where, in front of what a :class:`MetaplError` of this block says."""
    try:
        yield
    except MetaplError as error:
        raise MetaplError(f"{where}{error}") from error


def exit_code(stopped: KeyboardInterrupt) -> int:
    """That of a process which the signal has ended."""
    return 128 + int(getattr(stopped, "signal_number", signal.SIGINT))
