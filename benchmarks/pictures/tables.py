"""The table of the runs on the unseen half, with the defaults of each method.

    python -m benchmarks.pictures.tables                            # print the table
    python -m benchmarks.pictures.tables --write docs/pictures.md   # put it there

Runs of a method with the same minutes are a row of the table, averaged over their seeds.
"""

from __future__ import annotations

import statistics

from benchmarks.harness import NONE, RESULTS, Row, arguments, grid, parsed, read, show
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


def table(rows: list[Row]) -> str:
    """A line a method and minutes: mean test accuracies in % of what was delivered, each problem and their mean; the
    mean and the smallest difference to supervised; seconds a run, and seeds."""
    names, keys = [problem.name for problem in half("unseen")], {(row["method"], row["minutes"]) for row in rows}
    of = {key: [row for row in rows if (row["method"], row["minutes"]) == key] for key in keys}
    means = {
        key: [statistics.fmean(100 * row["test_accuracy"] for row in own if row["problem"] == name) for name in names]
        for key, own in of.items()
    }
    lines = []
    for method, minutes in sorted(keys, key=lambda key: ([*TITLES].index(key[0]), key[1])):
        own, reached, lead = of[method, minutes], means[method, minutes], [NONE, NONE]
        label = TITLES[method] + (f", {minutes:g} min" if len({minutes for _, minutes in keys}) > 1 else "")
        if method != BASELINE:  # in the same minutes
            differences = [a - b for a, b in zip(reached, means[BASELINE, minutes], strict=True)]
            lead = [f"{statistics.fmean(differences):+.1f}", f"{min(differences):+.1f}"]
        cells = [f"{mean:.1f}" for mean in (*reached, statistics.fmean(reached))]
        seconds = statistics.fmean(row["seconds"] for row in own)
        lines.append([label, *cells, *lead, f"{seconds:.0f}", len(own) // len(names)])
    # Of guessing on the test set.
    chance = [100 * chance_level(class_counts(len(p.classes), p.test, p.imbalance)) for p in half("unseen")]
    lines.append(["chance", *(f"{value:.1f}" for value in (*chance, statistics.fmean(chance))), *[""] * 4])
    return grid(["method", *names, "mean", "minus supervised: mean", "lowest", "seconds", "seeds"], lines)


def main() -> None:
    given = parsed(arguments(__doc__, RAW))
    show(given.write, "unseen", table(read(given.out)))


if __name__ == "__main__":
    main()
