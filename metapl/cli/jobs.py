"""Runs side by side in processes of their own."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError
from metapl.recipes.base import Recipe


@dataclass(frozen=True)
class Job:
    """One recipe by one method.

    Args:
        recipe, method, folder, resume: as they are run.
        threads: of the linear algebra, where the recipe does not say; None: as many as the run was started with, or
            the default of a new one.
    """

    recipe: Recipe
    method: str
    folder: Path
    resume: bool
    threads: int | None = None

    def run(self, *, progress: bool = False, quiet: bool = True) -> dict[str, Any]:
        """Run it here; a run that is finished already only gives its result."""
        import torch

        from metapl.experiments.experiment import Experiment
        from metapl.experiments.store import describe, stored_result
        from metapl.runs.folder import RunFolder

        folder = RunFolder(self.folder)
        torch.set_num_threads(getattr(self.recipe, "threads", self.threads or folder.threads()))
        with folder.claimed(describe(self.recipe, method=self.method), resume=self.resume):
            if (self.folder / "result.json").exists():
                return stored_result(folder)
            say = _silent if quiet else aloud
            return Experiment(self.recipe, folder, self.resume and folder.exists, progress, say).run(self.method)


def _silent(text: str) -> None:
    """Messages of a run beside others are not shown."""


def aloud(text: str) -> None:
    print(text, flush=True)


def run_all(jobs: Sequence[Job], workers: int) -> Generator[tuple[Job, dict[str, Any], float], None, None]:
    """Run the jobs, ``workers`` at a time, and give each with its result and the seconds it took as it ends.

    However this ends, no worker is left: where it is stopped, or a job fails, the others save the step under way and
    go; and a worker whose parent was killed ends itself, so that nobody goes on writing to the folders.

    Raises:
        MetaplError: what a job raised, or that its process was killed.
    """
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            since = time.monotonic()
            with _named(job):
                result = job.run()
            yield job, result, time.monotonic() - since
        return
    waiting = deque(jobs)
    staff = _start(min(workers, len(jobs)))
    try:
        busy = {worker: worker.take(waiting.popleft()) for worker in staff}
        while busy:
            worker = _first_ready(list(busy))
            job = busy.pop(worker)
            with _named(job):
                result = worker.result()
            seconds = time.monotonic() - worker.since
            if waiting:
                busy[worker] = worker.take(waiting.popleft())
            yield job, result, seconds
    finally:
        for worker in staff:
            worker.stop()
        for worker in staff:
            worker.wait()


@contextmanager
def _named(job: Job) -> Iterator[None]:
    """Say whose error it is."""
    try:
        yield
    except MetaplError as error:
        raise MetaplError(f"{job.method}, seed {job.recipe.seed}: {error}") from error


class _Worker:
    """A process that runs one job after another."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.since = time.monotonic()
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, os.getpid()))
        self.process.start()
        theirs.close()

    def take(self, job: Job) -> Job:
        self.link.send(job)
        self.since = time.monotonic()
        return job

    def result(self) -> dict[str, Any]:
        try:
            answer = self.link.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise MetaplError(
                f"its process ended with code {self.process.exitcode} (-9: was there too little memory?); go on with "
                "--resume."
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        result: dict[str, Any] = answer
        return result

    def stop(self) -> None:
        """Ask to save and go."""
        self.process.terminate()

    def wait(self, patience: float = 30.0) -> None:
        try:
            self.process.join(patience)
        finally:  # also when it is the user who has no more patience
            self.process.kill()
            self.process.join()


def _start(number: int) -> list[_Worker]:
    # A terminal's Ctrl-C reaches every process of the command. The parent alone decides, so workers are born without
    # hearing it; starting Python's resource tracker among them would end the deafness too early.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [_Worker() for _ in range(number)]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _first_ready(workers: list[_Worker]) -> _Worker:
    links = {worker.link: worker for worker in workers}
    return links[wait(list(links))[0]]  # type: ignore[index]  # what is waited for are these


def _work(link: Connection, parent: int) -> None:
    """A worker's life: jobs come and results or errors go, until the link is closed or the worker told to stop."""
    _end_with_parent(parent)
    while True:
        try:
            job: Job = link.recv()
        except EOFError:
            return
        try:
            answer: Any = job.run()
        except KeyboardInterrupt:  # stopped and saved
            return
        except Exception as error:
            if not isinstance(error, MetaplError):
                error.add_note(f"in {job.method}, seed {job.recipe.seed}:\n{traceback.format_exc()}")
            answer = error
        link.send(answer)


def _end_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
