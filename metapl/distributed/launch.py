"""Processes that ``torchrun`` has started, as the command joins them: who leads, and who says what went wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.execution.ranks import Agreed
from metapl.words import tell

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one before it gives up."""

HEARD_WITHIN = 3.0
"""Seconds in which processes that fail together hear of each other."""

SAID_WITHIN = 5.0
"""Seconds for which a process that has nothing to say waits for another one to say what went wrong."""


class ProcessLost(MetaplError):
    """Another process has ended, or does not answer."""


def started() -> int:
    """The number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def program() -> str:
    """What this command was started with, for a line that starts it again."""
    count = started()
    if count == 1:
        return "metapl"
    here = os.environ.get("LOCAL_WORLD_SIZE") == str(count)
    return f"torchrun {f'--nproc-per-node={count}' if here else '...'} -m metapl"


def is_first() -> bool:
    """Whether this process is the one that shows and writes."""
    return os.environ.get("RANK", "0") == "0"


def left_to_first() -> int:
    """The exit code of a process whose error the first one finds too, and says, before they have joined.

    Under ``torchrun`` it comes when the first has ended, or some seconds later: all are ended when one leaves.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        ended.wait(SAID_WITHIN)
    return 2


@contextmanager
def joined(mesh: Mesh, device: torch.device) -> Iterator[int]:
    """Join the processes of a mesh for this block; yields this one's number, of which 0 shows and writes.

    A mesh of a single process joins nothing. :class:`ProcessLost`: the others did not come.
    """
    check_started(mesh)
    if mesh.size == 1:
        yield 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with lost_processes_explained():
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except ValueError as error:  # of the variables that say where the processes meet
            raise MetaplError(
                f"process {os.environ.get('RANK', '?')} of {mesh.size} does not know where the others are: {error}. "
                f"Start all with: {_with_torchrun(mesh)}"
            ) from error
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def check_started(mesh: Mesh) -> None:
    """Refuse a mesh that is not of the processes that were started."""
    count = started()
    if mesh.size == count:
        return
    if mesh.size == 1:
        raise MetaplError(
            f"{count} processes were started, and no mesh says what each of them does; give --mesh.replicate {count}, "
            f"which shares the batches among them, or --mesh.shard {count}, which shares the weights too."
        )
    product = " x ".join(f"--mesh.{name} {size}" for name, size in mesh.factors.items())
    others = "" if count == 1 else f", or give a mesh of {count}"
    raise MetaplError(
        f"the mesh is of {mesh.size} processes ({product}) and {count} {'was' if count == 1 else 'were'} started; "
        f"expected as many. Start them with: {_with_torchrun(mesh)}{others}"
    )


def _with_torchrun(mesh: Mesh) -> str:
    return f"torchrun --nproc-per-node={mesh.size} -m metapl train ..."


def from_first(value: Any) -> Any:
    """What the first process has, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


class Lead:
    """The first process's word to the others, which wait for what they run together with it."""

    def __init__(self) -> None:
        self._others_wait = dist.is_initialized()

    @contextmanager
    def together(self, work: Any) -> Iterator[None]:
        """The others get ``work``, and run it while this block runs; they leave where it fails."""
        if not dist.is_initialized():
            yield
            return
        self._others_wait = False
        from_first(work)
        yield
        self._others_wait = True

    def end(self, code: int) -> None:
        """Let the others go, if they wait, with this exit code."""
        if self._others_wait:
            self._others_wait = False
            from_first(code)


GO_ON = "Go on with --resume."


def run_together(mesh: Mesh, device: torch.device, lead: Callable[[], int], beside: Callable[[], int]) -> int:
    """Join the processes of a mesh and run a command in all of them; what goes wrong is said by one.

    ``lead`` is the share of the first process, ``beside`` that of each other one. Returns the exit code.
    """
    with joined(mesh, device) as rank:
        try:
            with lost_processes_explained():
                try:
                    code = beside() if rank else lead()
                except KeyboardInterrupt as stopped:
                    raise _lost_before(stopped) from None
        except MetaplError as error:
            if not dist.is_initialized():
                raise
            _ignore_sigterm()
            speaks = not said_by_another(error)
            if speaks:
                sys.stdout.flush()
                tell(f"metapl: process {rank}: {error}" if rank else f"metapl: {error}", file=sys.stderr, wrap=True)
            _leave(rank, speaks)
            return 2
        if rank and code == 2:
            _ignore_sigterm()
            _leave(rank, speaks=False)
        return code


def _ignore_sigterm() -> None:
    """Let this process end by itself: ``torchrun`` sends SIGTERM to all as soon as one of them has failed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(rank: int, speaks: bool) -> None:
    """Wait until some process has said what went wrong, for ``torchrun`` ends all when one leaves.

    The first one, which may keep the store, leaves last.
    """
    store, until = dist.distributed_c10d._get_default_store(), time.monotonic() + SAID_WITHIN
    with suppress(RuntimeError):  # the process that kept the store has ended
        if speaks:
            store.set(_SAID, "")
        for kind in ("error", "left"):  # so that nobody waits for an error of this process
            if not _told(store, kind, rank):
                store.set(_key(kind, rank), "")
        _wait(lambda: store.check([_SAID]), until)
        store.set(_key("gone", rank), "")
        others = [] if rank else [r for r in range(1, dist.get_world_size()) if _told(store, "error", r)]
        _wait(lambda: all(_told(store, "gone", r) for r in others), until)


def _wait(ready: Callable[[], bool], until: float) -> None:
    while not ready() and time.monotonic() < until:
        time.sleep(0.02)


def _told(store: Any, kind: str, rank: int) -> bool:
    return bool(store.check([_key(kind, rank)]))


@contextmanager
def lost_processes_explained(then: str = GO_ON) -> Iterator[None]:
    """Raise :class:`ProcessLost` where an exchange failed because another process has ended, or does not answer."""
    try:
        yield
    except RuntimeError as error:
        why = why_lost(error)
        if why is None:
            raise
        raise ProcessLost(f"{why} {then}") from error


def why_lost(error: BaseException) -> str | None:
    """What an error of an exchange says of another process; None for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not (isinstance(error, dist.DistError) or "gloo" in text):
        return None
    if "imed out" in text or "imeout" in text:
        minutes = PATIENCE.total_seconds() / 60
        return (
            f"another process has not answered for {minutes:g} minutes, so the run was ended: does it hang, or read "
            "from a slow disk?"
        )
    return "another process of this run has ended; its own message, or that of torchrun, says why."


def _lost_before(stopped: KeyboardInterrupt) -> BaseException:
    """The error of an exchange that was unwinding when ``torchrun`` sent its SIGTERM, or the stop itself."""
    error: BaseException | None = stopped
    while error is not None and why_lost(error) is None:
        error = error.__context__
    return error or stopped


def said_by_another(error: MetaplError) -> bool:
    """Whether another process shows this error, or the one that ended this process; called by each that fails.

    An error of one process is shown by that one; one of several, by the first of them.
    """
    if not dist.is_initialized():
        return False
    rank, lost = dist.get_rank(), isinstance(error, ProcessLost)
    if isinstance(error, Agreed) and rank:
        return True
    store, processes = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    own = "" if lost else str(error)
    until = time.monotonic() + HEARD_WITHIN
    elsewhere = False

    def heard() -> bool:
        nonlocal elsewhere
        others = [r for r in processes if r != rank and _told(store, "error", r)]
        said = {r: store.get(_key("error", r)).decode() for r in others}
        elsewhere = any(text == own for r, text in said.items() if r < rank) or (lost and any(said.values()))
        # The first process, which may keep the store, leaves last.
        everyone = len(others) == len(processes) - 1
        return (elsewhere and rank > 0) or (everyone and (rank > 0 or all(_told(store, "left", r) for r in others)))

    try:
        store.set(_key("error", rank), own)
        _wait(heard, until)
        store.set(_key("left", rank), "")
    except RuntimeError:  # the process that kept the store has ended
        return elsewhere or lost
    return elsewhere


def _key(kind: str, rank: int) -> str:
    return f"metapl/{kind}/{rank}"


_SAID = "metapl/said"
"""Set when what ended the run has been shown."""
