"""Is the feedback worth its time on pictures? `metapl train images` at equal time: UDA and Meta Pseudo Labels.

    python -m benchmarks.pictures.feedback --costs      # seconds of a step, on an idle core; the first time counts
    python -m benchmarks.pictures.feedback --tune       # equally many configurations for each method
    python -m benchmarks.pictures.feedback --minutes 3  # what was chosen, on other seeds; 3, 10 and 30
    python -m benchmarks.pictures.feedback --unseen --costs         # the same on the unseen half: costs, then runs
    python -m benchmarks.pictures.feedback --unseen --minutes 10
    python -m benchmarks.pictures.feedback --write benchmarks/results/pictures_feedback.md

Three problems of the seen half, with 2,000 unlabeled pictures each. Tuning runs take seed 0 and 1.5 minutes of one
core, final runs seeds 1 to 3. The steps of a run are those that its minutes have room for by the costs in the raw file:
all configurations were measured in turn, so that a busy machine favors none. Runs that are there are not repeated. A
method's configuration is the one with the best mean over the problems of what it delivers. The arm without feedback has
the settings of the one with feedback, and is not tuned by itself. UDA is also run as it is: the default of the command.

The unseen half has the same arms on pictures of a seed of its own, with as many unlabeled pictures as the problem has.
**Its primary test, written before it was opened: Meta Pseudo Labels minus the same without feedback at 10 minutes, a
sign-flip test over the nine problems, at 5 %.** All else there is descriptive: Meta Pseudo Labels minus tuned UDA, and
tuned UDA minus UDA as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, Row, append, go_on, grid, read, show
from benchmarks.pictures.drawing import Problem
from benchmarks.pictures.problems import half, make, named
from benchmarks.pictures.run import configured, quiet, run
from benchmarks.pictures.tables import TITLES as DEFAULTS
from metapl.apps.look import REHEARSED, seconds_per_step, settled
from metapl.metrics import paired_test

RAW = RESULTS / "pictures_feedback.jsonl"
TITLES = DEFAULTS | {"uda": "UDA"}  # "as it is" is the default, half aligned
PROBLEMS, UNLABELED = ("arrows", "digits", "textures"), 2000
UNSEEN = tuple(problem.name for problem in half("unseen"))
TUNING_SEED, SEEDS, TUNING_MINUTES = 0, (1, 2, 3), 1.5
UNSEEN_SEED = 1  # earlier openings of the unseen half had the pictures of seed 0
QUALITIES = ("labels_right", "frequency_error")
USED = 0.85  # share of the minutes that steps get, as in the recipe; the rest is for finetuning and looking

HEARD: Row = {"feedback_ratio": 0.3}
TOGETHER: Row = {"wait": 0, "warm_start": False, **HEARD}
FROM_THE_START: Row = {**TOGETHER, "uda_start": 0}
CONFIGURATIONS: dict[str, dict[str, Row]] = {
    "uda": {
        "as it is": {},
        "UDA from the start": {"uda_start": 0},
        "half the rate": {"lr": 0.005},
        "threshold 0.7": {"uda_threshold": 0.7},
        "threshold 0.5": {"uda_threshold": 0.5},
        "threshold 0.7, twice the rate": {"uda_threshold": 0.7, "lr": 0.02},
        "threshold 0.7, whole alignment": {"uda_threshold": 0.7, "uda_align": 1.0},
        "threshold 0.7, 64 unlabeled": {"uda_threshold": 0.7, "unlabeled_batch": 64},
    },
    "mpl": {
        "as it was": {},
        "together": TOGETHER,
        "together, UDA from the start": FROM_THE_START,
        "together, UDA from the start, SGD": FROM_THE_START | {"sgd": True},
        "ratio 0.3": HEARD,
        "ratio 0.3, from half, student's rate 0.002": HEARD | {"wait": 0.5, "student_lr": 0.002},
        "ratio 0.3, student's rate 0.002, constant rates": HEARD | {"student_lr": 0.002, "schedule": "constant"},
        "ratio 0.3, from nine tenths, threshold 0.7": HEARD | {"wait": 0.9, "uda_threshold": 0.7},
    },
}
UNFED = {  # what the loop without feedback takes of the configurations with feedback
    label: {name: value for name, value in settings.items() if name not in ("feedback_ratio", "feedback_weight")}
    for label, settings in CONFIGURATIONS["mpl"].items()
}
EVERY = CONFIGURATIONS | {"none": UNFED}

EVERY_ARM = [(method, label) for method, labels in EVERY.items() for label in labels]
ARMS = [arm for arm in EVERY_ARM if arm[0] != "none"]
AS_IT_IS = ARMS[0]


def at_size(name: str) -> Problem:
    """Of the seen half with more unlabeled pictures than there."""
    found = named(name)
    return dataclasses.replace(found, unlabeled=UNLABELED) if found.half == "seen" else found


def costs(names: Iterable[str], arms: list[tuple[str, str]]) -> Row:
    """Seconds of a step of each configuration on each problem: of UDA as it is, the median of five rounds; of others,
    this times the median of the ratios in a round."""
    torch.set_num_threads(1)
    found: Row = {}
    for name in names:
        with TemporaryDirectory() as folder:
            make(dataclasses.replace(named(name), unlabeled=200, test=100), 0, Path(folder) / "pictures")
            complete = {}
            for method, label in arms:
                asked = at(EVERY[method][label], REHEARSED) | {"steps": REHEARSED, "precision": "bfloat16"}
                complete[method, label] = settled(*configured(Path(folder) / "pictures", method, asked), quiet)
            taken: dict[tuple[str, str], list[float]] = {which: [] for which in complete}
            for _ in range(5):
                for which, settings in complete.items():
                    taken[which].append(seconds_per_step(*settings, time.process_time))
        usual = taken["uda", "as it is"]
        for (method, label), seconds in taken.items():
            ratio = statistics.median(np.divide(seconds, usual).tolist())
            found.setdefault(name, {}).setdefault(method, {})[label] = statistics.median(usual) * ratio
    return found


def at(settings: Row, steps: int) -> Row:
    """The settings with --wait in steps; CONFIGURATIONS has its share of them."""
    return {name: round(value * steps) if name == "wait" else value for name, value in settings.items()}


def steps_of(costs: Row, name: str, method: str, label: str, minutes: float) -> int:
    return int(USED * 60 * minutes / costs[name][method][label])


def one(problem: str, method: str, configuration: str, seed: int, minutes: float, costs: Row) -> Row:
    """A run as a row."""
    settings = EVERY[method][configuration]
    steps = steps_of(costs, problem, method, configuration, minutes)
    settings = at(settings, steps) | {"steps": steps}
    return {"settings": settings, **run(at_size(problem), method, seed, minutes, settings)}


def costs_in(rows: list[Row]) -> Row:
    """The costs of all configurations, each as it was measured first, on a machine as fast as it was the first time: by
    what UDA as it is took then and now on the same problem, or on one that was measured along with it."""
    found: Row = {}
    for row in rows:
        usual = {name: methods["uda"]["as it is"] for name, methods in row.get("costs", {}).items()}
        again = {name: found[name]["uda"]["as it is"] / seconds for name, seconds in usual.items() if name in found}
        for name, methods in row.get("costs", {}).items():
            as_first = again.get(name, statistics.fmean(again.values()) if again else 1.0)
            for method, labels in methods.items():
                mine = found.setdefault(name, {}).setdefault(method, {})
                mine |= {label: seconds * as_first for label, seconds in labels.items() if label not in mine}
    return found


def runs_in(rows: list[Row], seeds: tuple[int, ...], which: str = "seen") -> list[Row]:
    return [row for row in rows if row.get("seed") in seeds and row["half"] == which]


def chosen(rows: list[Row], method: str) -> str:
    """The configuration with the best mean over the problems."""
    method = "mpl" if method == "none" else method
    reached: dict[str, list[float]] = {}
    for row in runs_in(rows, (TUNING_SEED,)):
        if row["method"] == method:
            reached.setdefault(row["configuration"], []).append(accuracy(row))
    return max(reached, key=lambda label: statistics.fmean(reached[label]))


def final_arms(rows: list[Row]) -> list[tuple[str, str]]:
    return [AS_IT_IS, *((method, chosen(rows, method)) for method in ("uda", "mpl", "none"))]


def accuracy(row: Row) -> float:
    """Test accuracy of the network that the run delivers, in %."""
    return 100 * float(row[f"{row['delivered']}_test_accuracy"])


def jobs(rows: list[Row], minutes: float | None, unseen: bool) -> list[Row]:
    """The tuning runs; with minutes, the final ones: seed by seed, the primary test first."""
    arms = final_arms(rows) if minutes else ARMS
    wanted = [
        {"problem": name, "method": method, "configuration": label, "seed": seed, "minutes": minutes or TUNING_MINUTES}
        for seed in ((UNSEEN_SEED,) if unseen else SEEDS if minutes else (TUNING_SEED,))
        for name in (UNSEEN if unseen else PROBLEMS)
        for method, label in arms
    ]
    return sorted(wanted, key=lambda job: (job["seed"], job["method"] == "uda", job["configuration"] == AS_IT_IS[1]))


def of_arm(rows: list[Row], method: str, label: str) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["configuration"] == label]


def called(method: str, label: str) -> tuple[str, str]:
    return TITLES[method], label.removeprefix("ratio 0.3, ") if method == "none" else label  # which has no feedback


def table(rows: list[Row]) -> str:
    """The tuning runs, and the final ones of seeds whose runs are all there."""
    lines = []
    for method, label in ARMS:
        mine = of_arm(runs_in(rows, (TUNING_SEED,)), method, label)
        reached = {row["problem"]: accuracy(row) for row in mine}
        if reached.keys() >= {*PROBLEMS}:
            values = [*(reached[name] for name in PROBLEMS), statistics.fmean(reached.values())]
            values += [100 * statistics.fmean(row[name] for row in mine) for name in QUALITIES]
            # As it was set; rows of 0.2 have what was measured, at the teacher's outputs.
            sizes = [row.get("feedback_ratio", row["settings"].get("feedback_ratio", math.nan)) for row in mine]
            fed = f"{statistics.fmean(sizes):.2f}" if method == "mpl" else "–"
            lines.append([TITLES[method], label, *(f"{value:.1f}" for value in values), fed])
    tuning = grid(["method", "configuration", *PROBLEMS, "mean", "right", "off", "ratio"], lines, names=2)
    lines = []
    for minutes in sorted({row["minutes"] for row in runs_in(rows, SEEDS)}):
        of_seeds = [[row for row in runs_in(rows, (seed,)) if row["minutes"] == minutes] for seed in SEEDS]
        for method, label in final_arms(rows):
            of_seed = (of_arm(mine, method, label) for mine in of_seeds)
            final = [row for mine in of_seed if len(mine) == len(PROBLEMS) for row in mine]
            if final:
                found = [[accuracy(row) for row in final if row["problem"] == name] for name in PROBLEMS]
                means = [f"{statistics.fmean(values):.1f}" for values in [*found, [v for vs in found for v in vs]]]
                lines.append([f"{minutes:g}", len(found[0]), *called(method, label), *means])
    head = ["minutes", "seeds", "method", "configuration", *PROBLEMS, "mean"]
    return f"{tuning}\n\n{grid(head, lines, 'rrll')}"


def unseen_table(rows: list[Row]) -> str:
    """The arms that were run on all of the unseen half, and the tests that are named at the head of this file."""
    lines, reached = [], dict[tuple[str, str], list[float]]()
    for method, label in final_arms(rows):
        mine = of_arm(runs_in(rows, (UNSEEN_SEED,), "unseen"), method, label)
        found = {row["problem"]: accuracy(row) for row in mine}
        if found.keys() >= {*UNSEEN}:
            values = reached[method, label] = [found[name] for name in UNSEEN]
            lines.append([*called(method, label), *(f"{v:.1f}" for v in (*values, statistics.fmean(values)))])
    as_it_is, uda, mpl, none = final_arms(rows)
    differences = []
    for name, first, second in (
        ("primary: feedback in the last quarter, at equal time", mpl, none),
        ("Meta Pseudo Labels and tuned UDA", mpl, uda),
        ("tuned UDA and UDA as it is", uda, as_it_is),
    ):
        if first in reached and second in reached:
            test = paired_test(reached[first], reached[second])
            low, high = test.interval or (test.mean, test.mean)
            differences.append([name, f"{test.mean:+.1f}", f"{low:+.1f} to {high:+.1f}", f"{test.p_permutation:.2f}"])
    shown = grid(["method", "configuration", *UNSEEN, "mean"], lines, names=2)
    return f"{shown}\n\n{grid(['difference', 'mean', '95 % over problems', 'sign-flip p'], differences)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what: Any = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--costs", action="store_true", help="measure what a step costs")
    what.add_argument("--tune", action="store_true", help="the tuning runs")
    what.add_argument("--minutes", type=float, help="the final runs, of processor time on one core each")
    what.add_argument("--write", type=Path, metavar="PAGE", help="put the tables there")
    parser.add_argument("--unseen", action="store_true", help="costs or final runs of the unseen half")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RAW)
    given = parser.parse_args()
    rows = read(given.out)
    if given.costs:
        # The seen half's problems tell how fast the machine is.
        names, arms = ((*PROBLEMS, *UNSEEN), final_arms(rows)) if given.unseen else (PROBLEMS, EVERY_ARM)
        append(given.out, {"costs": costs(names, arms)})
        return
    if given.write:
        show(given.write, "picture-feedback", table(rows))
        show(given.write, "picture-feedback-unseen", unseen_table(rows))
        return
    go_on(given.out, jobs(rows, given.minutes, given.unseen), partial(one, costs=costs_in(rows)), workers=given.jobs)


if __name__ == "__main__":
    main()
