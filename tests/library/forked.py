"""The command in processes that are forked from one that has imported everything: importing takes most of a tiny run.

They are processes like any others: with their own standard streams, memory, signals and exit code.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest

PRELOADED = [
    *("torch", "metapl", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "torchopt"),
    *("torch._decomp.decompositions_for_jvp", "torch.utils.tensorboard.summary", "tensorboard", "torchvision"),
    *("metapl.apps.commands", "metapl.apps.report", "matplotlib.figure", "sklearn.datasets"),
    *("metapl.execution.kernels", "pytest"),
]

Point = tuple[str, str, int, int]
"""Owner and name of a function, the number of the call, and the signal that comes with it; minus it: to the group."""

SECONDS = 300.0
_ONE_AT_A_TIME = threading.Lock()  # of two threads that ask for an exit code, one would be told a wrong one
_NUMBERS = itertools.count()
_FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


def context() -> Any:
    """Where processes come from."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    with _ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # by which the server finds the modules of the tests
        forkserver.ensure_running()
    return found


class Forked:
    """``metapl`` in a process of its own, as ``subprocess.Popen`` would start it.

    Args:
        arguments: of the command.
        cwd, env: the folder in which it is called, and the environment.
        said: where standard output and standard error go, both; else they come from :meth:`communicate`, apart.
        point: when it sends itself a signal.
        alone: whether it leads a group of processes.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        said: Path | None = None,
        point: Point | None = None,
        alone: bool = False,
    ) -> None:
        number = next(_NUMBERS)
        self._files = [said or _FOLDER / f"{number}.{name}" for name in ("out", "err")]
        for file in self._files:
            file.write_bytes(b"")
        given = (
            [os.fspath(argument) for argument in arguments],
            os.fspath(cwd or Path.cwd()),
            dict(os.environ if env is None else env),
            [os.fspath(file) for file in self._files],
            point,
            alone,
        )
        self._process = context().Process(target=_born, args=given)
        with _ONE_AT_A_TIME:
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that killed it, or ``None`` while it runs."""
        with _ONE_AT_A_TIME:
            return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = SECONDS) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise subprocess.TimeoutExpired("metapl", timeout)
            connection.wait([self._process.sentinel], 1.0)
        return code

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Standard output and standard error, when it has ended."""
        self.wait(timeout)
        out, err = (file.read_text() for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _born(
    argv: list[str], cwd: str, environment: dict[str, str], files: list[str], point: Point | None, alone: bool
) -> None:
    for descriptor, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    if alone:
        os.setpgid(0, 0)
    multiprocessing.set_start_method(None, force=True)  # its own workers are not of this server
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of which a parent in the background knows nothing
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= environment
    tempfile.tempdir = None
    sys.argv = ["metapl", *argv]
    if point is not None:
        _ring_at(*point)
    from metapl.apps.main import main

    sys.exit(main())


def _ring_at(owner: str, name: str, number: int, signum: int) -> None:
    found = pkgutil.resolve_name(owner)
    real, calls = getattr(found, name), []

    def dying(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            _send(signum)
        return real(*given, **named)

    setattr(found, name, dying)


def _send(signum: int) -> None:
    if signum > 0:
        return os.kill(os.getpid(), signum)
    # Another process does it, as the workers can tell.
    kill = ["sh", "-c", f"kill -{-signum} -{os.getpgrp()}"]
    os.waitpid(os.posix_spawn("/bin/sh", kill, os.environ, setpgroup=0), 0)
    return None
