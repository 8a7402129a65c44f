"""Runs by several methods with several seeds, some at a time, and their comparison."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count

from metapl.apps.compare_runs import comparison_of
from metapl.apps.inputs import plural
from metapl.apps.methods.base import Method, TrainingConfig
from metapl.apps.printing import tell
from metapl.apps.settings import with_flags
from metapl.apps.train import describe, train
from metapl.errors import MetaplError
from metapl.machine import default_threads, device
from metapl.run_folder import RunFolder, stored_result

# Seconds that a worker has to save the step under way before it is killed.
PATIENCE = 30.0


@dataclass(frozen=True)
class Job:
    """A training by one method with one seed.

    Args:
        config, method: all of whose settings are chosen.
        folder: of the run.
        resume: go on with what is there.
        threads: of the linear algebra, on whose number rounding depends.
        command: what starts the comparison, for the record.
    """

    config: TrainingConfig
    method: Method
    folder: Path
    resume: bool
    threads: int
    command: str | None = None

    @property
    def title(self) -> str:
        """Return what the run is called in messages."""
        return f"{self.method.name}, seed {self.config.fitting.seed}"

    def run(self) -> dict[str, Any]:
        """Run it in this process, and return what its result.json holds.

        It says a line every half minute, which names the run, and nothing else. A run that has
        ended only gives its result.
        """
        folder = RunFolder(self.folder)
        folder.command = self.command
        torch.set_num_threads(self.config.threads or self.threads)
        try:
            with folder.claimed(describe(self.config, self.method), resume=self.resume):
                if folder.ended:
                    return stored_result(folder)
                return train(
                    self.config,
                    self.method,
                    folder,
                    resume=self.resume,
                    say_progress=self._say_progress,
                )
        except MetaplError as error:
            raise MetaplError(f"{self.title}: {error}") from error

    def _say_progress(self, text: str) -> None:
        tell(f"{self.title}: {text}")


def train_and_compare(
    config: TrainingConfig,
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    folder: RunFolder,
    *,
    resume: bool,
    jobs: int | None,
) -> None:
    """Train by each method with each seed, and compare what they reach.

    Args:
        config: what is trained on; all settings are chosen.
        methods: by their names.
        seeds: of the runs of each method.
        folder: of the comparison; each run has a folder METHOD/seed-N in it.
        resume: go on with the runs that are there.
        jobs: runs at a time; None: one a core, or one on a GPU.
    """
    # This shows the notes on the data once, for the jobs are silent.
    config.data(tell, progress=True, log=None)
    run_queue(jobs_of(config, methods, seeds, folder, resume=resume), folder, jobs=jobs)
    tell(f"the runs, each with its networks and its report, are in {folder.path}\n")
    tell(comparison_of([folder.path]))


def jobs_of(
    config: TrainingConfig,
    methods: Mapping[str, Method],
    seeds: Sequence[int],
    folder: RunFolder,
    *,
    resume: bool,
) -> list[Job]:
    """Return the runs of a comparison, seed by seed."""
    # Two threads add up a sum in another order than one does, and round it otherwise: after one
    # step of small_cnn the weights differ already. So a job has as many threads whatever --jobs is,
    # and when it is resumed.
    threads = default_threads() if is_on_gpu(config) else 1
    queue = []
    for seed in seeds:
        seeded = with_flags(config, seed=seed)
        for name, method in methods.items():
            place = folder.path / name / f"seed-{seed}"
            has_begun = (place / "recipe.json").exists()
            queue.append(
                Job(
                    config=seeded,
                    method=method,
                    folder=place,
                    resume=resume or has_begun,
                    threads=threads,
                    command=folder.command,
                )
            )
    return queue


def is_on_gpu(config: TrainingConfig) -> bool:
    """Return whether a training takes a GPU."""
    return device(config.fitting.device).type == "cuda"


def run_queue(queue: Sequence[Job], folder: RunFolder, *, jobs: int | None) -> None:
    """Run what has not ended, and say what each run reached."""
    usual_jobs = 1 if is_on_gpu(queue[0].config) else cpu_count()
    workers = min(jobs or usual_jobs, len(queue))
    methods = {job.method.name for job in queue}
    seeds = {job.config.fitting.seed for job in queue}
    tell(
        f"{plural(len(methods), 'method')} x {plural(len(seeds), 'seed')}, {workers} at a time "
        f"-> {folder.path}"
    )
    width = len(str(len(queue)))
    # The workers end before the command does.
    with closing(run_all(queue, workers)) as running:
        for number, (job, result) in enumerate(running, 1):
            reached = f"{result['test_accuracy']:.1%} of {result['evaluation']['n']:,}"
            tell(f"[{number:>{width}}/{len(queue)}] {job.title}: {reached}")


def run_all(jobs: Sequence[Job], workers: int) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    """Run the jobs, ``workers`` at a time, and yield each with its result as it ends.

    One worker is this process. However this ends, no worker is left: where it is stopped, or a job
    fails, the others save the step under way and go; and a worker whose parent was killed ends
    itself, so that nobody goes on writing to the folders.
    """
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            yield job, job.run()
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
        initargs=(os.getpid(),),
    )
    # Processes that are started while these signals are blocked do not get what a terminal sends to
    # all of its processes: the parent alone decides.
    signals_of_terminal = {signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals_of_terminal)
    try:
        running = {pool.submit(_run_apart, job): job for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals_of_terminal)
    started = [*pool._processes.values()]
    try:
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool as error:
        fault = "the process of one of the runs was killed"
        raise MetaplError(f"{fault}: was there too little memory? Go on with --resume.") from error
    except BaseException:
        # Ask them to save and go; kill those that do not.
        for worker in started:
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        give_up = time.monotonic() + PATIENCE
        try:
            for worker in started:
                worker.join(max(0.0, give_up - time.monotonic()))
        finally:
            # Also when the user stops this a second time.
            for worker in started:
                worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# Whether this worker was stopped, and begins no other job.
_is_stopped = False


def _run_apart(job: Job) -> dict[str, Any]:
    """Run a job in a worker; one that is stopped saves its step and returns nothing."""
    global _is_stopped
    if _is_stopped:
        return {}
    try:
        return job.run()
    except KeyboardInterrupt:
        # Nobody waits for the result.
        _is_stopped = True
        return {}


def _end_with_parent(parent: int) -> None:
    """End this worker when the process that started it has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
