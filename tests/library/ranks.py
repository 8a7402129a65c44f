"""Fresh processes that stand for the ranks of a distributed run.

They run one function after another.

If one of them dies or hangs, the test that it was asked for fails, and the next one begins with new
ones.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# How long a rank may take to answer, on a machine that is busy with other work.
SECONDS = 300.0


class Hung(AssertionError):
    """A rank did not answer in time.

    It waits for another one that exchanges something else, or nothing.
    """


class Ranks:
    """Processes in one process group.

    Args:
        number: of them.
        cases: the module whose functions they run.
        joined: whether they have joined the group; else they find what ``torchrun`` tells its
            processes.
    """

    def __init__(self, number: int, cases: str = "sharded_cases", *, joined: bool = True) -> None:
        self.number = number
        self.cases = cases
        self.joined = joined
        self.folder: Any = None
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self.folder.name) / "meeting") if self.joined else _free_port()
        for rank in range(self.number):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, rank, self.number, meeting, self.cases)
            process = spawn.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, name: str, **arguments: Any) -> list[Any]:
        """Return what a function of that module returns on every rank."""
        if not self.pipes:
            self.start()
        # Of processes that meet anew each time, one might find the meeting place of the last time
        # still open.
        port = _free_port()
        answers = []
        try:
            for pipe in self.pipes:
                pipe.send((name, arguments, port))
            for rank, pipe in enumerate(self.pipes):
                if not pipe.poll(SECONDS):
                    raise Hung(
                        f"rank {rank} of {self.number} did not answer to {name} in {SECONDS:.0f} s"
                    )
                answers.append(pipe.recv())
        except (Hung, EOFError, OSError):
            self.close()
            raise
        failed = [text for text, _ in answers if text is not None]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self.pipes = []
        self.processes = []
        if self.folder is not None:
            self.folder.cleanup()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _serve(pipe: Connection, rank: int, number: int, meeting: str | int, module: str) -> None:
    """Join the group, and run what is sent, in a process of its own.

    Args:
        pipe, rank, number: to whom it answers, and which of how many it is.
        meeting: a file to meet in, or the port of ``torchrun``.
        module: whose functions it runs.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # What is imported stays, and need not be collected.
    gc.disable()
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    if isinstance(meeting, str):
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=number
        )
    else:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting)}
    cases = importlib.import_module(module)
    gc.enable()
    while (task := pipe.recv()) is not None:
        name, arguments, port = task
        if not isinstance(meeting, str):
            os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send((None, getattr(cases, name)(**arguments)))
        except Exception:
            pipe.send((f"rank {rank}: {traceback.format_exc()}", None))
    if dist.is_initialized():
        dist.destroy_process_group()
    # Not through the end of the interpreter: a thread of gloo that lets go of a tensor there,
    # waiting for Python's lock, is ended inside C++, which calls std::terminate.
    os._exit(0)
