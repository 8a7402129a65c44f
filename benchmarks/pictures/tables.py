"""The table and the figure of the runs on the generated problems.

Runs of the same method, minutes and settings are a row of the table, averaged over their seeds.

python -m benchmarks.pictures.tables --half unseen                      # print the table
python -m benchmarks.pictures.tables --half unseen --write docs/pictures.md --figure docs/pictures.png
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from benchmarks.harness import RESULTS, Row, read, show
from benchmarks.pictures.drawing import Problem
from benchmarks.pictures.problems import class_counts, half
from metapl.metrics import chance_level

TITLES = {
    "uda": "UDA (the default)",
    "fixmatch": "FixMatch-like",
    "pseudo_labels": "pseudo labels of a fixed teacher",
    "supervised": "supervised, the same views",
    "label_smoothing": "supervised with label smoothing, the same views",
    "mpl": "Meta Pseudo Labels",
    "none": "the same without feedback",
}
BASELINE = "supervised"

LINE = 100
"""Letters of the legend that the figure has room for, side by side."""


@dataclass(frozen=True)
class Group:
    """What the runs of a row of the table have in common.

    Args:
        method: its name.
        minutes: of each run.
        settings: names and values that differ from the defaults, in the order of the names.
    """

    method: str
    minutes: float
    settings: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, row: Row) -> Group:
        settings = {name: str(value) for name, value in row["settings"].items()}
        return cls(row["method"], row["minutes"], tuple(sorted(settings.items())))

    def label(self, minutes: bool) -> str:
        """The method in words, with its settings and, if wanted, its minutes."""
        told = [f"{name} {value}" for name, value in self.settings]
        return ", ".join([TITLES[self.method], *([f"{self.minutes:g} min"] if minutes else []), *told])


@dataclass(frozen=True)
class Summary:
    """The runs of a group.

    Args:
        accuracies: test accuracy in % of what was delivered, by problem, averaged over seeds.
        seeds: how many seeds a problem has: the fewest and the most.
        seconds: a run, on average.
    """

    accuracies: dict[str, float]
    seeds: tuple[int, int]
    seconds: float

    @classmethod
    def of(cls, rows: list[Row]) -> Summary:
        found: dict[str, list[float]] = {}
        for row in rows:
            found.setdefault(row["problem"], []).append(100 * row["test_accuracy"])
        counts = [len(values) for values in found.values()]
        means = {problem: statistics.fmean(values) for problem, values in found.items()}
        return cls(means, (min(counts), max(counts)), statistics.fmean(row["seconds"] for row in rows))


def summaries(rows: list[Row]) -> dict[Group, Summary]:
    """The groups in the order of :data:`TITLES`, then by minutes, the defaults first."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault(Group.of(row), []).append(row)
    order = list(TITLES)
    groups = sorted(found, key=lambda one: (order.index(one.method), one.minutes, len(one.settings), one.settings))
    return {group: Summary.of(found[group]) for group in groups}


def labels(groups: dict[Group, Summary]) -> dict[Group, str]:
    """What each is called; with the minutes where these differ."""
    differ = len({group.minutes for group in groups}) > 1
    return {group: group.label(differ) for group in groups}


def baseline(group: Group, groups: dict[Group, Summary]) -> Summary | None:
    """Supervised training in the same minutes: with the same settings if that was run, else with the defaults."""
    wanted = (Group(BASELINE, group.minutes, settings) for settings in (group.settings, ()))
    return next((groups[one] for one in wanted if one in groups), None)


def shared(groups: dict[Group, Summary], name: str) -> list[str]:
    """The problems of a half that every group has."""
    problems = [p.name for p in half(name) if all(p.name in one.accuracies for one in groups.values())]
    if not problems:
        raise SystemExit(
            f"no problem of the {name} half was run with every one of: {'; '.join(labels(groups).values())}. Run what "
            "is missing, or take other rows out of the raw file."
        )
    return problems


def table(rows: list[Row], name: str) -> str:
    """A line a group: each problem, the mean, the smallest difference to supervised, seconds a run, and seeds."""
    groups = summaries(rows)
    problems, called = shared(groups, name), labels(groups)
    lines = [
        "| method | " + " | ".join(problems) + " | mean | against supervised: mean | worst | seconds | seeds |",
        "|---|" + "---:|" * (len(problems) + 5),
    ]
    for group, found in groups.items():
        against = baseline(group, groups)
        differences = ("–", "–")
        if against is not None and group.method != BASELINE:
            points = [found.accuracies[p] - against.accuracies[p] for p in problems]
            differences = (f"{statistics.fmean(points):+.1f}", f"{min(points):+.1f}")
        cells = [f"{found.accuracies[p]:.1f}" for p in problems]
        mean = f"{statistics.fmean(found.accuracies[p] for p in problems):.1f}"
        fewest, most = found.seeds
        seeds = f"{fewest}" if fewest == most else f"{fewest}-{most}"
        cells += [mean, *differences, f"{found.seconds:.0f}", seeds]
        lines.append(f"| {called[group]} | " + " | ".join(cells) + " |")
    chance = [100 * chance_of(problem) for problem in half(name) if problem.name in problems]
    cells = [f"{value:.1f}" for value in (*chance, statistics.fmean(chance))]
    return "\n".join([*lines, "| chance | " + " | ".join([*cells, "", "", "", ""]) + " |"])


def chance_of(problem: Problem) -> float:
    """The accuracy of guessing on a problem's test set; see :func:`metapl.metrics.chance_level`."""
    return chance_level(class_counts(len(problem.classes), problem.test, problem.imbalance))


def draw(rows: list[Row], name: str, file: Path) -> None:
    """Each problem's accuracies on a line, a mark a group."""
    import matplotlib.pyplot as plt

    groups = summaries(rows)
    problems, called = shared(groups, name), labels(groups)
    by_label = {called[group]: found.accuracies for group, found in groups.items()}
    by_supervised = next((one.accuracies for group, one in groups.items() if group.method == BASELINE), None)
    if by_supervised is not None:
        problems.sort(key=lambda problem: by_supervised[problem])
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(problems) + 1.4), layout="constrained")
    lines = range(len(problems))
    every = [[found[p] for found in by_label.values()] for p in problems]
    axes.hlines(lines, [min(values) for values in every], [max(values) for values in every], color="0.85", zorder=1)
    for marker, (label, found) in zip(cycle("osD^vPX"), by_label.items(), strict=False):
        axes.scatter([found[p] for p in problems], lines, marker=marker, label=label, zorder=2, s=36)
    axes.set(yticks=lines, yticklabels=problems, xlabel="test accuracy in %", xlim=(0, 102))
    axes.spines[["top", "right", "left"]].set_visible(False)
    columns = max(1, min(3, LINE // (max(map(len, by_label)) + len("mark  "))))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    longest = max(group.minutes for group in groups)
    means = [
        f"{TITLES[group.method].split(' (')[0]} {statistics.fmean(found.accuracies[p] for p in problems):.1f} %"
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
    text = table(rows, given.half)
    print(text)
    if given.write is not None:
        show(given.write, given.half, text)
    if given.figure is not None:
        draw(rows, given.half, given.figure)


if __name__ == "__main__":
    main()
