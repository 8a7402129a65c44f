"""A recipe by several methods and seeds: the runs, and what they leave together."""

from __future__ import annotations

import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from metapl.apps.errors import placed
from metapl.apps.experiments.accuracies import Comparison, seeds_in_words, with_chance
from metapl.apps.experiments.folder import NETWORK, WEIGHTS, RunFolder, describe
from metapl.apps.experiments.jobs import Job, aloud, run_all
from metapl.apps.experiments.page import mean_curves, write_page
from metapl.apps.experiments.run import EndedRun
from metapl.apps.experiments.suspects import SUSPECTS
from metapl.apps.machine.cores import available_cores, default_threads
from metapl.apps.machine.progress import duration
from metapl.apps.recipes.base import FIT_OPTIONS, Recipe, Task, rehearse
from metapl.apps.recipes.methods import called_network
from metapl.apps.reports.picture import draw_report
from metapl.metrics import Evaluation
from metapl.training import FitOptions, FitResult, Trainer


def compare(
    recipe: Recipe,
    folder: RunFolder,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    resume: bool,
    jobs: int | None,
    together: Callable[[Job], dict[str, Any]] | None = None,
) -> Comparison:
    """Train a settled recipe by each method with each seed, ``jobs`` runs at a time, and compare.

    ``together`` runs a job in all processes of a mesh; None: each job is of one process.
    """
    out = folder.path
    description = describe(recipe, compare=list(methods), seeds=list(seeds))
    with folder.claimed(description, resume=resume):
        if not (out / "result.json").exists():
            task = recipe.task(aloud, progress=True)  # shows its notes once: the jobs are silent
            for method in methods:
                check_method(recipe.by(method, seeds[0]), task)
        results = run_jobs(recipe, out, methods, seeds, resume=resume, jobs=jobs, together=together)
        folder.relocate(description["fields"])  # each run has compared the data
        comparison = Comparison.of(tuple(seeds), methods, results)
        method, seed = comparison.delivered()
        source = RunFolder(out / method / f"seed-{seed}")
        sha256 = results[method, seed].get("sha256", {})
        for name in WEIGHTS.values():
            if (source.path / name).is_file():
                # The same weights are the same bytes: the checksums of the run hold here too.
                folder.write_weights(name, source.read_weights(name, sha256.get(name)))
        folder.write_json(NETWORK, source.read_json(NETWORK))
        if (source.path / SUSPECTS).is_file():
            shutil.copyfile(source.path / SUSPECTS, out / SUSPECTS)
        folder.write_json("result.json", {**results[method, seed], **comparison.to_json()})
        run = EndedRun.load(out)
        curves = mean_curves(out, comparison, results)
        draw_report(
            out / "report.png",
            title=f"{recipe.name}: {len(methods)} methods, {seeds_in_words(len(seeds))}",
            curves=curves,
            evaluation=Evaluation(**run.result["evaluation"]),
            network=called_network(curves),
        )
        write_page(run)
    return comparison


def check_method(recipe: Recipe, task: Task) -> None:
    """Refuse options of no use together, and data that a method cannot be trained on; nothing is trained."""

    def check(trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, **options: Any) -> FitResult:
        asked = {"steps": recipe.steps, **recipe.fit_options(), **options}
        FitOptions(**{name: value for name, value in asked.items() if name in (*FIT_OPTIONS, "steps")})
        return FitResult(None, 0, {})

    with placed(f"{recipe.method.name}: "):
        student = rehearse(recipe, task, check)
        if recipe.finetune_steps:
            FitOptions(**recipe.fit_options() | recipe.finetune_options())
            recipe.finetune.build(student)


def run_jobs(
    recipe: Recipe,
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    resume: bool,
    jobs: int | None,
    together: Callable[[Job], dict[str, Any]] | None = None,
) -> dict[tuple[str, int], dict[str, Any]]:
    """The result of each method and seed, from runs side by side; finished ones are not run again."""
    on_gpu = recipe.torch_device().type == "cuda"
    at_once = 1 if on_gpu or together is not None else available_cores()
    workers = min(jobs or at_once, len(methods) * len(seeds))
    # Two threads add up a sum in another order than one does, and round it otherwise: after one step of small_cnn the
    # weights differ already. So a job has as many threads whatever --jobs is, and when it is resumed.
    threads = default_threads() if on_gpu else 1
    to_compare = []
    for seed in seeds:
        for method in methods:
            place = out / method / f"seed-{seed}"
            begun = resume or (place / "recipe.json").exists()
            to_compare.append(Job(recipe.by(method, seed), method, place, begun, threads=threads))
    words = f"{len(methods)} method{'s' if len(methods) != 1 else ''} x {seeds_in_words(len(seeds))}"
    aloud(f"{words}, {workers} at a time -> {out}")
    results = {}
    waiting, total = [job for job in to_compare if not job.finished], len(to_compare)
    times: defaultdict[str, list[float]] = defaultdict(list)
    with closing(run_all(to_compare, workers, together or Job.run)) as running:  # workers end before the command does
        for number, (job, result, seconds) in enumerate(running, 1):
            results[job.method, job.recipe.seed] = result
            if job in waiting:
                waiting.remove(job)
                times[job.method].append(seconds)
            until = ""
            if waiting and times:  # methods take times of their own, and one that is not known yet takes the mean
                means = {method: statistics.fmean(taken) for method, taken in times.items()}
                left = sum(means.get(other.method, statistics.fmean(means.values())) for other in waiting)
                until = f", about {duration(left / min(workers, len(waiting)))} left"
            on = Evaluation(**result["evaluation"])
            reached = with_chance(result["test_accuracy"], on.n, on.chance)
            aloud(f"[{number:>{len(str(total))}}/{total}] {job.title}: {reached}{until}")
    return results
