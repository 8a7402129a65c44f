"""Which size of the feedback is safe? Every mode and option beside the same loop without feedback.

    python benchmarks/feedback_size.py --prepare FOLDER     # once: Fashion-MNIST's four files
    python benchmarks/feedback_size.py --workers 16         # run what has no row yet
    python benchmarks/feedback_size.py --write benchmarks/results/feedback_size.md

A cell is a problem, a learning rate of both networks, a number of unlabeled examples in a batch,
and the way that the steps are taken: by ``fit``, whose default schedule lowers the rates to 0 along
a cosine, or by ``step`` at constant rates. A rule says what sets the feedback's size
(:data:`RULES`), an option how the feedback is found (:data:`OPTIONS`). All of them see the same
batches from the same initial weights for a seed, and so do the two controls, ``mode="none"`` with
soft and with hard labels. The networks learn by SGD with Nesterov's momentum 0.9 and weight decay
5e-4, 300 steps, 64 labeled examples a batch. The test examples are read after the last step.

The digits' MLP has every cell; the other problems have, by ``fit``, 128 unlabeled examples at three
rates and 896 at the middle one. **A rule holds for an option** if its student is, in the mean over
the cells, at most 1 point below the control with the same kind of labels; if no cell, the mean of
three seeds, is 5 points below it; if no run is at chance where its control is not; and if no run
ends in an error where its control does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import harness
import torch
from five_problems import PROBLEMS, Split, prepare
from harness import HERE, NONE, RESULTS, Row, append, grid, read, show
from torch import Tensor, nn

import metapl

RAW = RESULTS / "feedback_size.jsonl"
DATA = HERE.parent / "runs" / "data"

STEPS = 300
LABELED_BATCH = 64
SEEDS = (0, 1, 2)
RATES = (0.03, 0.1, 0.3)
UNLABELED_BATCHES = (32, 128, 896)

MEAN_LIMIT = 0.01
"""How far below its control an option may be in the mean over its cells."""
CELL_LIMIT = 0.05
"""How far below its control no cell may be."""
CHANCE_MARGIN = 0.05
"""A network is at chance if its accuracy is at most this above the most frequent class's share."""

# -------------------------------------------------------------------------------- options and rules


@dataclass(frozen=True)
class Option:
    """How the feedback is found.

    An estimator of :mod:`metapl.feedback` with its settings, and the kind of labels.
    """

    estimator: str
    settings: dict[str, Any] = field(default_factory=dict)
    labels: Literal["soft", "hard"] = "soft"
    cost: float = 1.0
    """Processor time of a step over ``Forward()``'s: the digits' MLP, 128 unlabeled examples."""

    @property
    def name(self) -> str:
        """Return the call that makes the estimator, with its kind of labels if both are taken."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items()).replace(
            "'", '"'
        )
        takes_both = self.estimator in (
            "Forward",
            "Difference",
            "Implicit",
            "NoFeedback",
            "Unrolled",
        )
        labels = ", hard labels" if takes_both and self.labels == "hard" else ""
        return f"{self.estimator}({settings}){labels}"

    def mode(self) -> metapl.feedback.Estimator:
        estimator: metapl.feedback.Estimator = getattr(metapl.feedback, self.estimator)(
            **self.settings
        )
        return estimator


CONTROLS: dict[str, Option] = {
    "soft": Option("NoFeedback", cost=0.6),
    "hard": Option("NoFeedback", labels="hard", cost=0.6),
}
"""The loop without feedback, by its kind of labels."""

OPTIONS: tuple[Option, ...] = (
    Option("Forward"),
    Option("Forward", labels="hard"),
    Option("Forward", {"normalization": "learning_rate"}),
    Option("Forward", {"normalization": "cosine"}),
    Option("Difference"),
    Option("Unrolled"),
    Option("Reinforce", labels="hard"),
    Option("Reinforce", {"reduction": "sum"}, labels="hard"),
    Option("Reinforce", {"similarity": "cosine"}, labels="hard"),
    Option("Reinforce", {"similarity": "cosine", "baseline": 0.99}, labels="hard"),
    Option("Reinforce", {"baseline": 0.99}, labels="hard"),
    Option("Reinforce", {"normalization": "learning_rate"}, labels="hard"),
    Option("ReinforcePerExample", labels="hard"),
    Option("ReinforcePerExample", {"normalization": "learning_rate"}, labels="hard"),
    Option("ReinforcePerExample", {"normalization": "cosine"}, labels="hard"),
    Option("LossDifference", labels="hard", cost=0.8),
    Option("LossDifference", {"reduction": "sum"}, labels="hard", cost=0.8),
    Option("LossDifference", {"baseline": 0.99}, labels="hard", cost=0.8),
    Option("LossDifference", {"normalization": "learning_rate"}, labels="hard", cost=0.8),
    Option("Implicit", {"solver": "identity"}),
    Option("Implicit", {"solver": "cg", "damping": 1.0, "iterations": 3}, cost=1.9),
    Option(
        "Implicit",
        {"solver": "neumann", "damping": 0.1, "step_size": 0.05, "iterations": 3},
        cost=1.9,
    ),
)

RULES: dict[str, dict[str, float]] = {
    "default": {},
    "bound 0.1": {"feedback_bound": 0.1},
    "bound 0.3": {"feedback_bound": 0.3},
    "ratio 0.1": {"feedback_ratio": 0.1},
    "ratio 0.3": {"feedback_ratio": 0.3},
    "weight 1": {"feedback_weight": 1.0},
}
"""The arguments of :class:`metapl.BilevelTrainer` that set the feedback's size."""

# -------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Cell:
    """A problem and how it is trained on."""

    problem: str
    rate: float
    unlabeled_batch: int
    way: Literal["fit", "step"]

    @property
    def title(self) -> str:
        return f"{PROBLEMS[self.problem].title}, {self.rate}, {self.unlabeled_batch}, {self.way}"


def cells() -> Iterator[Cell]:
    """Yield all of them for the digits' MLP, and four by ``fit`` for each other problem."""
    for way in ("fit", "step"):
        for rate in RATES:
            for unlabeled_batch in UNLABELED_BATCHES:
                yield Cell("digits_mlp", rate, unlabeled_batch, way)
    for problem in PROBLEMS:
        if problem != "digits_mlp":
            for rate in RATES:
                yield Cell(problem, rate, 128, "fit")
            yield Cell(problem, 0.1, 896, "fit")


CELLS: tuple[Cell, ...] = tuple(cells())


@dataclass(frozen=True)
class Job:
    """The runs of an option by a rule in a cell: one for each seed."""

    cell: Cell
    option: Option
    rule: str

    def columns(self) -> Row:
        """Return what names the job in its rows."""
        return {**dataclasses.asdict(self.cell), "option": self.option.name, "rule": self.rule}

    def seconds(self) -> float:
        """Estimate the processor time of all seeds."""
        small, large = SECONDS[self.cell.problem]
        if self.cell.unlabeled_batch == 896:
            return len(SEEDS) * large * self.option.cost
        return len(SEEDS) * small * self.option.cost


SECONDS: dict[str, tuple[float, float]] = {
    "digits_mlp": (1.1, 1.6),
    "digits_conv": (3.3, 12.0),
    "fashion": (7.2, 26.0),
    "text": (2.5, 5.2),
    "table": (1.2, 1.3),
}
"""Processor seconds of 300 steps of ``Forward()`` with 128 and with 896 unlabeled examples: what
the order of the jobs and the estimate are made of, measured by ``feedback_ratio`` on one core of a
shared machine."""


def jobs_of(rules: Sequence[str], problems: Sequence[str], ways: Sequence[str]) -> list[Job]:
    """Return the jobs of these rules: the controls' first, then those that take the longest."""
    chosen = [cell for cell in CELLS if cell.problem in problems and cell.way in ways]
    controls = [Job(cell, control, NO_RULE) for cell in chosen for control in CONTROLS.values()]
    jobs_of_cells = [
        Job(cell, option, rule) for rule in rules for cell in chosen for option in OPTIONS
    ]
    return [*longest_first(controls), *longest_first(jobs_of_cells)]


NO_RULE = "none"
"""The rule that the rows of the controls name."""


def longest_first(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=Job.seconds, reverse=True)


# --------------------------------------------------------------------------------------------- runs


@lru_cache(maxsize=len(SEEDS))
def split_of(problem: str, seed: int, data: Path, miniature: bool) -> Split:
    return PROBLEMS[problem].split(seed, data, miniature)


def rows_of_batches(count: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    """Return the rows of each step's batch, of an endless stream of shuffled epochs.

    A batch may span several.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-batch * steps // count)
    stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(stream[: batch * steps].split(batch))


def optimizer_of(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


@torch.no_grad()
def accuracy(network: nn.Module, split: Split) -> float:
    """Return the share of test examples that the network, in eval mode, has right."""
    network.eval()
    right = network(split.test_inputs).argmax(1) == split.test_labels
    return round(float(right.double().mean()), 5)


def run_seed(job: Job, seed: int, data: Path, miniature: bool) -> Row:
    """Train once and test once. A run that metapl ends with an error is a row with its reason."""
    began = time.process_time()
    cell = job.cell
    steps = 4 if miniature else STEPS
    split = split_of(cell.problem, seed, data, miniature)
    labeled_rows = rows_of_batches(len(split.labels), LABELED_BATCH, steps, seed=1000 * seed + 1)
    unlabeled_rows = rows_of_batches(
        len(split.unlabeled_inputs), cell.unlabeled_batch, steps, seed=1000 * seed + 2
    )
    labeled = [(split.labeled_inputs[rows], split.labels[rows]) for rows in labeled_rows]
    unlabeled = [split.unlabeled_inputs[rows] for rows in unlabeled_rows]

    torch.manual_seed(seed)
    teacher = PROBLEMS[cell.problem].network()
    student = PROBLEMS[cell.problem].network()
    row: Row = {"seed": seed, "chance": round(split.chance(), 5)}
    rule = {} if job.rule == NO_RULE else RULES[job.rule]
    scalars: dict[str, float] = {}
    try:
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            job.option.mode(),
            problem=metapl.PseudoLabels(kind=job.option.labels),
            inner_optimizer=optimizer_of(student, cell.rate),
            outer_optimizer=optimizer_of(teacher, cell.rate),
            teacher_losses=[metapl.CrossEntropy(label_smoothing=0.1)],
            verify=False,
            **rule,  # type: ignore[arg-type]
        )
        if cell.way == "fit":
            fitted = trainer.fit(
                labeled,
                unlabeled,
                steps=steps,
                log_every=max(1, steps // 10),
                progress=False,
                say=keep_silent,
            )
            scalars = fitted.history[-1]
        else:
            for labeled_batch, unlabeled_batch in zip(labeled, unlabeled, strict=True):
                report = trainer.step(labeled_batch, unlabeled_batch)
            scalars = {name: float(value) for name, value in report.scalars.items()}
    except metapl.MetaplError as error:
        row["error"] = str(error)
    else:
        row["student"] = accuracy(student, split)
        row["teacher"] = accuracy(teacher, split)
        for name in ("feedback_ratio", "feedback_weight"):
            if name in scalars:
                row[name] = float(f"{scalars[name]:.4g}")
    row["seconds"] = round(time.process_time() - began, 2)
    return row


def keep_silent(text: str) -> None:
    """Take a message of a fit and show it nowhere: what went wrong is seen in the accuracies."""


def run_job(job: Job, data: Path, miniature: bool, seeds: Sequence[int] = SEEDS) -> list[Row]:
    """Run the seeds of a job one after another, on one thread."""
    torch.set_num_threads(1)
    if miniature:
        seeds = seeds[:1]
    return [{**job.columns(), **run_seed(job, seed, data, miniature)} for seed in seeds]


def commit() -> str | None:
    """Return the short name of the commit that is run, and None where git does not know it."""
    command = ["git", "-C", str(HERE), "rev-parse", "--short=8", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def run_missing(jobs: Sequence[Job], arguments: argparse.Namespace) -> None:
    """Run the jobs that the file has no rows of, several at a time; append rows as they come."""
    stored = {key_of(row) for row in read(arguments.out, "option")}
    missing = [job for job in jobs if key_of(job.columns()) not in stored]
    if not missing:
        return
    made_with = harness.environment() | {"commit": arguments.commit or commit(), "steps": STEPS}
    append(arguments.out, {"made_with": made_with})
    ends = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    for done, rows in enumerate(results(missing, arguments, ends), 1):
        append(arguments.out, *rows)
        students = [row.get("student", row.get("error")) for row in rows]
        print(f"{done}/{len(missing)}", *key_of(rows[0]), students, file=sys.stderr, flush=True)


def results(
    jobs: Sequence[Job], arguments: argparse.Namespace, ends: float | None
) -> Iterator[list[Row]]:
    """Yield the rows of each job when it is finished.

    After ``ends``, of the monotonic clock, no job is begun.
    """
    waiting = iter(jobs)
    if arguments.workers == 1:
        for job in waiting:
            if ends is not None and time.monotonic() >= ends:
                return
            yield run_job(job, arguments.data, arguments.miniature, arguments.seeds)
        return
    # Each process has one thread; PyTorch reads the variable when it is imported there.
    os.environ["OMP_NUM_THREADS"] = "1"
    running = set[Future[list[Row]]]()
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        while True:
            while len(running) < arguments.workers and (ends is None or time.monotonic() < ends):
                job = next(waiting, None)
                if job is None:
                    break
                running.add(
                    pool.submit(run_job, job, arguments.data, arguments.miniature, arguments.seeds)
                )
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()


KEY = ("problem", "rate", "unlabeled_batch", "way", "option", "rule")
"""The columns that name a job."""


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


# ------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class CellResult:
    """The runs of an option in a cell beside those of its control, paired by seed."""

    cell: Cell
    gains: tuple[float, ...]
    """The student's accuracy minus the control's student's, of the seeds where both have one."""
    teacher_gains: tuple[float, ...]
    at_chance: int
    """Runs whose student is at chance where the control's is not."""
    errors: tuple[str, ...]
    """Of the runs that ended in an error where the control did not."""

    @property
    def gain(self) -> float:
        return statistics.fmean(self.gains)


def is_at_chance(row: Row) -> bool:
    return bool(row["student"] <= row["chance"] + CHANCE_MARGIN)


def cell_result(cell: Cell, rows: Sequence[Row], controls: Sequence[Row]) -> CellResult:
    gains: list[float] = []
    teacher_gains: list[float] = []
    errors: list[str] = []
    at_chance = 0
    control_of = {row["seed"]: row for row in controls}
    for row in rows:
        control = control_of[row["seed"]]
        if "error" in control:
            continue
        if "error" in row:
            errors.append(row["error"])
            continue
        gains.append(row["student"] - control["student"])
        teacher_gains.append(row["teacher"] - control["teacher"])
        at_chance += is_at_chance(row) and not is_at_chance(control)
    return CellResult(
        cell, tuple(gains), tuple(teacher_gains), at_chance=at_chance, errors=tuple(errors)
    )


@dataclass(frozen=True)
class Verdict:
    """What the cells of an option by a rule say."""

    option: Option
    cells: tuple[CellResult, ...]

    @property
    def measured(self) -> list[CellResult]:
        """Return the cells in which some seed has an accuracy beside its control's."""
        return [result for result in self.cells if result.gains]

    @property
    def mean(self) -> float:
        return statistics.fmean(result.gain for result in self.measured)

    @property
    def worst(self) -> CellResult:
        return min(self.measured, key=lambda result: result.gain)

    @property
    def at_chance(self) -> int:
        return sum(result.at_chance for result in self.cells)

    @property
    def errors(self) -> list[str]:
        return [error for result in self.cells for error in result.errors]

    @property
    def far_below(self) -> list[CellResult]:
        return [result for result in self.measured if result.gain <= -CELL_LIMIT]

    @property
    def holds(self) -> bool:
        # Accuracies have five places; a mean of exactly one point below is still allowed.
        is_close = self.mean >= -MEAN_LIMIT - 1e-9
        return is_close and not self.far_below and not self.at_chance and not self.errors

    def mean_of(self, problem: str) -> float | None:
        """Return the mean over the cells of a problem, None where there is none."""
        gains = [result.gain for result in self.measured if result.cell.problem == problem]
        return statistics.fmean(gains) if gains else None


def verdicts(rows: Sequence[Row], rule: str) -> list[Verdict]:
    """Return the verdict of each option that has rows by this rule."""
    by_key: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_key.setdefault(key_of(row), []).append(row)
    verdict_list: list[Verdict] = []
    for option in OPTIONS:
        compared: list[CellResult] = []
        for cell in CELLS:
            rows_of_job = by_key.get(key_of(Job(cell, option, rule).columns()), [])
            controls = by_key.get(key_of(Job(cell, CONTROLS[option.labels], NO_RULE).columns()), [])
            if rows_of_job and controls:
                compared.append(cell_result(cell, rows_of_job, controls))
        verdict = Verdict(option, tuple(compared))
        if verdict.measured:
            verdict_list.append(verdict)
    return verdict_list


def in_points(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:+.1f}"


def table_of_rule(verdict_list: Sequence[Verdict]) -> str:
    """Return a row for each option: its means, its worst cell, its failures and the verdict."""
    lines = []
    for verdict in verdict_list:
        worst = verdict.worst
        means = [in_points(verdict.mean_of(problem)) for problem in PROBLEMS]
        lines.append(
            [
                f"`{verdict.option.name}`",
                len(verdict.cells),
                in_points(verdict.mean),
                *means,
                f"{in_points(worst.gain)} ({worst.cell.title})",
                len(verdict.far_below),
                verdict.at_chance,
                len(verdict.errors),
                "holds" if verdict.holds else "**fails**",
            ]
        )
    titles = [problem.title for problem in PROBLEMS.values()]
    head = [
        "option",
        "cells",
        "mean",
        *titles,
        "worst cell",
        "cells 5 below",
        "runs at chance",
        "errors",
        "verdict",
    ]
    return grid(head, lines)


def table_of_failures(verdict_list: Sequence[Verdict]) -> str:
    """Return a row for each cell that is far below its control, at chance, or has an error."""
    lines = []
    for verdict in verdict_list:
        for result in verdict.cells:
            is_far_below = bool(result.gains) and result.gain <= -CELL_LIMIT
            if not (is_far_below or result.at_chance or result.errors):
                continue
            student = in_points(result.gain) if result.gains else NONE
            teacher = in_points(statistics.fmean(result.teacher_gains)) if result.gains else NONE
            reasons = "; ".join(
                f"{count} x {text}" for text, count in Counter(result.errors).items()
            )
            name = f"`{verdict.option.name}`"
            lines.append(
                [name, result.cell.title, student, teacher, result.at_chance, reasons or NONE]
            )
    head = ["option", "cell", "student", "teacher", "runs at chance", "errors"]
    return grid(head, lines, "llrrrl")


def table_of_controls(rows: Sequence[Row]) -> str:
    """Return the accuracies of the loop without feedback, the mean of the seeds, in each cell."""
    lines = []
    for cell in CELLS:
        line = [cell.title]
        for control in CONTROLS.values():
            wanted = key_of(Job(cell, control, NO_RULE).columns())
            rows_of_control = [row for row in rows if key_of(row) == wanted and "error" not in row]
            line += [mean_in_percent(rows_of_control, role) for role in ("student", "teacher")]
        if any(value != NONE for value in line[1:]):
            lines.append(line)
    head = [
        "problem, rate, unlabeled batch, way",
        "student, soft labels",
        "teacher",
        "student, hard labels",
        "teacher",
    ]
    return grid(head, lines)


def mean_in_percent(rows: Sequence[Row], role: str) -> str:
    return f"{100 * statistics.fmean(row[role] for row in rows):.1f}" if rows else NONE


def block(rows: Sequence[Row]) -> str:
    """Return the tables of the page."""
    parts = []
    for rule in RULES:
        verdict_list = verdicts(rows, rule)
        if not verdict_list:
            continue
        number_that_hold = sum(verdict.holds for verdict in verdict_list)
        arguments = (
            ", ".join(f"{name}={value}" for name, value in RULES[rule].items()) or "no argument"
        )
        average = in_points(statistics.fmean(verdict.mean for verdict in verdict_list))
        parts.append(
            f"### {rule}: {arguments}\n\nIt holds for {number_that_hold} of {len(verdict_list)} "
            "options; their mean "
            f"is {average}."
        )
        parts.append(table_of_rule(verdict_list))
        if not all(verdict.holds for verdict in verdict_list):
            parts.append(table_of_failures(verdict_list))
    parts.append("### Accuracies without feedback, %")
    parts.append(table_of_controls(rows))
    return "\n\n".join(parts)


def estimate(rules: Sequence[str]) -> str:
    """Return how much processor time the grid takes, by rule."""
    controls = sum(job.seconds() for job in jobs_of([], [*PROBLEMS], ("fit", "step")))
    lines = [["controls", f"{controls / 60:.0f}"]]
    for rule in rules:
        seconds = (
            sum(job.seconds() for job in jobs_of([rule], [*PROBLEMS], ("fit", "step"))) - controls
        )
        lines.append([rule, f"{seconds / 60:.0f}"])
    return grid(["rule", "minutes of one core"], lines)


def miniature_jobs(rule: str) -> list[Job]:
    """Return each option in a cell of the first problem, and ``Forward()`` in one of the others."""
    first = CELLS[0]
    other_cells = [
        cell for cell in CELLS if cell.problem != first.problem and cell.rate == RATES[0]
    ]
    jobs = [
        Job(cell, control, NO_RULE)
        for cell in (first, *other_cells)
        for control in CONTROLS.values()
    ]
    jobs += [Job(first, option, rule) for option in OPTIONS]
    jobs += [Job(cell, OPTIONS[0], rule) for cell in other_cells]
    return jobs


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="FOLDER", help="where the cached files are"
    )
    parser.add_argument(
        "--prepare", type=Path, metavar="FOLDER", help="write the cached files; runs nothing"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--minutes", type=float, help="begin no run after so many")
    parser.add_argument(
        "--rules",
        nargs="+",
        default=[*RULES],
        choices=[*RULES],
        help="what sets the feedback's size",
    )
    parser.add_argument(
        "--part",
        nargs="+",
        default=[*PROBLEMS],
        choices=[*PROBLEMS],
        help="the problems that are run",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["fit", "step"],
        choices=["fit", "step"],
        help="how steps are taken",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        metavar="TEXT",
        help="options whose names begin so; controls always run",
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[*RATES], choices=[*RATES], help="of the cells"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[*SEEDS],
        help="to look at a cell again, into another file by --out",
    )
    parser.add_argument("--commit", help="the commit that is run, where git cannot say it")
    arguments = harness.parsed(parser)
    if arguments.prepare is not None:
        prepare(arguments.prepare, arguments.data)
        return
    if arguments.runs:
        print(estimate(arguments.rules), file=sys.stderr)
        if arguments.miniature:
            jobs = miniature_jobs(arguments.rules[0])
        else:
            jobs = jobs_of(arguments.rules, arguments.part, arguments.ways)
            jobs = [job for job in jobs if job.cell.rate in arguments.rates]
        if arguments.options is not None:
            beginnings = ("NoFeedback", *arguments.options)
            jobs = [job for job in jobs if job.option.name.startswith(beginnings)]
        run_missing(jobs, arguments)
        return
    show(arguments.write, "feedback_size", block(read(arguments.out, "option")))


if __name__ == "__main__":
    main()
