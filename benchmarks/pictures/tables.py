"""The table and the figure of the runs on the generated problems.

Runs of the same method, minutes and settings are a row of the table, averaged over their seeds.

python -m benchmarks.pictures.tables --half unseen                      # print the table
python -m benchmarks.pictures.tables --half unseen --write docs/pictures.md --figure docs/pictures.png
"""

from __future__ import annotations

import argparse
import statistics
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import NONE, RESULTS, Row, grid, read, show
from benchmarks.pictures.problems import class_counts, half
from metapl.metrics import chance_level

TITLES = {
    "uda": "UDA, half aligned (the default)",
    "fixmatch": "FixMatch",
    "pseudo_labels": "pseudo labels of a fixed teacher",
    "supervised": "supervised, the same views",
    "label_smoothing": "supervised with label smoothing, the same views",
    "mpl": "Meta Pseudo Labels",
    "none": "the same without feedback",
}
BASELINE = "supervised"
LINE = 100  # letters of the legend that the figure has room for, side by side


class Group(NamedTuple):
    """What the runs of a row of the table have in common; of the settings, those that differ from the defaults."""

    method: str
    minutes: float
    settings: tuple[tuple[str, str], ...]


class Summary(NamedTuple):
    """The runs of a group: what they are called, test accuracies in % of what was delivered by problem, and seconds of
    a run on average."""

    label: str
    accuracies: dict[str, list[float]]
    seconds: float

    def mean(self, problem: str) -> float:
        return statistics.fmean(self.accuracies[problem])


def summaries(rows: list[Row]) -> dict[Group, Summary]:
    """The groups in the order of :data:`TITLES`, then by minutes, the defaults first."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        settings = tuple(sorted((name, str(value)) for name, value in row["settings"].items()))
        found.setdefault(Group(row["method"], row["minutes"], settings), []).append(row)
    order, differ = list(TITLES), len({group.minutes for group in found}) > 1
    summed = {}
    for group in sorted(found, key=lambda one: (order.index(one.method), one.minutes, len(one.settings), one.settings)):
        told = [TITLES[group.method], *[f"{group.minutes:g} min"] * differ, *(f"{n} {v}" for n, v in group.settings)]
        accuracies: dict[str, list[float]] = {}
        for row in found[group]:
            accuracies.setdefault(row["problem"], []).append(100 * row["test_accuracy"])
        summed[group] = Summary(", ".join(told), accuracies, statistics.fmean(row["seconds"] for row in found[group]))
    return summed


def shared(groups: dict[Group, Summary], name: str) -> list[str]:
    """The problems of a half that every group has."""
    problems = [p.name for p in half(name) if all(p.name in one.accuracies for one in groups.values())]
    if not problems:
        called = "; ".join(one.label for one in groups.values())
        raise SystemExit(
            f"no problem of the {name} half was run with every one of: {called}. Run what is missing, or take other "
            "rows out of the raw file."
        )
    return problems


def table(rows: list[Row], name: str) -> str:
    """A line a group: each problem, the mean, the smallest difference to supervised, seconds a run, and seeds."""
    groups, lines = summaries(rows), []
    problems = shared(groups, name)
    for group, found in groups.items():
        # Supervised training in the same minutes: with the same settings if that was run, else with the defaults.
        wanted = (Group(BASELINE, group.minutes, settings) for settings in (group.settings, ()))
        against, means = next((groups[one] for one in wanted if one in groups), None), [found.mean(p) for p in problems]
        lead = [NONE, NONE]
        if against is not None and group.method != BASELINE:
            differences = [mean - against.mean(p) for mean, p in zip(means, problems, strict=True)]
            lead = [f"{statistics.fmean(differences):+.1f}", f"{min(differences):+.1f}"]
        counts = [len(values) for values in found.accuracies.values()]
        seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
        cells = [f"{mean:.1f}" for mean in (*means, statistics.fmean(means))]
        lines.append([found.label, *cells, *lead, f"{found.seconds:.0f}", seeds])
    # Of guessing on the test set.
    chance = [100 * chance_level(class_counts(len(p.classes), p.test, p.imbalance)) for p in half(name)]
    chance = [value for value, p in zip(chance, half(name), strict=True) if p.name in problems]
    lines.append(["chance", *(f"{value:.1f}" for value in (*chance, statistics.fmean(chance))), *[""] * 4])
    return grid(["method", *problems, "mean", "minus supervised: mean", "lowest", "seconds", "seeds"], lines)


def draw(rows: list[Row], name: str, file: Path) -> None:
    """Each problem's accuracies on a line, a mark a group."""
    import matplotlib.pyplot as plt

    groups = summaries(rows)
    problems = shared(groups, name)
    supervised = next((one for group, one in groups.items() if group.method == BASELINE), None)
    if supervised is not None:
        problems.sort(key=supervised.mean)
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(problems) + 1.4), layout="constrained")
    lines = range(len(problems))
    every = [[found.mean(p) for found in groups.values()] for p in problems]
    axes.hlines(lines, [min(values) for values in every], [max(values) for values in every], color="0.85", zorder=1)
    for marker, found in zip(cycle("osD^vPX"), groups.values(), strict=False):
        axes.scatter([found.mean(p) for p in problems], lines, marker=marker, label=found.label, zorder=2, s=36)
    axes.set(yticks=lines, yticklabels=problems, xlabel="test accuracy in %", xlim=(0, 102))
    axes.spines[["top", "right", "left"]].set_visible(False)
    columns = max(1, min(3, LINE // (max(len(one.label) for one in groups.values()) + len("mark  "))))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    longest = max(group.minutes for group in groups)
    means = [
        f"{TITLES[group.method].split(' (')[0]} {statistics.fmean(map(found.mean, problems)):.1f} %"
        for group, found in groups.items()
        if group.minutes == longest and not group.settings
    ]
    figure.suptitle(f"Mean in {longest:g} minutes: {', '.join(means)}", fontsize=9.5)
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
    show(given.write, given.half, table(rows, given.half))
    if given.figure is not None:
        draw(rows, given.half, given.figure)


if __name__ == "__main__":
    main()
