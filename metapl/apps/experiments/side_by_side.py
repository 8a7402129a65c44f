"""A recipe by several methods and seeds: the runs, and what the comparison leaves in its own folder."""

from __future__ import annotations

import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from metapl.apps.experiments.accuracies import Comparison, seeds_in_words
from metapl.apps.experiments.equal_cost import at_equal_cost
from metapl.apps.experiments.experiment import last_fit
from metapl.apps.experiments.folder import WEIGHTS, RunFolder
from metapl.apps.experiments.jobs import Job, aloud, run_all
from metapl.apps.experiments.store import describe
from metapl.apps.experiments.suspects import GRID, SUSPECTS
from metapl.apps.recipes.base import Recipe, Task, rehearse
from metapl.apps.recipes.methods import title
from metapl.errors import MetaplError
from metapl.metrics import Evaluation, with_chance
from metapl.runs.cores import available_cores, default_threads
from metapl.training import FitOptions, FitResult, Trainer
from metapl.training.progress import duration

SHOWN = 7
"""Methods that one picture can tell apart."""


def compare(
    recipe: Recipe,
    folder: RunFolder,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    resume: bool,
    jobs: int | None,
    equal_cost: bool = False,
    together: Callable[[Job], dict[str, Any]] | None = None,
) -> Comparison:
    """Train by each method with each seed, and compare.

    Args:
        recipe: settled.
        resume: go on with the comparison in the folder.
        jobs: runs at a time; None: one for each core, and one on a GPU.
        together: runs a job in all processes of a mesh; None: each job is of one process.
        equal_cost: give each method as many steps as cost what the first method costs; see
            :func:`metapl.apps.experiments.equal_cost.at_equal_cost`.
    """
    out = folder.path
    description = describe(recipe, compare=list(methods), seeds=list(seeds))
    with folder.claimed(description, resume=resume):
        sized: dict[str, Recipe] = {}
        if equal_cost or not (out / "result.json").exists():
            task = recipe.task(aloud, progress=True)  # shows its notes once: the jobs are silent
            for method in methods:
                check_method(recipe.compared(method, seeds[0]), task)
            if equal_cost:
                sized = at_equal_cost(recipe, methods, task)
                aloud(_spoken_steps(sized))
        results = run_jobs(recipe, out, methods, seeds, resume=resume, jobs=jobs, sized=sized, together=together)
        folder.relocate(description["fields"])  # each run has compared the data
        comparison = Comparison.of(tuple(seeds), methods, results)
        method, seed = comparison.delivered()
        source = RunFolder(out / method / f"seed-{seed}")
        sha256 = results[method, seed].get("sha256", {})
        for name in WEIGHTS.values():
            if (source.path / name).is_file():
                # The same weights are the same bytes: the checksums of the run hold here too.
                folder.write_weights(name, source.read_weights(name, sha256.get(name)))
        for name in (SUSPECTS, GRID):
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, out / name)
        _draw(out, comparison, results)
        folder.write_json("result.json", {**results[method, seed], **comparison.to_json()})
    return comparison


def check_method(recipe: Recipe, task: Task) -> None:
    """Refuse options that a method has no use for together, and data that it cannot be trained on; nothing is trained.

    Cost: the networks are built; the default generator is put back.

    Raises:
        MetaplError: as the run would, and which method it is.
    """

    def check(trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, **options: Any) -> FitResult:
        FitOptions(**{"steps": recipe.steps, **recipe.fit_options(), **options})
        return FitResult(None, 0, {})

    try:
        student = rehearse(recipe, task, check)
        if recipe.finetune_steps:
            FitOptions(**recipe.fit_options() | recipe.finetune_options())
            recipe.finetune.build(student)
    except MetaplError as error:
        raise MetaplError(f"{recipe.method.name}: {error}") from error


def run_jobs(
    recipe: Recipe,
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    resume: bool,
    jobs: int | None,
    sized: Mapping[str, Recipe] | None = None,
    together: Callable[[Job], dict[str, Any]] | None = None,
) -> dict[tuple[str, int], dict[str, Any]]:
    """The result of each method and seed, from runs side by side; finished ones are not run again.

    ``sized`` has the recipes of methods that take another number of steps than the recipe.
    """
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
            own = (sized or {}).get(method, recipe).compared(method, seed)
            to_compare.append(Job(own, method, place, begun, threads=threads))
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


def _spoken_steps(sized: Mapping[str, Recipe]) -> str:
    """The steps that methods take at equal cost, in words."""
    counts = ", ".join(f"{method} {recipe.steps:,}" for method, recipe in sized.items())
    rounds = [recipe.method.selection for recipe in sized.values()]
    shared = {each.first.steps for each in rounds if each is not None and each.first is not None}
    return f"steps at equal cost: {counts}" + "".join(
        f"; the first teacher of each that has one {steps:,}" for steps in shared
    )


def _draw(folder: Path, comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """``report.png`` of a comparison: curves averaged over seeds, and the confusion matrix of the method that is
    delivered, summed over them."""
    from metapl.apps.reports import draw_report

    seeds, many = comparison.seeds, len(comparison.methods)
    curves = {
        method: mean_rows([last_fit(folder / method / f"seed-{s}", results[method, s]) for s in seeds])
        for method in list(comparison.methods)[:SHOWN]
    }
    # Methods of equal cost have numbers of steps of their own: what is one cost is drawn in one place.
    along = "step"
    if len({result["steps"] for result in results.values()}) > 1:
        along = "% of the steps"
        for rows in curves.values():
            last = rows[-1]["step"] if rows else 1
            rows[:] = [{**row, "step": 100 * row["step"] / last} for row in rows]
    first, _ = comparison.delivered()
    evaluations = [results[first, seed]["evaluation"] for seed in seeds]
    together = ", all seeds together" if len(seeds) > 1 else ""
    left_out = f" The curves are of the first {SHOWN} methods." if many > SHOWN else ""
    draw_report(
        folder / "report.png",
        title=f"{results[first, seeds[0]]['recipe']}: {many} method{'s' if many != 1 else ''}, "
        f"{seeds_in_words(len(seeds))}{' (means)' if len(seeds) > 1 else ''}",
        curves=curves,
        confusion=np.sum([evaluation["confusion"] for evaluation in evaluations], axis=0).tolist(),
        classes=evaluations[0]["classes"],
        summary=f"{comparison.sentence()} Confusion: {title(first)}{together}.{left_out}",
        along=along,
    )


def mean_rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """Rows averaged over runs, step by step, of the figures that every run has there.

    >>> mean_rows([[{"step": 1, "x": 1.0}], [{"step": 1, "x": 3.0}]])
    [{'step': 1, 'x': 2.0}]
    """
    by_step: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for rows in runs:
        for row in rows:
            by_step[row["step"]].append(row)
    found = []
    for step, rows in sorted(by_step.items()):
        if len(rows) == len(runs):
            names = [k for k in rows[0] if k != "step" and all(isinstance(row.get(k), float) for row in rows)]
            found.append({"step": step, **{name: sum(row[name] for row in rows) / len(rows) for name in names}})
    return found
