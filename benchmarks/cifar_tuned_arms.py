"""Does feedback add to few labels of CIFAR-10 once each arm is tuned as much as the others?

    python benchmarks/cifar_tuned_arms.py --root CIFAR      # 70 minutes of a core; goes on
    python benchmarks/cifar_tuned_arms.py --root CIFAR --arms labels uda     # some of the arms
    python benchmarks/cifar_tuned_arms.py --write benchmarks/results/cifar_tuned_arms.md
    python benchmarks/cifar_tuned_arms.py --few --root CIFAR    # 250 labels; 90 minutes of a core
    python benchmarks/cifar_tuned_arms.py --few --write benchmarks/results/cifar_tuned_arms_250.md

Runs, work and pictures are those of ``cifar_few_labels``: 4,000 labels, and the operations that
labels alone take for 30,000 pictures. There no arm was tuned. Here no label is set aside, as the
command has it where there are test pictures.

Each arm has three tries: its defaults, strong changes of pictures, and one of its own. Labels alone
are smoothed by 0.1, UDA has half of the consistency loss, and MPL and the loop without feedback let
the student begin after half of the steps, not after three quarters. Before, with networks selected
otherwise, twice and half of the learning rate were tried on the same draws for labels alone and for
the loop without feedback: all four were behind the defaults in the mean.
Every try is trained on draws 21 and 22, and measured on 3,000 training pictures that are neither
labeled nor unlabeled there. Of each arm the try with the best mean goes on.

Declared before the first run, on draws 41 to 46, which chose nothing, each tested once, as a paired
difference by draw with the interval of a t-test:

- Main question: does the feedback add to the same loop without it? ``mpl`` less ``none``.
- ``uda`` less ``labels``, and ``mpl`` less ``labels``.

The same tests were declared and made once before, on draws 31 to 36, when the command kept 400 of
the 4,000 labels to select by: -4.7, -4.0 and -11.9.

With ``--few`` there are 250 labels, and the work of 60,000 pictures, which is 240 times each label.
Every arm has three tries again: its defaults; 16 labeled pictures a step, with 80 unlabeled ones;
and one of its own. Labels alone are smoothed by 0.1, and the others have the smaller batch and take
labels from a probability of 0.6 on, which longer trainings of UDA chose on the same draws 21 and
22. The same three tests were declared before the first run of these, on draws 51 to 56.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cifar_few_labels as few
import harness
from harness import NONE, RESULTS, Row, grid, read, show

RAW = RESULTS / "cifar_tuned_arms.jsonl"
RAW_OF_FEW = RESULTS / "cifar_tuned_arms_250.jsonl"
TUNED_ON = (21, 22)
ARMS = ("labels", "uda", "none", "mpl")
USUAL = "the defaults"
STRONG = ("--augment", "strong")
SMALL_BATCH = ("--labeled-batch", "16", "--unlabeled-batch", "80")


class Try(NamedTuple):
    """One way to run an arm.

    Attributes:
        arm: its name in ``cifar_few_labels``.
        flags: besides those of the arm.
        waits: whether the student begins after half of the steps.
    """

    arm: str
    flags: tuple[str, ...] = ()
    waits: bool = False

    def words(self, steps: int) -> tuple[str, ...]:
        """Return the flags besides those of the arm, which takes so many steps."""
        if not self.waits:
            return self.flags
        return (*self.flags, "--wait", str(max(1, steps // 2)))


def tries_of_many(arm: str) -> dict[str, Try]:
    """Return the tries of an arm with 4,000 labels, by what they are called."""
    tries = {USUAL: Try(arm), " ".join(STRONG): Try(arm, STRONG)}
    own = {
        "labels": Try(arm, ("--label-smoothing", "0.1")),
        "uda": Try(arm, ("--uda-weight", "0.5")),
    }
    if arm in own:
        tries[" ".join(own[arm].flags)] = own[arm]
    else:
        tries["--wait of half the steps"] = Try(arm, waits=True)
    return tries


def tries_of_few(arm: str) -> dict[str, Try]:
    """Return the tries of an arm with 250 labels, by what they are called."""
    if arm == "labels":
        flags = ("--label-smoothing", "0.1")
        return {
            USUAL: Try(arm),
            "--labeled-batch 16": Try("labels_few"),
            " ".join(flags): Try(arm, flags),
        }
    flags = ("--uda-threshold", "0.6")
    small = " ".join(SMALL_BATCH)
    return {
        USUAL: Try(arm),
        small: Try(f"{arm}_few"),
        " ".join((small, *flags)): Try(f"{arm}_few", flags),
    }


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained, and on which draws.

    Attributes:
        labels: how many pictures are labeled.
        pictures: as many as labels alone learn for the same work.
        draws: those that choose nothing, each tested once.
        tries: of an arm, by what they are called.
    """

    labels: int
    pictures: int
    draws: tuple[int, ...]
    tries: Callable[[str], dict[str, Try]]


MANY = Study(labels=4000, pictures=few.BUDGET, draws=(41, 42, 43, 44, 45, 46), tries=tries_of_many)
FEW = Study(
    labels=250, pictures=few.LONGER_BUDGET, draws=(51, 52, 53, 54, 55, 56), tries=tries_of_few
)


def chosen(rows: list[Row], arm: str) -> str:
    """Return the try of an arm with the best mean on held-out pictures."""
    of_arm = [row for row in rows if row.get("arm") == arm and row["draw"] in TUNED_ON]
    best: str = harness.best(of_arm, "try", "test_accuracy")
    return best


# -------------------------------------------------------------------------------------------- runs


def jobs(study: Study, out: Path, arms: list[str]) -> Iterator[Row]:
    """Yield the tries of arms, and then what was chosen on draws of its own."""
    for arm in arms:
        for name, one in study.tries(arm).items():
            cost_of = few.ARMS[one.arm].cost_of or one.arm
            if cost_of not in costs(out):
                yield {"cost_of": cost_of}
            for draw in TUNED_ON:
                yield {"arm": arm, "try": name, "draw": draw}
    best = {arm: chosen(read(out), arm) for arm in arms}
    for draw in study.draws:
        for arm in arms:
            yield {"arm": arm, "try": best[arm], "draw": draw}


def miniature_jobs(study: Study) -> Iterator[Row]:
    """Yield two tries of an arm, one of them on another draw too."""
    for name in [*study.tries("mpl")][::2]:
        yield {"arm": "mpl", "try": name, "draw": TUNED_ON[0]}
    yield {"arm": "mpl", "try": USUAL, "draw": study.draws[0]}


def costs(out: Path) -> dict[str, Row]:
    """Return the rows that have the cost of steps, by whose it is."""
    rows = [*read(few.RAW), *read(out)]
    return {row["cost_of"]: row for row in rows if "cost_of" in row}


def run_all(args: argparse.Namespace, study: Study, pool: Executor, place: Path) -> None:
    """Run the jobs that are not in the file yet."""
    root = args.root
    if args.miniature:
        root = place / "noise"
        few.write_noise(root, per_class=few.NOISE_PER_CLASS)

    def measure(**job: Any) -> Row:
        if "cost_of" in job:
            return few.cost(pool, job["cost_of"], few.COUNTED_STEPS)
        one = study.tries(job["arm"])[job["try"]]
        arm = replace(few.ARMS[one.arm], learns_all=True)
        labels = few.NOISE_LABELS if args.miniature else study.labels
        folder = place / str(job["draw"])
        is_tested = args.miniature or job["draw"] in study.draws
        few.write_pictures(root, folder, draw=job["draw"], labels=labels, is_tested=is_tested)
        taken: Row = {"steps": 2}
        finetuning = min(1, arm.finetuning)
        if not args.miniature:
            finetuning = arm.finetuning
            of_steps = [*costs(args.out).values()]
            steps, work = few.planned(of_steps, arm=one.arm, pictures=study.pictures, is_equal=True)
            taken = {"steps": steps, "work_gflop": round(work, 1)}
        flags = one.words(taken["steps"])
        words = arm.words(taken["steps"], finetuning, labels=labels, more=flags)
        return {**taken, "flags": [*flags], **few.trained(pool, words, folder)}

    todo = miniature_jobs(study) if args.miniature else jobs(study, args.out, args.arms)
    harness.go_on(args.out, todo, measure, environment=harness.environment())


# ------------------------------------------------------------------------------------------ tables


def table_of_tries(rows: list[Row]) -> str:
    """Return what every try of an arm reaches on the held-out pictures of two draws."""
    lines = []
    pairs = dict.fromkeys((row["arm"], row["try"]) for row in rows if row["draw"] in TUNED_ON)
    for arm, name in pairs:
        reached = [
            row["test_accuracy"]
            for row in rows
            if (row["arm"], row["try"]) == (arm, name) and row["draw"] in TUNED_ON
        ]
        takes = "yes" if name == chosen(rows, arm) else NONE
        lines.append([few.ARMS[arm].title, name, harness.spread(reached), takes])
    return grid(["arm", "try", "held out, %", "goes on"], lines, "llrl")


def by_draw(rows: list[Row], arm: str) -> dict[int, Row]:
    """Return the rows of an arm on the draws that chose nothing."""
    of_arm = [row for row in rows if row["arm"] == arm]
    return {row["draw"]: row for row in of_arm if row["draw"] not in TUNED_ON}


def table_of_arms(rows: list[Row]) -> str:
    """Return what the chosen try of every arm reaches on the draws that chose nothing."""
    lines = []
    for arm in ARMS:
        of_arm = by_draw(rows, arm)
        if of_arm:
            reached = [row["test_accuracy"] for row in of_arm.values()]
            seconds = statistics.median(row["core_seconds"] for row in of_arm.values())
            one = next(iter(of_arm.values()))
            line = [few.ARMS[arm].title, one["try"], f"{one['steps']:,}", f"{seconds:.0f}"]
            lines.append([*line, str(len(of_arm)), harness.spread(reached)])
    head = ["arm", "try", "steps", "core-seconds", "draws", "test, %"]
    return grid(head, lines, "llrrrr")


def table_of_tests(rows: list[Row]) -> str:
    """Return the tests that were declared before the first run."""
    lines = []
    for name, first, second in (
        ("main: feedback adds", "mpl", "none"),
        ("UDA less labels alone", "uda", "labels"),
        ("MPL less labels alone", "mpl", "labels"),
    ):
        both = by_draw(rows, first), by_draw(rows, second)
        lines.append([name, str(len(both[0].keys() & both[1].keys())), *few.compared(*both)])
    return grid(["test", "draws", "difference", "95 %", "p"], lines, 1)


def table_of_power(study: Study, rows: list[Row]) -> str:
    """Return what differences the main question's test finds, by the spread on the tuning draws.

    The spread of the paired differences is that within tries of one name, pooled over these.
    """
    squares = 0.0
    freedom = 0
    for name in study.tries("mpl"):
        first, second = (
            {row["draw"]: row["test_accuracy"] for row in rows if (row["arm"], row["try"]) == pair}
            for pair in (("mpl", name), ("none", name))
        )
        draws = [draw for draw in TUNED_ON if draw in first and draw in second]
        changes = [first[draw] - second[draw] for draw in draws]
        if len(changes) > 1:
            squares += statistics.variance(changes) * (len(changes) - 1)
            freedom += len(changes) - 1
    lines = []
    for count in (3, len(study.draws), 2 * len(study.draws)):
        points = NONE
        if freedom:
            points = f"{100 * few.power(math.sqrt(squares / freedom), count):.1f}"
        lines.append([str(count), points])
    return grid(["draws", "difference found four times in five, points"], lines, "r")


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--root", type=Path, help="folder of train/CLASS and test/CLASS")
    parser.add_argument("--few", action="store_true", help="250 labels, in twice the work")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="arms to run")
    args = harness.parsed(parser)
    study = FEW if args.few else MANY
    if args.few and args.out == RAW:
        args.out = RAW_OF_FEW
    if args.runs:
        one = ProcessPoolExecutor(1, get_context("spawn"), initializer=few.enter_methods)
        with one as pool, tempfile.TemporaryDirectory() as place:
            run_all(args, study, pool, Path(place))
    rows = read(args.out, having="arm")
    mark = "cifar_tuned_arms_250" if args.few else "cifar_tuned_arms"
    show(args.write, mark, table_of_arms(rows))
    show(args.write, f"{mark}-tries", table_of_tries(rows))
    show(args.write, f"{mark}-tests", table_of_tests(rows))
    show(args.write, f"{mark}-power", table_of_power(study, rows))


if __name__ == "__main__":
    main()
