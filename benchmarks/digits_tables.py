"""The tables and the picture of the digits study, made from its raw rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from digits_study import AT_FOUR, EMA_DECAY, ENTRIES, read
from figures import difference, spread

from metapl.metrics import paired_test

Rows = Sequence[dict[str, Any]]
READ_OUTS = ("test_accuracy", "finetuned_test_accuracy")


def seeds(rows: Rows) -> list[int]:
    """Of the final runs."""
    return sorted({r["seed"] for r in rows if r["final"]})


def column(rows: Rows, method: str, labels: int, read_out: str) -> list[float]:
    """A method's test accuracies in the order of the seeds."""
    found = {
        r["seed"]: r[read_out] for r in rows if r["final"] and r["method"] == method and r["labels_per_class"] == labels
    }
    return [found[seed] for seed in seeds(rows)]


def better_control(rows: Rows, labels: int) -> tuple[str, list[float]]:
    """The control's read-out with the higher mean on the test set."""
    columns = {read_out: column(rows, "none", labels, read_out) for read_out in READ_OUTS}
    best = max(columns, key=lambda name: statistics.fmean(columns[name]))
    return best, columns[best]


def table(rows: Rows) -> str:
    """A Markdown table per number of labels."""
    return "\n\n".join(_one_table(rows, labels, methods) for labels, methods in ((2, tuple(ENTRIES)), (4, AT_FOUR)))


def _one_table(rows: Rows, labels: int, methods: Sequence[str]) -> str:
    read_out, control = better_control(rows, labels)
    which = "finetuned student" if read_out.startswith("finetuned") else "student"
    lines = [
        f"**{labels} labels a class** (difference: the method's student against the control's {which}, its better "
        "read-out)",
        "",
        "| method | student | finetuned | difference | p |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in methods:
        student, finetuned = (column(rows, method, labels, name) for name in READ_OUTS)
        found = ("–", "–") if method == "none" else difference(student, control)
        lines.append("| " + " | ".join([ENTRIES[method].title, spread(student), spread(finetuned), *found]) + " |")
    return "\n".join(lines)


PAIRS = (
    (2, "mpl", "none", "test_accuracy"),
    (4, "mpl", "none", "test_accuracy"),
    (2, "mpl", "permuted", "test_accuracy"),
    (2, "mpl", "class_means", "test_accuracy"),
    (2, "mpl", "random_sign", "test_accuracy"),
    (2, "mpl", "difference", "test_accuracy"),
    (2, "mpl", "pseudo_labels", "finetuned_test_accuracy"),
    (4, "mpl", "pseudo_labels", "finetuned_test_accuracy"),
)
"""The comparisons that the tables of the methods do not hold: labels a class, two methods, read-out."""


def compared(rows: Rows, labels: int, first: str, second: str, read_out: str) -> tuple[str, str]:
    """The difference of the means in points, and p of the pairs."""
    return difference(column(rows, first, labels, read_out), column(rows, second, labels, read_out))


def pairs(rows: Rows) -> str:
    """A row per comparison of :data:`PAIRS`."""
    lines = ["| student against student | read-out | labels a class | difference | p |", "|---|---|---:|---:|---:|"]
    for labels, first, second, read_out in PAIRS:
        points, p = compared(rows, labels, first, second, read_out)
        which = "finetuned" if read_out.startswith("finetuned") else "student"
        titles = f"{ENTRIES[first].title} − {ENTRIES[second].title}"
        lines.append(f"| {titles} | {which} | {labels} | {points} | {p} |")
    return "\n".join(lines)


def note(rows: Rows) -> str:
    """How the numbers came about."""
    tuning = [r for r in rows if not r["final"]]
    tuned_on = len({r["seed"] for r in tuning})
    return (
        f"Test accuracy in %, mean ± standard deviation over {len(seeds(rows))} seeds (400 test images each, drawn "
        "anew per seed from the same 1,797); differences are of the means as shown, p is from a paired t-test "
        "over draws of these images, not "
        f"corrected for the number of rows. {_selection(rows)} Before, {len(tuning)} runs on {tuned_on} other seeds "
        "chose one of 12 configurations of each method, by the best checkpoint's accuracy on 197 labeled validation "
        "images; "
        "`unrolled` and `difference` take those of `forward`, whose gradient they compute. "
        "`python benchmarks/digits_study.py`; raw rows: `benchmarks/results/digits_study.jsonl`."
    )


def _selection(rows: Rows) -> str:
    """What selected the networks that were tested."""
    if any(r.get("selected", True) for r in rows if r["final"]):
        return "In every run 197 labeled validation images select the checkpoint, of the finetuned student too."
    return (
        f"In these runs nothing is selected: the student is the average of its weights (decay {EMA_DECAY}) after the "
        "last step, `finetuned` the same after 200 more steps on the labeled images."
    )


def block(rows: Rows) -> str:
    """What stands in the documentation: the tables, and how they came about."""
    return f"{table(rows)}\n\n{pairs(rows)}\n\n{note(rows)}"


def write(page: Path, raw: Path) -> None:
    """Put tables and note between the marks of a page, and draw the picture beside the page."""
    rows = read(raw)
    machine.write_between_marks(page, "digits", block(rows))
    draw(machine.figure_of(page, f"{raw.stem}.png"), rows)


COLORS = {"the whole gradient": "#0072B2", "altered feedback": "#D55E00", "others": "#555555"}
"""Of Okabe and Ito's colors, which the color-blind can tell apart."""


def _kind(method: str) -> str:
    """Which of :data:`COLORS` a method has."""
    if method in ("mpl", "unrolled", "difference", "forward_hard"):
        return "the whole gradient"
    return "altered feedback" if ENTRIES[method].title.startswith("control") else "others"


def draw(path: Path, rows: Rows) -> None:
    """The paired differences to the control's better read-out, with 95 % intervals, at 2 labels a class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    _, control = better_control(rows, 2)
    methods = [m for m in ENTRIES if m != "none"]
    tests = {m: paired_test(column(rows, m, 2, "test_accuracy"), control) for m in methods}
    methods.sort(key=lambda m: tests[m].mean)
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="0.6", linewidth=1)
    for y, method in enumerate(methods):
        test = tests[method]
        color = COLORS[_kind(method)]
        if test.interval is not None:
            axes.plot([100 * x for x in test.interval], [y, y], color=color, linewidth=2, solid_capstyle="round")
        axes.plot(100 * test.mean, y, "o", color=color, markersize=7)
    for kind, color in COLORS.items():
        axes.plot([], [], "o-", color=color, linewidth=2, markersize=7, label=kind)
    axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(range(len(methods)), [ENTRIES[m].title for m in methods])
    axes.set_xlabel("points of test accuracy above the same loop without feedback (its better read-out)")
    gain, p = difference(column(rows, "mpl", 2, "test_accuracy"), control)
    title = f"Meta Pseudo Labels: {gain} points against the loop without feedback, p = {p}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    axes.set_title(f"digits, 2 labels a class; {len(seeds(rows))} paired seeds, 95 %", loc="left", fontsize=10)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    figure.savefig(path, dpi=150)
