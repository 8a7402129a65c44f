"""Does the teacher's feedback help on the digits? Every mode, baseline and control, tuned alike, over 20 seeds.

    python benchmarks/digits_study.py                        # tune, then run; goes on where it was stopped
    python benchmarks/digits_study.py --write-readme README.md

Each method is tuned over 12 configurations x 5 seeds by the validation accuracy of its student; the chosen one is then
run on 20 other seeds, and only these runs look at the test set, once. Every method sees the same batches from the same
initial weights for a seed. At 4 labels a class the settings tuned at 2 are used as they are, for all methods alike.
Every run is a row of the raw file, so the tables and the picture are made from it alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from metapl.baselines import LossTrainer
from metapl.losses import CrossEntropy
from metapl.recipes import Digits, Feedback, Optimizer
from metapl.recipes.base import Task
from metapl.recipes.experiment import METHODS, Experiment
from metapl.run_folder import environment

HERE = Path(__file__).parent
RAW = HERE / "results" / "digits_study.jsonl"
STEPS = 1500
TUNING_SEEDS = tuple(range(100, 105))
SEEDS = tuple(range(20))

Config = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method of the study: what it is called, which of the library's methods it is, its mode and its grid of 12."""

    title: str
    method: str
    grid: tuple[Config, ...]
    mode: str = "forward"
    labels: str | None = None
    tuned_as: str | None = None
    """The entry whose settings it takes, where it computes the same gradient."""


def _grid(**axes: tuple[Any, ...]) -> tuple[Config, ...]:
    return tuple(dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values()))


EXACT = _grid(student_lr=(0.5, 1.0), teacher_lr=(0.03, 0.06), weight=(0.3, 1.0, 3.0))
NOISY = _grid(student_lr=(0.5, 1.0), weight=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
ALONE = _grid(teacher_lr=(0.03, 0.06, 0.12, 0.25), label_smoothing=(0.0, 0.1, 0.2))
FIXED = _grid(student_lr=(0.25, 0.5, 1.0), teacher_lr=(0.06, 0.12), temperature=(0.5, 1.0))

ENTRIES: dict[str, Entry] = {
    "mpl": Entry("MPL, forward", "mpl", EXACT),
    "unrolled": Entry("MPL, unrolled", "mpl", (), mode="unrolled", tuned_as="mpl"),
    "difference": Entry("MPL, difference", "mpl", (), mode="difference", tuned_as="mpl"),
    "forward_hard": Entry("MPL, forward, hard labels", "mpl", EXACT, labels="hard"),
    "reinforce_per_example": Entry("MPL, reinforce_per_example", "mpl", EXACT, mode="reinforce_per_example"),
    "reinforce": Entry("MPL, reinforce (Algorithm 1)", "mpl", NOISY, mode="reinforce"),
    "loss_difference": Entry("MPL, loss_difference", "mpl", NOISY, mode="loss_difference"),
    "none": Entry(
        "same loop, no feedback", "none", _grid(student_lr=(0.25, 0.5, 1.0, 2.0), teacher_lr=(0.03, 0.06, 0.12))
    ),
    "supervised": Entry("supervised, labelled data only", "supervised", ALONE),
    "pseudo_labels": Entry("pseudo labels, fixed teacher, soft", "pseudo_labels", FIXED),
    "pseudo_labels_hard": Entry("pseudo labels, fixed teacher, hard", "pseudo_labels_hard", FIXED),
    "uda": Entry("UDA alone", "uda", _grid(teacher_lr=(0.03, 0.06, 0.12), uda_weight=(0.5, 1.0, 2.0, 4.0))),
    "permuted": Entry("control: feedback permuted over the batch", "permuted", EXACT),
    "class_means": Entry("control: class means of the feedback only", "class_means", EXACT),
    "random_sign": Entry("control: feedback with random signs", "random_sign", EXACT),
}
AT_FOUR = ("mpl", "none", "supervised", "pseudo_labels", "pseudo_labels_hard", "uda")


def recipe_of(entry: Entry, config: Config, seed: int, labels_per_class: int) -> Digits:
    """The digits recipe with a configuration of the grid."""
    told = Feedback(
        mode=entry.mode,  # type: ignore[arg-type]  # a name from ENTRIES
        labels=entry.labels,  # type: ignore[arg-type]  # as above
        feedback_weight=config.get("weight", 1.0),
        temperature=config.get("temperature", 1.0),
    )
    return Digits(
        seed=seed,
        labels_per_class=labels_per_class,
        steps=STEPS,
        feedback=told,
        label_smoothing=config.get("label_smoothing", 0.0),
        uda_weight=config.get("uda_weight", 0.0),
        student=Optimizer(lr=config.get("student_lr", 0.5)),
        teacher=Optimizer(lr=config.get("teacher_lr", 0.06), momentum=0.9),
        log_every=STEPS,
    )


@lru_cache(maxsize=3)
def drawn(seed: int, labels_per_class: int) -> Task:
    """The task with its batches drawn once: they are the same for every method."""
    task = Digits(seed=seed, labels_per_class=labels_per_class).task()
    return dataclasses.replace(
        task,
        labeled=[task.labeled[t] for t in range(STEPS)],
        unlabeled=[task.unlabeled[t] for t in range(STEPS)],
        finetuning=[task.finetuning[t] for t in range(200)],
        truth=None,
    )


class Study(Experiment):
    """An experiment that leaves no files."""

    def fit(self, trainer: Any, task: Any, *, unlabeled: bool = True, phase: str = "fit") -> Any:
        source = task.unlabeled if unlabeled else None
        options = self.recipe.fit_options()
        return trainer.fit(
            task.labeled, source, steps=STEPS, validation=task.validation, progress=False, phase=phase, **options
        )


def one_run(name: str, config: Config, seed: int, labels_per_class: int, final: bool) -> dict[str, Any]:
    """Train one method once; the test set is looked at in final runs only."""
    torch.set_num_threads(1)
    since = time.perf_counter()
    entry = ENTRIES[name]
    recipe = recipe_of(entry, config, seed, labels_per_class)
    torch.manual_seed(seed)
    task = drawn(seed, labels_per_class)
    run = Study(recipe, None)  # type: ignore[arg-type]  # no folder is written to
    trained, result = METHODS[entry.method](run, task, recipe.network(), recipe.network())
    row = {
        "method": name,
        "config": config,
        "seed": seed,
        "labels_per_class": labels_per_class,
        "final": final,
        "validation_accuracy": result.validation_accuracy,
    }
    if final:
        row["test_accuracy"] = trained.evaluate(task.test).accuracy
        tuner = LossTrainer(trained.student, (CrossEntropy(),), optimizer=recipe.finetune.build(trained.student))
        tuned = tuner.fit(
            task.finetuning, steps=200, validation=task.validation, validate_every=20, log_every=200, progress=False
        )
        row["finetuned_validation_accuracy"] = tuned.validation_accuracy
        row["finetuned_test_accuracy"] = tuner.evaluate(task.test).accuracy
    row["seconds"] = round(time.perf_counter() - since, 2)
    return row


# ------------------------------------------------------------------------------------------------------ running it all

Key = tuple[str, str, int, int, bool]


def _key(row: dict[str, Any]) -> Key:
    config = json.dumps(row["config"], sort_keys=True)
    return row["method"], config, row["seed"], row["labels_per_class"], row["final"]


def rows() -> list[dict[str, Any]]:
    """What has been run so far."""
    if not RAW.exists():
        return []
    return [row for line in RAW.read_text().splitlines() if "method" in (row := json.loads(line))]


def run_missing(jobs: list[tuple[str, Config, int, int, bool]], workers: int) -> None:
    """Run what the raw file does not hold yet, a row each."""
    done = {_key(row) for row in rows()}
    missing = [job for job in jobs if (job[0], json.dumps(job[1], sort_keys=True), *job[2:]) not in done]
    if not missing:
        return
    RAW.parent.mkdir(parents=True, exist_ok=True)
    if not RAW.exists():
        RAW.write_text(json.dumps({"made_with": environment(), "steps": STEPS}) + "\n")
    since = time.monotonic()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, RAW.open("a") as file:
        futures = [pool.submit(one_run, *job) for job in missing]
        for number, future in enumerate(as_completed(futures), 1):
            file.write(json.dumps(future.result()) + "\n")
            file.flush()
            if number % 20 == 0 or number == len(missing):
                print(f"{number}/{len(missing)} runs, {time.monotonic() - since:.0f} s", flush=True)


def chosen(found: list[dict[str, Any]]) -> dict[str, Config]:
    """For each method the configuration with the best mean validation accuracy over the tuning seeds."""
    best: dict[str, Config] = {}
    for name, entry in ENTRIES.items():
        if entry.grid:
            tuning = [r for r in found if r["method"] == name and not r["final"]]
            best[name] = max(
                entry.grid, key=lambda c: _mean(r["validation_accuracy"] for r in tuning if r["config"] == c)
            )
    return best | {name: best[e.tuned_as] for name, e in ENTRIES.items() if e.tuned_as is not None}


def _mean(values: Iterator[float]) -> float:
    return statistics.fmean(values)


def study(workers: int) -> None:
    """Tune every method, then run each on the seeds that nobody has looked at."""
    tuning = [
        (name, config, seed, 2, False)
        for seed in TUNING_SEEDS
        for name, entry in ENTRIES.items()
        for config in entry.grid
    ]
    print(f"tuning: {len(tuning)} runs", flush=True)
    run_missing(tuning, workers)
    best = chosen(rows())
    for name, config in best.items():
        print(f"  {name}: {config}")
    final = [(name, best[name], seed, 2, True) for seed in SEEDS for name in ENTRIES]
    final += [(name, best[name], seed, 4, True) for seed in SEEDS for name in AT_FOUR]
    print(f"final: {len(final)} runs", flush=True)
    run_missing(final, workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write-readme", type=Path, help="replace the table in this file, and draw the picture")
    parser.add_argument("--pairs", action="store_true", help="print the comparisons that the README speaks of")
    given = parser.parse_args()
    if given.pairs:
        from digits_tables import pairs

        print(pairs(rows()))
        return
    if given.write_readme is None:
        study(given.workers)
        return
    from digits_tables import write_readme

    write_readme(given.write_readme, rows())


if __name__ == "__main__":
    main()
