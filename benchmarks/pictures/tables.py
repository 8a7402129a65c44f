"""The table and the figure of the runs on the unseen half, with the defaults of each method.

    python -m benchmarks.pictures.tables                            # print the table
    python -m benchmarks.pictures.tables --write docs/pictures.md   # put it there, and the figure beside it

Runs of a method with the same minutes are a row of the table, averaged over their seeds.
"""

from __future__ import annotations

import statistics
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import NONE, RESULTS, Row, arguments, figure_of, grid, parsed, read, show
from benchmarks.pictures.problems import class_counts, half
from metapl.metrics import chance_level

RAW = RESULTS / "pictures_unseen.jsonl"
TITLES = {
    "uda": "UDA, half aligned (the default)",
    "fixmatch": "FixMatch",
    "pseudo_labels": "pseudo labels of a fixed teacher",
    "supervised": "supervised, the same views",
    "mpl": "Meta Pseudo Labels",
    "none": "the same without feedback",
}
BASELINE = "supervised"


class Group(NamedTuple):
    """The runs of a row of the table: mean test accuracies in % of what was delivered, by problem."""

    label: str
    means: dict[str, float]
    seconds: float
    seeds: int


def grouped(rows: list[Row]) -> dict[tuple[str, float], Group]:
    """By method, in the order of :data:`TITLES`, and by minutes."""
    keys, found = {(row["method"], row["minutes"]) for row in rows}, {}
    for method, minutes in sorted(keys, key=lambda key: ([*TITLES].index(key[0]), key[1])):
        own = [row for row in rows if (row["method"], row["minutes"]) == (method, minutes)]
        reached = {
            p.name: [100 * row["test_accuracy"] for row in own if row["problem"] == p.name] for p in half("unseen")
        }
        label = TITLES[method] + (f", {minutes:g} min" if len({minutes for _, minutes in keys}) > 1 else "")
        means = {name: statistics.fmean(values) for name, values in reached.items()}
        seconds, (seeds,) = statistics.fmean(row["seconds"] for row in own), {*map(len, reached.values())}
        found[method, minutes] = Group(label, means, seconds, seeds)
    return found


def table(rows: list[Row]) -> str:
    """A line a group: each problem, the mean, the smallest difference to supervised, seconds a run, and seeds."""
    groups, lines = grouped(rows), []
    for (method, minutes), (label, means, seconds, seeds) in groups.items():
        cells = [f"{mean:.1f}" for mean in (*means.values(), statistics.fmean(means.values()))]
        lead = [NONE, NONE]
        if method != BASELINE:  # in the same minutes
            against = groups[BASELINE, minutes].means
            differences = [mean - against[name] for name, mean in means.items()]
            lead = [f"{statistics.fmean(differences):+.1f}", f"{min(differences):+.1f}"]
        lines.append([label, *cells, *lead, f"{seconds:.0f}", seeds])
    # Of guessing on the test set.
    chance = [100 * chance_level(class_counts(len(p.classes), p.test, p.imbalance)) for p in half("unseen")]
    lines.append(["chance", *(f"{value:.1f}" for value in (*chance, statistics.fmean(chance))), *[""] * 4])
    names = [problem.name for problem in half("unseen")]
    return grid(["method", *names, "mean", "minus supervised: mean", "lowest", "seconds", "seeds"], lines)


def draw(rows: list[Row], file: Path) -> None:
    """Each problem's accuracies on a line, a mark a group."""
    import matplotlib.pyplot as plt

    groups = grouped(rows)
    longest = max(minutes for _, minutes in groups)
    by_supervised = next(group.means for (method, _), group in groups.items() if method == BASELINE)
    problems = sorted(by_supervised, key=lambda name: by_supervised[name])
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(problems) + 1.4), layout="constrained")
    lines = range(len(problems))
    every = [[group.means[name] for group in groups.values()] for name in problems]
    axes.hlines(lines, [min(values) for values in every], [max(values) for values in every], color="0.85", zorder=1)
    for marker, group in zip(cycle("osD^vPX"), groups.values(), strict=False):
        axes.scatter([group.means[p] for p in problems], lines, marker=marker, label=group.label, zorder=2, s=36)
    axes.set(yticks=lines, yticklabels=problems, xlabel="test accuracy in %", xlim=(0, 102))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    means = [
        f"{TITLES[method].split(' (')[0]} {statistics.fmean(group.means.values()):.1f} %"
        for (method, minutes), group in groups.items()
        if minutes == longest
    ]
    figure.suptitle(f"Mean in {longest:g} minutes: {', '.join(means)}", fontsize=9.5)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    given = parsed(arguments(__doc__, RAW))
    rows = read(given.out)
    show(given.write, "unseen", table(rows))
    if given.write is not None:
        draw(rows, figure_of(given.write, "pictures.png"))


if __name__ == "__main__":
    main()
