"""The table and the figure of the runs on the generated problems.

python -m benchmarks.pictures.tables --half unseen                      # print the table
python -m benchmarks.pictures.tables --half unseen --write docs/pictures.md --figure docs/pictures.png
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.machine import write_readme
from benchmarks.pictures.problem import Problem
from benchmarks.pictures.problems import class_counts, half
from benchmarks.pictures.run import RESULTS, Row, read
from metapl.evaluate import chance_level

TITLES = {
    "uda": "UDA (the default)",
    "fixmatch": "FixMatch-like",
    "pseudo_labels": "pseudo labels of a fixed teacher",
    "supervised": "supervised, the same views",
    "mpl": "Meta Pseudo Labels",
    "none": "the same without feedback",
}
BASELINE = "supervised"


def accuracies(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Test accuracy in % of what was delivered, by method and problem, averaged over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row["method"], {}).setdefault(row["problem"], []).append(100 * row["test_accuracy"])
    return {method: {p: statistics.fmean(v) for p, v in found[method].items()} for method in TITLES if method in found}


def table(rows: list[Row], name: str) -> str:
    """A row a method: each problem, the mean, the smallest difference to supervised, and seconds a run."""
    by_method = accuracies(rows)
    problems = [problem.name for problem in half(name) if all(problem.name in one for one in by_method.values())]
    lines = [
        "| method | " + " | ".join(problems) + " | mean | against supervised: mean | worst | seconds |",
        "|---|" + "---:|" * (len(problems) + 4),
    ]
    for method, found in by_method.items():
        against = [found[p] - by_method[BASELINE][p] for p in problems]
        seconds = statistics.fmean(row["seconds"] for row in rows if row["method"] == method)
        differences = (
            ("–", "–") if method == BASELINE else (f"{statistics.fmean(against):+.1f}", f"{min(against):+.1f}")
        )
        cells = [f"{found[p]:.1f}" for p in problems]
        mean = f"{statistics.fmean(found[p] for p in problems):.1f}"
        lines.append(f"| {TITLES[method]} | " + " | ".join([*cells, mean, *differences, f"{seconds:.0f}"]) + " |")
    chance = [100 * chance_of(problem) for problem in half(name) if problem.name in problems]
    cells = [f"{value:.1f}" for value in (*chance, statistics.fmean(chance))]
    return "\n".join([*lines, "| chance | " + " | ".join([*cells, "", "", ""]) + " |"])


def chance_of(problem: Problem) -> float:
    """The accuracy of guessing on a problem's test set; see :func:`metapl.evaluate.chance_level`."""
    return chance_level(class_counts(len(problem.classes), problem.test, problem.imbalance))


def draw(rows: list[Row], name: str, file: Path) -> None:
    """Each problem's accuracies on a line, a mark a method."""
    import matplotlib.pyplot as plt

    by_method = accuracies(rows)
    problems = [problem.name for problem in half(name) if all(problem.name in one for one in by_method.values())]
    problems.sort(key=lambda problem: by_method[BASELINE][problem])
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(problems) + 1.4), layout="constrained")
    lines = range(len(problems))
    every = [[found[p] for found in by_method.values()] for p in problems]
    axes.hlines(lines, [min(values) for values in every], [max(values) for values in every], color="0.85", zorder=1)
    for marker, (method, found) in zip("osD^vP", by_method.items(), strict=False):
        axes.scatter([found[p] for p in problems], lines, marker=marker, label=TITLES[method], zorder=2, s=36)
    axes.set(yticks=lines, yticklabels=problems, xlabel="test accuracy in %", xlim=(0, 102))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("seen", "unseen"), default="seen")
    parser.add_argument("--rows", type=Path, help="the raw file; benchmarks/results/pictures_HALF.jsonl by default")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--figure", type=Path, metavar="FILE.png")
    given = parser.parse_args()
    rows = read(given.rows or RESULTS / f"pictures_{given.half}.jsonl")
    text = table(rows, given.half)
    print(text)
    if given.write is not None:
        write_readme(given.write, given.half, text)
    if given.figure is not None:
        draw(rows, given.half, given.figure)


if __name__ == "__main__":
    main()
