"""Runs side by side in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metapl.apps.errors import placed
from metapl.apps.experiments.experiment import Experiment
from metapl.apps.experiments.folder import ANOTHER, RunFolder, describe, stored_result
from metapl.apps.machine.sealed import read_sealed
from metapl.apps.recipes.base import Recipe
from metapl.apps.words import tell
from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError

PATIENCE = 30.0  # seconds that a worker has to save the step under way before it is killed


def aloud(text: str) -> None:
    tell(text, wrap=True)


@dataclass(frozen=True)
class Job:
    """One recipe by one method."""

    recipe: Recipe
    method: str
    folder: Path
    resume: bool
    threads: int | None = None  # where the recipe does not say; None: as the run was started with

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def title(self) -> str:
        return f"{self.method}, seed {self.recipe.seed}"

    def run(
        self, *, progress: bool = False, quiet: bool = True, within: RunFolder | None = None, mesh: Mesh | None = None
    ) -> dict[str, Any]:
        """Run it here, ``within`` a folder that the caller may hold already, as one of the processes of a mesh.

        A run that is finished only gives its result, if its networks are those it was of.
        """
        folder, recipe = within or RunFolder(self.folder), self.recipe.by(self.method)
        torch.set_num_threads(getattr(self.recipe, "threads", self.threads or folder.threads()))
        with folder.claimed(describe(recipe), resume=self.resume):
            say = (lambda text: None) if quiet else aloud
            experiment = Experiment(recipe, folder, self.resume and folder.exists, progress, say, mesh or Mesh())
            if not self.finished:
                return experiment.run()
            result = stored_result(folder)
            for name, sha256 in result.get("sha256", {}).items():
                if (folder.path / name).is_file():  # weights may have been removed for their room
                    read_sealed(folder.path / name, sha256, mend=ANOTHER)
            moved = any(getattr(self.recipe, name) != place for name, place in folder.places().items())
            if moved:  # are the data the same?
                experiment.record(self.recipe.task())
            return result


@dataclass(frozen=True)
class Trial:
    """The networks of a run by a method laid out, and nothing else: what cannot be cut is refused."""

    recipe: Recipe
    method: str

    def run(self, mesh: Mesh) -> None:
        """Build and lay out the networks; the default generators are put back."""
        place = self.recipe.torch_device()
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            torch.manual_seed(self.recipe.seed)
            Experiment(self.recipe.by(self.method), RunFolder(Path()), mesh=mesh).laid_out_for(place)


def run_all(
    jobs: Sequence[Job], workers: int, here: Callable[[Job], dict[str, Any]] = Job.run
) -> Generator[tuple[Job, dict[str, Any], float], None, None]:
    """Run the jobs, ``workers`` at a time, and give each with its result and the seconds it took as it ends.

    One worker is this process, where ``here`` runs a job. However this ends, no worker is left: where it is stopped, or
    a job fails, the others save the step under way and go; and a worker whose parent was killed ends itself, so that
    nobody goes on writing to the folders.
    """
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            since = time.monotonic()
            with placed(f"{job.title}: "):
                result = here(job)
            yield job, result, time.monotonic() - since
        return
    others = {*multiprocessing.active_children()}
    spawned: Any = {"mp_context": multiprocessing.get_context("spawn")}
    pool = ProcessPoolExecutor(workers, **spawned, initializer=_end_with_parent, initargs=(os.getpid(),))
    waiting = list(reversed(jobs))
    running: dict[Future[dict[str, Any]], tuple[Job, float]] = {}
    # Processes that are started in between do not get what a terminal sends to all: the parent alone decides.
    ours = {signal.SIGINT, signal.SIGHUP}
    try:
        while waiting or running:
            # No more than are run at once: a job that lies in the pool's own queue could not be taken back.
            while waiting and len(running) < workers:
                job = waiting.pop()
                signal.pthread_sigmask(signal.SIG_BLOCK, ours)
                try:
                    running[pool.submit(_run, job)] = job, time.monotonic()
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            future = done.pop()
            job, since = running.pop(future)
            with placed(f"{job.title}: "):
                result = future.result()
            yield job, result, time.monotonic() - since
    except BrokenProcessPool as error:
        names = ", ".join(sorted({job.title, *(other.title for other, _ in running.values())}))
        raise MetaplError(
            f"the process of one of these runs was killed ({names}): was there too little memory? Go on with --resume."
        ) from error
    finally:
        if running:
            _stop([child for child in multiprocessing.active_children() if child not in others])
        pool.shutdown()


def _run(job: Job) -> dict[str, Any]:
    try:
        return job.run()
    except KeyboardInterrupt:  # stopped and saved; nobody waits for the result
        return {}


def _stop(workers: Sequence[Any]) -> None:
    """Ask processes to save and go; kill those that do not."""
    for worker in workers:
        worker.terminate()
    try:
        give_up = time.monotonic() + PATIENCE
        for worker in workers:
            worker.join(max(0.0, give_up - time.monotonic()))
    finally:  # also when the user has no more patience
        for worker in workers:
            worker.kill()
            worker.join()


def _end_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
