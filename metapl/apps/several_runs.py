"""Runs by several methods with several seeds, some at a time, and their comparison."""

from __future__ import annotations

import multiprocessing
import os
import shutil
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

from metapl.apps.inputs import plural
from metapl.apps.machine import default_threads, read_sealed
from metapl.apps.methods_over_seeds import Comparison
from metapl.apps.printing import table, tell, wrapped
from metapl.apps.report import SUSPECTS, linear_baseline, write_report
from metapl.apps.run_folder import (
    ANOTHER,
    NETWORK,
    WEIGHTS,
    EndedRun,
    RunFolder,
    stored_result,
)
from metapl.apps.settings import replaced
from metapl.apps.train import describe, device, train
from metapl.errors import MetaplError

PATIENCE = 30.0  # seconds that a worker has to save the step under way before it is killed


@dataclass(frozen=True)
class Job:
    """A training by one method with one seed."""

    config: Any
    method: Any
    folder: Path
    resume: bool
    threads: int  # rounding depends on them

    @property
    def title(self) -> str:
        return f"{self.method.name}, seed {self.config.fitting.seed}"

    def run(self) -> dict[str, Any]:
        """Run it here, with a line every half minute, which names it, and no other.

        One that is finished only gives its result, if its networks are those it was of.
        """

        def say_progress(text: str) -> None:
            tell(f"{self.title}: {text}")

        folder = RunFolder(self.folder)
        torch.set_num_threads(self.config.threads or self.threads)
        try:
            with folder.claimed(describe(self.config, self.method), resume=self.resume):
                if not folder.ended:
                    return train(
                        self.config,
                        self.method,
                        folder,
                        resume=self.resume,
                        say_progress=say_progress,
                    )
                result = stored_result(folder)
                for name, sha256 in result["sha256"].items():
                    if (
                        folder.path / name
                    ).is_file():  # weights may have been removed for their room
                        read_sealed(folder.path / name, sha256, mend=ANOTHER)
                return result
        except MetaplError as error:
            raise MetaplError(f"{self.title}: {error}") from error


def train_and_compare(
    config: Any,
    methods: Mapping[str, Any],
    seeds: Sequence[int],
    folder: RunFolder,
    *,
    resume: bool,
    jobs: int | None,
) -> None:
    """Train by each method with each seed, ``jobs`` runs at a time, and compare.

    All settings are chosen.
    """
    out, names = folder.path, list(methods)
    with folder.claimed(
        describe(config, methods[names[0]], compare=names, seeds=list(seeds)), resume=resume
    ):
        if not folder.ended:
            config.data(tell, True, None)  # shows its notes once: the jobs are silent
        # 1. The runs, side by side; finished ones are not run again. Two threads add up a sum in
        # another order than one does, and round it otherwise: after one step of small_cnn the
        # weights differ already. So a job has as many threads whatever --jobs is, and when it is
        # resumed.
        on_gpu, todo, results = (
            device(config.fitting.device).type == "cuda",
            list[Job](),
            dict[tuple[str, int], Any](),
        )
        for seed in seeds:
            for name, method in methods.items():
                place = out / name / f"seed-{seed}"
                begun = resume or (place / "recipe.json").exists()
                todo.append(
                    Job(
                        replaced(config, seed=seed),
                        method,
                        place,
                        begun,
                        default_threads() if on_gpu else 1,
                    )
                )
        workers = min(jobs or (1 if on_gpu else cpu_count()), len(todo))
        tell(
            f"{plural(len(names), 'method')} x {plural(len(seeds), 'seed')}, {workers} at a time "
            f"-> {out}"
        )
        with closing(run_all(todo, workers)) as running:  # workers end before the command does
            for number, (job, result) in enumerate(running, 1):
                results[job.method.name, job.config.fitting.seed] = result
                reached = f"{result['test_accuracy']:.1%} of {result['evaluation']['n']:,}"
                tell(f"[{number:>{len(str(len(todo)))}}/{len(todo)}] {job.title}: {reached}")
        # 2. What they reach, and the networks of the one that is delivered.
        comparison = Comparison.of(tuple(seeds), names, results)
        method, seed, _ = comparison.delivered()
        source = RunFolder(out / method / f"seed-{seed}")
        for name in WEIGHTS.values():
            if (source.path / name).is_file():
                # The same weights are the same bytes: the checksums of the run hold here too.
                folder.write_weights(
                    name, source.read_weights(name, results[method, seed]["sha256"][name])
                )
        folder.write_json(NETWORK, source.read_json(NETWORK))
        if (source.path / SUSPECTS).is_file():
            shutil.copyfile(source.path / SUSPECTS, out / SUSPECTS)
        folder.write_json("result.json", {**results[method, seed], **comparison.to_json()})
        write_report(EndedRun.load(out))
        result = stored_result(folder)
    tell(f"figures, report and the delivered networks are in {out}")
    tell(f"\n{wrapped(comparison.caption())}\n\n{table(comparison.rows(), left=4)}\n")
    for text in (result["sentence"], result["delivery"], *linear_baseline(result)):
        tell(wrapped(text))


def run_all(jobs: Sequence[Job], workers: int) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    """Run the jobs, ``workers`` at a time, and give each with its result as it ends.

    One worker is this process. However this ends, no worker is left: where it is stopped, or a job
    fails, the others save the step under way and go; and a worker whose parent was killed ends
    itself, so that nobody goes on writing to the folders.
    """
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            yield job, job.run()
        return
    spawned: Any = {"mp_context": multiprocessing.get_context("spawn")}
    pool = ProcessPoolExecutor(
        workers, **spawned, initializer=_end_with_parent, initargs=(os.getpid(),)
    )
    # Processes that are started in between do not get what a terminal sends to all: the parent
    # alone decides.
    ours = {signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        running = {pool.submit(_run_apart, job): job for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)
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
        finally:  # also when the user has no more patience
            for worker in started:
                worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_stopped = False  # whether this worker was stopped, and begins no other job


def _run_apart(job: Job) -> dict[str, Any]:
    global _stopped
    try:
        return {} if _stopped else job.run()
    except KeyboardInterrupt:  # stopped and saved; nobody waits for the result
        _stopped = True
        return {}


def _end_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
