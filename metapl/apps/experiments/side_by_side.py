"""A recipe by several methods and seeds: the runs, the steps that cost the same, and what they leave together."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metapl.ablation.cost import flops
from metapl.apps.errors import placed
from metapl.apps.experiments.accuracies import Comparison, seeds_in_words, with_chance
from metapl.apps.experiments.experiment import last_fit
from metapl.apps.experiments.folder import WEIGHTS, RunFolder, describe
from metapl.apps.experiments.galleries import GRID, SUSPECTS
from metapl.apps.experiments.jobs import Job, aloud, run_all
from metapl.apps.machine.cores import available_cores, default_threads
from metapl.apps.machine.progress import duration
from metapl.apps.recipes.base import FIT_OPTIONS, Recipe, Task, rehearse
from metapl.apps.recipes.methods import EVERY_METHOD, called_network, title
from metapl.apps.recipes.methods.noisy_student import FINETUNED, FIRST, first_teacher
from metapl.apps.recipes.settings import SelfTraining
from metapl.execution.batch import to_device
from metapl.metrics import Evaluation
from metapl.problems.losses import UDA
from metapl.training import FitOptions, FitResult, Trainer

SHOWN = 7  # methods that one picture can tell apart
SHARES = ("wait", "warmup", "uda_ramp", "uda_start")  # fields that count steps, and become more or fewer with them


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
    """Train a settled recipe by each method with each seed, ``jobs`` runs at a time, and compare.

    At ``equal_cost`` each method takes as many steps as cost what the first one costs; see :func:`at_equal_cost`.
    ``together`` runs a job in all processes of a mesh; None: each job is of one process.
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
                counts = ", ".join(f"{method} {own.steps:,}" for method, own in sized.items())
                rounds = [own.method.selection for own in sized.values()]
                shared = {each.first.steps for each in rounds if each is not None and each.first is not None}
                first = "".join(f"; the first teacher of each that has one {steps:,}" for steps in shared)
                aloud(f"steps at equal cost: {counts}{first}")
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
    sized: Mapping[str, Recipe],
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
            own = sized.get(method, recipe).compared(method, seed)
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


def _draw(folder: Path, comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> None:
    """``report.png``: curves averaged over seeds, and the delivered method's confusion matrix, summed over them."""
    from metapl.apps.reports import draw_report

    seeds, many = comparison.seeds, len(comparison.methods)
    curves, along = mean_curves(folder, comparison, results)
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
        network=called_network(curves),
    )


def mean_curves(
    folder: Path, comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]]
) -> tuple[dict[str, list[dict[str, float]]], str]:
    """The rows of the first methods, averaged over seeds, and what their steps are counted in."""
    curves = {
        method: mean_rows([last_fit(folder / method / f"seed-{s}", results[method, s]) for s in comparison.seeds])
        for method in list(comparison.methods)[:SHOWN]
    }
    # Methods of equal cost have numbers of steps of their own: what is one cost is drawn in one place.
    if len({result["steps"] for result in results.values()}) == 1:
        return curves, "step"
    for rows in curves.values():
        last = rows[-1]["step"] if rows else 1
        rows[:] = [{**row, "step": 100 * row["step"] / last} for row in rows]
    return curves, "% of the steps"


def mean_rows(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """Rows averaged over runs, step by step, of the figures that every run has there.

    >>> mean_rows([[{"step": 1, "x": 1.0}], [{"step": 1, "x": 3.0}]])
    [{'step': 1, 'x': 2.0}]
    """
    by_step: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in (row for rows in runs for row in rows):
        by_step[row["step"]].append(row)
    found = []
    for step, rows in sorted(by_step.items()):
        if len(rows) == len(runs):
            names = [k for k in rows[0] if k != "step" and all(isinstance(row.get(k), float) for row in rows)]
            found.append({"step": step, **{name: sum(row[name] for row in rows) / len(rows) for name in names}})
    return found


# ----------------------------------------------------------------------------------------------------------- equal cost


def operations(recipe: Recipe, method: str, task: Task) -> float:
    """Floating-point operations of products and convolutions in all steps of a method, its earlier phases included.

    Cost: a step of each kind in each phase; the default generator is put back. Passes that label, validate and test are
    not counted, and neither are finetunings: their steps are the recipe's, whatever the steps of the method are.
    """
    return sum(_by_phase(recipe, method, task).values())


def _by_phase(recipe: Recipe, method: str, task: Task) -> dict[str, float]:
    """:func:`operations` of each phase by its name."""
    spent: defaultdict[str, float] = defaultdict(float)

    def count(
        trainer: Trainer, labeled: Any, unlabeled: Any, task: Task, *, phase: str = "fit", **over: Any
    ) -> FitResult:
        if not phase.endswith(FINETUNED):
            firsts = [None if source is None else source[0] for source in (labeled, unlabeled)]
            batches = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: to_device(t, trainer.device), firsts)
            for first, last, step in kinds_of_steps(trainer, over.get("steps", recipe.steps), over.get("wait", 0)):
                trainer.steps_done = first
                spent[phase] += (last - first) * flops(partial(step, *batches))
        return FitResult(None, 0, {})

    rehearse(recipe.compared(method, recipe.seed), task, count, recipe.torch_device())
    return spent


def kinds_of_steps(trainer: Any, steps: int, wait: int) -> list[tuple[int, int, Any]]:
    """First and last step of each kind, and what does it: they differ while a student waits, and before UDA begins."""
    waits = min(wait, steps) if trainer.teacher is not None else 0
    losses: Any = getattr(trainer, "teacher_losses", None) or getattr(trainer, "losses", ())
    ends = sorted({0, waits, steps, *(min(loss.start, steps) for loss in losses if isinstance(loss, UDA))})
    return [(a, b, trainer.teacher_step if a < waits else trainer.step) for a, b in pairwise(ends)]


def at_equal_cost(recipe: Recipe, methods: Sequence[str], task: Task) -> dict[str, Recipe]:
    """For each method the recipe with which it costs what the first one costs with the recipe as it is.

    The first teacher, of methods that have one, is trained alike in all of them, as in the first of these methods. What
    is left of the cost decides the steps of the rest. So for the same seed all of them learn from the same labels.
    """
    costs: dict[str, dict[str, float]] = {}
    for method in methods:
        with placed(f"{method}: "):
            costs[method] = _by_phase(recipe, method, task)
    totals = {method: sum(cost.values()) for method, cost in costs.items()}

    def sized(method: str, cost: float, own: float) -> Recipe:
        return with_steps(recipe.compared(method, recipe.seed), max(1, round(cost / own * recipe.steps)))

    whole = totals[methods[0]]
    found = {method: sized(method, whole, total) for method, total in totals.items()}
    teaching = [method for method in methods if EVERY_METHOD[method].selects]
    for method in teaching:
        shared, taught = first_teacher(found[teaching[0]])[1], costs[method][FIRST]
        rest = sized(method, whole - taught * shared.steps / recipe.steps, totals[method] - taught)
        rounds: Any = rest.method.selection
        found[method] = rest.with_method(self_training=dataclasses.replace(rounds, first=shared))
    return found


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps, and its phases, warm starts and validations in proportion."""
    share, rounds = steps / recipe.steps, recipe.method.selection
    fields, of_method = (
        dict[str, Any]({name: round(share * value) for name in SHARES if (value := getattr(one, name, None))})
        for one in (recipe, recipe.method)
    )
    if "wait" in of_method:
        of_method["wait"] = min(of_method["wait"], steps - 1)
    if isinstance(rounds, SelfTraining) and rounds.warm_steps is not None:
        warm = max(1, round(share * rounds.warm_steps))
        of_method["self_training"] = dataclasses.replace(rounds, warm_steps=warm)
    every = max(1, round(share * recipe.validate_every))
    method = dataclasses.replace(recipe.method, **of_method)
    return dataclasses.replace(recipe, **fields, steps=steps, validate_every=every, method=method)
