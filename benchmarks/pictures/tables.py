"""The tables and the figure of the runs on the unseen half: by methods, and from a backbone.

Beside them stands what the race of recipes, the command's default, takes and gives there.

    python -m benchmarks.pictures.tables                            # print the tables
    python -m benchmarks.pictures.tables --write docs/pictures.md   # put them there, and the figure

Runs of a method with the same minutes are a row of the first table, averaged over their seeds.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    NONE,
    RESULTS,
    Row,
    arguments,
    figure_of,
    grid,
    interval,
    parsed,
    read,
    show,
)
from benchmarks.pictures.problems import class_counts, half
from metapl.metrics import chance_level

RAW = RESULTS / "pictures_unseen.jsonl"
BACKBONE = RESULTS / "pictures_backbone.jsonl"
RACE = RESULTS / "pictures_unseen_auto.jsonl"
TITLES = {
    "uda": "UDA, half aligned",
    "fixmatch": "FixMatch",
    "pseudo_labels": "pseudo labels of a fixed teacher",
    "supervised": "supervised, the same views",
    "mpl": "Meta Pseudo Labels",
    "none": "the same without feedback",
}
BASELINE = "supervised"
Means = dict[tuple[str, float], list[float]]


def reached(rows: list[Row]) -> Means:
    """Return mean test accuracies in % of what was delivered, by method and minutes.

    A list has each problem's.
    """
    names = [problem.name for problem in half("unseen")]
    keys = {(row["method"], row["minutes"]) for row in rows}
    of = {key: [row for row in rows if (row["method"], row["minutes"]) == key] for key in keys}
    return {
        key: [
            statistics.fmean(100 * row["test_accuracy"] for row in of[key] if row["problem"] == p)
            for p in names
        ]
        for key in sorted(keys, key=lambda key: ([*TITLES].index(key[0]), key[1]))
    }


def table(rows: list[Row]) -> str:
    """Return a line a method and minutes.

    A line has each problem and their mean; the mean and the smallest difference to supervised;
    seconds a run, and seeds.
    """
    names, means = [problem.name for problem in half("unseen")], reached(rows)
    lines = []
    for (method, minutes), shares in means.items():
        own = [row for row in rows if (row["method"], row["minutes"]) == (method, minutes)]
        lead = [NONE, NONE]
        if method != BASELINE:  # in the same minutes
            differences = [a - b for a, b in zip(shares, means[BASELINE, minutes], strict=True)]
            lead = [f"{statistics.fmean(differences):+.1f}", f"{min(differences):+.1f}"]
        cells = [f"{mean:.1f}" for mean in (*shares, statistics.fmean(shares))]
        seconds = statistics.fmean(row["seconds"] for row in own)
        lines.append(
            [
                f"{TITLES[method]}, {minutes:g} min",
                *cells,
                *lead,
                f"{seconds:.0f}",
                len(own) // len(names),
            ]
        )
    # Of guessing on the test set.
    chance = [
        100 * chance_level(class_counts(len(p.classes), p.test, p.imbalance))
        for p in half("unseen")
    ]
    lines.append(
        ["chance", *(f"{value:.1f}" for value in (*chance, statistics.fmean(chance))), *[""] * 4]
    )
    return grid(
        ["method", *names, "mean", "minus supervised: mean", "lowest", "seconds", "seeds"], lines
    )


def from_backbone(rows: list[Row]) -> str:
    """Return a line a start, time and method, the linear baseline of each start before.

    The cells are test accuracies in %.
    """
    found = dict[Any, dict[str, float]]()
    names = list(dict.fromkeys(row["problem"] for row in rows))
    for row in rows:
        of, baseline = row["settings"], ("linear baseline", "")
        start, head = ("backbone" if "backbone" in of else "scratch"), of.get("tuning") == "head"
        time = f"{of['steps']} steps" if "steps" in of else f"{row['minutes']:g} min"
        title = TITLES[row["method"]].partition(",")[0] + ", head alone" * head
        key = row["minutes"], head, [*TITLES].index(row["method"]), title, time
        found.setdefault((start, 0, False, 0, *baseline), {})[row["problem"]] = row[
            "control_accuracy"
        ]
        found.setdefault((start, *key), {})[row["problem"]] = row["test_accuracy"]
    cells = (
        [f"{100 * of[name]:.1f}" if name in of else NONE for name in names]
        for _, of in sorted(found.items())
    )
    lines = (
        [start, time, title, *of]
        for (start, *_, title, time), of in zip(sorted(found), cells, strict=True)
    )
    return grid(["from", "time", "method", *names], lines, 3)


def race(rows: list[Row]) -> str:
    """Return a line a problem: the accuracy of the race of recipes, that of UDA, and the recipe.

    The last line has the means, and the mean difference with its 95 % interval over the problems.
    """
    accuracies: dict[str, dict[str, float]] = {"auto": {}, "uda": {}}
    recipes: dict[str, str] = {}
    for row in rows:
        accuracies[row["method"]][row["problem"]] = 100 * row["test_accuracy"]
        if row["method"] == "auto":
            recipes[row["problem"]] = row["chosen"]["recipe"]
    names = [name for name in accuracies["auto"] if name in accuracies["uda"]]
    auto = [accuracies["auto"][name] for name in names]
    uda = [accuracies["uda"][name] for name in names]
    lines = []
    for name, first, second in zip(names, auto, uda, strict=True):
        difference = f"{first - second:+.1f}"
        lines.append([name, f"{first:.1f}", f"{second:.1f}", difference, recipes[name]])
    means = [f"{statistics.fmean(values):.1f}" for values in (auto, uda)]
    lines.append(["mean", *means, interval(auto, uda, form="+.1f"), ""])
    head = ["problem", "auto", "UDA", "auto minus UDA", "the recipe that auto took"]
    return grid(head, lines, "lrrrl")


def draw(means: Means, file: Path) -> None:
    """Draw each problem's accuracies on a line, a mark a method and minutes."""
    from matplotlib.figure import Figure

    names = [problem.name for problem in half("unseen")]
    longest = max(minutes for _, minutes in means)
    figure = Figure(figsize=(7, 0.45 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    order = sorted(range(len(names)), key=lambda i: means[BASELINE, longest][i])
    for marker, ((method, minutes), shares) in zip("osD^vPX", means.items(), strict=False):
        label = f"{TITLES[method]}, {minutes:g} min"
        axes.scatter([shares[i] for i in order], range(len(order)), marker=marker, label=label)
    axes.set(
        yticks=range(len(order)),
        yticklabels=[names[i] for i in order],
        xlabel="test accuracy in %",
        xlim=(0, 102),
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color="0.85")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    each = {
        method: statistics.fmean(shares)
        for (method, minutes), shares in means.items()
        if minutes == longest
    }
    texts = [f"{TITLES[method].split(' (')[0]} {mean:.1f} %" for method, mean in each.items()]
    figure.suptitle(f"Mean in {longest:g} minutes: {', '.join(texts)}", fontsize=9.5)
    figure.savefig(file, dpi=120)


def main() -> None:
    given = parsed(arguments(__doc__, RAW))
    rows = read(given.out)
    show(given.write, "unseen", table(rows))
    show(
        given.write,
        "backbone",
        from_backbone([row for row in read(BACKBONE) if row["half"] == "unseen"]),
    )
    show(given.write, "race", race(read(RACE)))
    if given.write is not None:
        draw(reached(rows), figure_of(given.write, "pictures.png"))


if __name__ == "__main__":
    main()
