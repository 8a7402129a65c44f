"""Noisy Student beside Meta Pseudo Labels on the digits: the same labels, the same operations, paired over seeds.

    python benchmarks/student_or_mpl.py --runs runs/student-or-mpl        # the command; goes on where it was stopped
    python benchmarks/student_or_mpl.py --write docs/noisy-student.md     # the table into the page
    python benchmarks/student_or_mpl.py --miniature --out FILE            # in seconds, to see that it runs

It is ``metapl noisy-student digits --compare`` with :data:`FLAGS`, and what its runs leave in their ``result.json``.
Nothing was tuned for it: the settings are the command's own, but for fewer steps, two rounds and small batches.
"""

from __future__ import annotations

import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import difference, points
from machine import arguments, parsed, write_between_marks

from metapl.apps.commands import main as metapl
from metapl.apps.commands.train import COMPARED
from metapl.apps.experiments.folder import RunFolder, stored, stored_result
from metapl.apps.experiments.side_by_side import operations
from metapl.apps.machine.environment import environment
from metapl.apps.recipes.methods import title

RAW = Path(__file__).parent / "results" / "student_or_mpl.jsonl"
SEEDS = range(10)
FLAGS = ("--steps", "600", "--rounds", "2", "--labeled-batch", "20")
MINIATURE = ("--steps", "2", "--rounds", "1", "--labeled-batch", "4", "--hidden", "4", "--finetune-steps", "1")
MINIATURE_METHODS, MINIATURE_SEEDS = COMPARED[:2], range(2)

Row = dict[str, Any]


def command(miniature: bool) -> list[str]:
    """The arguments of metapl, but for where the runs lie."""
    seeds = MINIATURE_SEEDS if miniature else SEEDS
    methods = ["--methods", *MINIATURE_METHODS] if miniature else []
    flags = MINIATURE if miniature else FLAGS
    return ["noisy-student", "digits", "--compare", "--seeds", f"{seeds[0]}-{seeds[-1]}", *methods, *flags]


def collected(runs: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """A row for each run of a comparison."""
    rows = []
    for method in methods:
        first = stored(RunFolder(runs / method / f"seed-{seeds[0]}"))[0]
        counted = operations(first, method, first.task())
        for seed in seeds:
            result = stored_result(RunFolder(runs / method / f"seed-{seed}"))
            rounds = result.get("rounds", [])
            row = {"method": method, "seed": seed, "steps": result["steps"], "operations": counted}
            if rounds:
                given = first.method.selection.first
                row["first_teacher_steps"] = None if given is None else given.steps
                row["first_teacher_test_accuracy"] = rounds[0]["teacher"]["test_accuracy"]
                row |= {name: rounds[0][name] for name in ("store_sha256", "kept", "copies")}
            names = ("delivered", "test_accuracy", "validation_accuracy", "student_test_accuracy")
            rows.append(row | {name: result[name] for name in names})
    return rows


def read(path: Path = RAW) -> list[Row]:
    """The rows of the runs."""
    return [row for row in map(json.loads, path.read_text().splitlines()) if "method" in row]


def accuracies(rows: Sequence[Row], name: str = "test_accuracy") -> dict[str, list[float]]:
    """Accuracies by method, in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found.setdefault(row["method"], []).append(row[name])
    return {method: found[method] for method in dict.fromkeys(row["method"] for row in rows)}


def error(values: Sequence[float]) -> float:
    """The standard error of the mean, in points, as it is shown.

    >>> error([0.8, 0.82, 0.84])
    1.2
    """
    return float(f"{100 * statistics.stdev(values) / len(values) ** 0.5:.1f}")


def table(rows: Sequence[Row]) -> str:
    """Each method, and what Noisy Student is above it."""
    found, steps = accuracies(rows), {row["method"]: row["steps"] for row in rows}
    first, *_ = found
    lines = [
        "| method | steps | test accuracy | Noisy Student above it | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, values in found.items():
        cells = [title(method), f"{steps[method]:,}", f"{points(values):.1f} ± {error(values):.1f}"]
        if method == first:
            cells += ["–", "–"]
        else:
            gain, p = difference(found[first], values)
            between = error([a - b for a, b in zip(found[first], values, strict=True)])
            cells += [f"{gain} ± {between:.1f}", p]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(rows: Sequence[Row], about: Row) -> str:
    """The table, and how it was made."""
    seeds = sorted({row["seed"] for row in rows})
    costs = [row["operations"] for row in rows]
    (teacher,) = {row["first_teacher_steps"] for row in rows if "store_sha256" in row}
    taught = {row["seed"]: row["first_teacher_test_accuracy"] for row in rows if "store_sha256" in row}
    apart = 100 * max(max(costs) / costs[0] - 1, 1 - min(costs) / costs[0])
    return (
        f"{table(rows)}\n\n"
        f"What each delivers, in % of 400 test images, mean ± standard error over {len(seeds)} seeds ({seeds[0]} to "
        f"{seeds[-1]}); differences in points, with the p of the paired t-test "
        "over draws of these images, not corrected for the number of rows. "
        f"Steps are those of each round, and of the main phase of methods without rounds. The first teacher takes "
        f"{teacher:,}, and reaches {points([*taught.values()]):.1f} %. Operations differ by {apart:.2f} % at most. "
        f"`{about['command']}`, run by `python benchmarks/student_or_mpl.py`; raw rows: "
        f"`benchmarks/results/{RAW.name}`."
    )


def write(path: Path, rows: Sequence[Row], command: Sequence[str]) -> None:
    """The rows as JSON lines, below what they were made with."""
    about = {"about": environment(), "command": shlex.join(["metapl", *command])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in (about, *rows)))


def main() -> None:
    parser = arguments(__doc__, RAW)
    parser.add_argument("--runs", type=Path, default=Path("runs/student-or-mpl"), metavar="DIR", help="where they lie")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page, and run nothing")
    given = parsed(parser)
    if given.write is not None:
        about = json.loads(given.out.read_text().splitlines()[0])
        write_between_marks(given.write, "student-or-mpl", block(read(given.out), about))
        return
    made, methods, seeds = command(given.miniature), COMPARED, SEEDS
    if given.miniature:
        methods, seeds = MINIATURE_METHODS, MINIATURE_SEEDS
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs" if given.miniature else given.runs
        code = metapl([*made, "--out", str(runs), *(["--resume"] if runs.exists() else [])])
        if code:
            raise SystemExit(code)
        write(given.out, collected(runs, methods, seeds), made)


if __name__ == "__main__":
    main()
