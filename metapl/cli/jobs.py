"""Runs side by side in processes of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from metapl.recipes.base import Recipe


@dataclass(frozen=True)
class Job:
    """One recipe by one method."""

    recipe: Recipe
    method: str
    folder: Path
    resume: bool

    def run(self, *, progress: bool = False, quiet: bool = True) -> dict[str, Any]:
        """Run it here; a run that is finished already only gives its result."""
        import torch

        from metapl.recipes.experiment import Experiment
        from metapl.recipes.store import describe
        from metapl.run_folder import RunFolder

        torch.set_num_threads(getattr(self.recipe, "threads", torch.get_num_threads()))
        folder = RunFolder(self.folder)
        with folder.claimed(describe(self.recipe, method=self.method), resume=self.resume):
            if (self.folder / "result.json").exists():
                return folder.read_json("result.json")
            say = _silent if quiet else _aloud
            return Experiment(self.recipe, folder, self.resume and folder.exists, progress, say).run(self.method)


def _silent(text: str) -> None:
    """Messages of a run beside others are not shown."""


def _aloud(text: str) -> None:
    print(text, flush=True)


def run_all(jobs: list[Job], workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run the jobs, ``workers`` at a time, and give each with its result as it ends.

    A worker whose parent is gone ends itself, so that a killed comparison leaves nobody writing to its folders.
    """
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            yield job, job.run()
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent, (os.getpid(),)) as pool:
        futures = {pool.submit(job.run): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _end_with_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
