"""Does feedback add to few labels of CIFAR-10 once each arm is tuned as much as the others?

    python benchmarks/cifar_tuned_arms.py --root CIFAR      # 70 minutes of a core; goes on
    python benchmarks/cifar_tuned_arms.py --root CIFAR --arms labels uda     # some of the arms
    python benchmarks/cifar_tuned_arms.py --write benchmarks/results/cifar_tuned_arms.md

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
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cifar_few_labels as few
import harness
from harness import NONE, RESULTS, Row, grid, read, show

RAW = RESULTS / "cifar_tuned_arms.jsonl"
LABELS = 4000
TUNED_ON = (21, 22)
DRAWS = (41, 42, 43, 44, 45, 46)
ARMS = ("labels", "uda", "none", "mpl")
USUAL = "the defaults"
STRONG = ("--augment", "strong")
OWN_FLAGS = {
    "labels": ("--label-smoothing", "0.1"),
    "uda": ("--uda-weight", "0.5"),
}


def tries_of(arm: str, steps: int) -> dict[str, tuple[str, ...]]:
    """Return the flags of an arm's tries, by what they are called.

    Args:
        steps: those of the arm.
    """
    own = OWN_FLAGS.get(arm, ("--wait", str(max(1, steps // 2))))
    tries: dict[str, tuple[str, ...]] = {USUAL: ()}
    tries[" ".join(STRONG)] = STRONG
    tries["--wait of half the steps" if own[0] == "--wait" else " ".join(own)] = own
    return tries


def chosen(rows: list[Row], arm: str) -> str:
    """Return the try of an arm with the best mean on held-out pictures."""
    of_arm = [row for row in rows if row.get("arm") == arm and row["draw"] in TUNED_ON]
    best: str = harness.best(of_arm, "try", "test_accuracy")
    return best


# -------------------------------------------------------------------------------------------- runs


def jobs(out: Path, arms: list[str]) -> Iterator[Row]:
    """Yield the tries of arms, and then what was chosen on draws of its own."""
    for arm in arms:
        for name in tries_of(arm, 1):
            for draw in TUNED_ON:
                yield {"arm": arm, "try": name, "draw": draw}
    best = {arm: chosen(read(out), arm) for arm in arms}
    for draw in DRAWS:
        for arm in arms:
            yield {"arm": arm, "try": best[arm], "draw": draw}


def miniature_jobs() -> Iterator[Row]:
    """Yield two tries of an arm, one of them on another draw too."""
    for name in [*tries_of("mpl", 1)][::2]:
        yield {"arm": "mpl", "try": name, "draw": TUNED_ON[0]}
    yield {"arm": "mpl", "try": USUAL, "draw": DRAWS[0]}


def run_all(args: argparse.Namespace, pool: Executor, place: Path) -> None:
    """Run the jobs that are not in the file yet."""
    root = args.root
    if args.miniature:
        root = place / "noise"
        few.write_noise(root, per_class=few.NOISE_PER_CLASS)

    def measure(**job: Any) -> Row:
        arm = replace(few.ARMS[job["arm"]], learns_all=True)
        labels = few.NOISE_LABELS if args.miniature else LABELS
        folder = place / str(job["draw"])
        is_tested = args.miniature or job["draw"] in DRAWS
        few.write_pictures(root, folder, draw=job["draw"], labels=labels, is_tested=is_tested)
        steps, work = few.planned(read(few.RAW), arm=job["arm"], pictures=few.BUDGET, is_equal=True)
        finetuning = arm.finetuning
        if args.miniature:
            steps, finetuning = 2, min(1, finetuning)
        flags = tries_of(job["arm"], steps)[job["try"]]
        words = arm.words(steps, finetuning, labels=labels, more=flags)
        row = few.trained(pool, words, folder)
        return {"steps": steps, "work_gflop": round(work, 1), "flags": [*flags], **row}

    todo = miniature_jobs() if args.miniature else jobs(args.out, args.arms)
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
    """Return the rows of an arm on the draws that chose nothing, at the usual work."""
    of_arm = [row for row in rows if row["arm"] == arm]
    return {row["draw"]: row for row in of_arm if row["draw"] in DRAWS}


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


def table_of_power(rows: list[Row]) -> str:
    """Return what differences the main question's test finds, by the spread on the tuning draws.

    The spread of the paired differences is that within tries of one name, pooled over these.
    """
    squares = 0.0
    freedom = 0
    for name in tries_of("mpl", 1):
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
    for count in (3, len(DRAWS), 2 * len(DRAWS)):
        points = NONE
        if freedom:
            points = f"{100 * few.power(math.sqrt(squares / freedom), count):.1f}"
        lines.append([str(count), points])
    return grid(["draws", "difference found four times in five, points"], lines, "r")


def main() -> None:
    parser = harness.arguments(__doc__, RAW)
    parser.add_argument("--root", type=Path, help="folder of train/CLASS and test/CLASS")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="arms to run")
    args = harness.parsed(parser)
    if args.runs:
        one = ProcessPoolExecutor(1, get_context("spawn"), initializer=few.enter_methods)
        with one as pool, tempfile.TemporaryDirectory() as place:
            run_all(args, pool, Path(place))
    rows = read(args.out, having="arm")
    show(args.write, "cifar_tuned_arms", table_of_arms(rows))
    show(args.write, "cifar_tuned_arms-tries", table_of_tries(rows))
    show(args.write, "cifar_tuned_arms-tests", table_of_tests(rows))
    show(args.write, "cifar_tuned_arms-power", table_of_power(rows))


if __name__ == "__main__":
    main()
