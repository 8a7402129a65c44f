"""Processes that ``torchrun`` has started, as the command joins them: who leads, and who says what went wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from metapl.apps.words import tell
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError
from metapl.execution.ranks import Agreed

PATIENCE = timedelta(minutes=10)  # for which a process waits for another one before it gives up
HEARD_WITHIN = 3.0  # seconds in which processes that fail together hear of each other
SAID_WITHIN = 5.0  # seconds for which a process that has nothing to say waits for another one to say what went wrong


class ProcessLost(MetaplError):
    """Another process has ended, or does not answer."""


def program() -> str:
    """What this command was started with, for a line that starts it again."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return "metapl"
    here = os.environ.get("LOCAL_WORLD_SIZE") == count
    return f"torchrun {f'--nproc-per-node={count}' if here else '...'} -m metapl.apps"


def is_first() -> bool:
    """Whether this process is the one that shows and writes."""
    return os.environ.get("RANK", "0") == "0"


def left_to_first() -> int:
    """The exit code of a process whose error the first one finds too, and says, before they have joined: under
    ``torchrun`` when that has ended, or some seconds later, for all are ended when one leaves."""
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        ended.wait(SAID_WITHIN)
    return 2


def check_alone(program: str) -> None:
    """Refuse a command of one process that ``torchrun`` has started in several."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1":
        raise MetaplError(
            f"torchrun has started {count} processes of {program}, which takes one; start it without torchrun: "
            f"{program} ..."
        )


def check_started(mesh: Mesh) -> None:
    """Refuse a mesh that is not of the processes that were started."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if mesh.size == count:
        return
    if mesh.size == 1:
        raise MetaplError(
            f"{count} processes were started, and no mesh says what each of them does; give --mesh.replicate {count}, "
            f"which shares the batches among them, or --mesh.shard {count}, which shares the weights too."
        )
    product = " x ".join(f"--mesh.{name} {size}" for name, size in asdict(mesh).items() if size > 1)
    others = "" if count == 1 else f", or give a mesh of {count}"
    raise MetaplError(
        f"the mesh is of {mesh.size} processes ({product}) and {count} {'was' if count == 1 else 'were'} started; "
        f"expected as many. Start them with: torchrun --nproc-per-node={mesh.size} -m metapl.apps ...{others}"
    )


@contextmanager
def joined(mesh: Mesh, device: torch.device) -> Iterator[int]:
    """Join the processes of a mesh for this block; yields this one's number, of which 0 shows and writes."""
    if mesh.size == 1:
        yield 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with lost_processes_explained():
        try:
            untyped: Any = dist
            store, rank, size = next(untyped.rendezvous("env://", timeout=PATIENCE))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
                # The store of torchrun outlives a restart, and a process might find there where a killed one was. On
                # several machines each has restarts of its own to count.
                store = untyped.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        except ValueError as error:  # of the variables that say where the processes meet
            raise MetaplError(
                f"process {os.environ.get('RANK', '?')} of {mesh.size} does not know where the others are: {error}. "
                f"Start all with: torchrun --nproc-per-node={mesh.size} -m metapl.apps ..."
            ) from error
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


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
        self._others_wait = False
        from_first(work)
        yield
        self._others_wait = dist.is_initialized()

    def end(self, code: int) -> None:
        """Let the others go, if they wait, with this exit code."""
        if self._others_wait:
            self._others_wait = False
            from_first(code)


def run_together(mesh: Mesh, device: torch.device, lead: Callable[[], int], beside: Callable[[], int]) -> int:
    """Join the processes of a mesh and run a command in all of them, ``lead`` in the first and ``beside`` in each other
    one; what goes wrong is said by one. Returns the exit code."""
    with joined(mesh, device) as rank:
        try:
            with lost_processes_explained():
                code = beside() if rank else lead()
        except MetaplError as error:
            if not dist.is_initialized():
                raise
            _end(rank, error)
            return 2
        if rank and code == 2:
            _end(rank, None)
        return code


@contextmanager
def lost_processes_explained() -> Iterator[None]:
    """Raise :class:`ProcessLost` where an exchange failed because another process has ended, or does not answer."""
    try:
        yield
    except (RuntimeError, KeyboardInterrupt) as error:
        cause: BaseException | None = error
        # torchrun's SIGTERM may come while the error of an exchange unwinds.
        while isinstance(error, KeyboardInterrupt) and cause is not None and not _of_an_exchange(cause):
            cause = cause.__context__
        if cause is None or not _of_an_exchange(cause):
            raise
        minutes = PATIENCE.total_seconds() / 60
        why = (
            f"has not answered for {minutes:g} minutes, so the run was ended: does it hang, or read from a slow disk?"
            if "timed out" in str(cause).lower() or "timeout" in str(cause).lower()
            else "of this run has ended; its own message, or that of torchrun, says why."
        )
        raise ProcessLost(f"another process {why} Go on with --resume.") from cause


def _of_an_exchange(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))


def _end(rank: int, error: MetaplError | None) -> None:
    """Show what ended the run, in one process, and leave when it is shown: the first one's error, if it has one, or
    else another's; that a process was lost only where nobody has another error. None: the first process says it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends to all as soon as one has failed
    store: Any = dist.distributed_c10d._get_default_store()
    lost, quiet = isinstance(error, ProcessLost), error is None or (isinstance(error, Agreed) and rank > 0)

    def wait_for(keys: list[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.02)

    try:
        if not quiet and (rank or lost):
            wait_for(["metapl/says"], HEARD_WITHIN + lost)
        speaks = not quiet and store.add("metapl/says", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        speaks = not quiet and not lost
    if speaks:
        sys.stdout.flush()
        tell(f"metapl: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr, wrap=True)
    with suppress(RuntimeError):
        if speaks:
            store.set("metapl/said", "")
        wait_for(["metapl/said"], SAID_WITHIN)
        store.set(f"metapl/gone/{rank}", "")
        if not rank:  # which may keep the store
            wait_for([f"metapl/gone/{r}" for r in range(dist.get_world_size())], HEARD_WITHIN)
