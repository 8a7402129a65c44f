"""The tables and the figure of the study of label noise, made from its raw rows alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from label_noise import ALTERATIONS, BASELINES, BILEVEL, CONDITIONS, ENTRIES, chosen, read

from metapl.metrics import paired_test

Rows = Sequence[dict[str, Any]]
STUDENT, FINETUNED = "test_accuracy", "finetuned_test_accuracy"
NONE = "–"


def column(rows: Rows, method: str, condition: str, read_out: str) -> list[float] | None:
    """A method's figures in a condition in the order of the seeds; None where not every seed has one."""
    found = {
        row["seed"]: row.get(read_out)
        for row in rows
        if row["final"] and (row["method"], row["condition"]) == (method, condition)
    }
    if set(found) != set(seeds(rows)) or any(value is None for value in found.values()):
        return None
    return [float(found[seed]) for seed in seeds(rows)]


def seeds(rows: Rows) -> list[int]:
    """Of the final runs."""
    return sorted({row["seed"] for row in rows if row["final"]})


def _methods(rows: Rows) -> list[str]:
    """Those that were run in every condition."""
    return [
        name for name in ENTRIES if all(column(rows, name, condition, STUDENT) is not None for condition in CONDITIONS)
    ]


def _mean(values: Sequence[float] | None, scale: float = 100.0) -> str:
    """Mean ± standard error."""
    if values is None:
        return NONE
    digits = 1 if scale == 100 else 3
    error = scale * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def _head(first: str) -> list[str]:
    return [f"| {first} | " + " | ".join(CONDITIONS.values()) + " |", "|---|" + "---:|" * len(CONDITIONS)]


def accuracies(rows: Rows, read_out: str) -> str:
    """Test accuracy by method and condition."""
    lines = _head("student" if read_out == STUDENT else "student, finetuned on the handful")
    for name in _methods(rows):
        cells = [_mean(column(rows, name, condition, read_out)) for condition in CONDITIONS]
        lines.append(f"| {ENTRIES[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(rows: Rows, first: str, second: str, condition: str, read_out: str) -> str:
    """Of the means in points ± its standard error, and p of the paired t-test."""
    return _difference(*(column(rows, name, condition, read_out) for name in (first, second)))


def _difference(a: Sequence[float] | None, b: Sequence[float] | None) -> str:
    if a is None or b is None:
        return NONE
    test = paired_test(a, b)
    if test.std is None or test.p is None:
        return f"{100 * test.mean:+.1f}"
    return f"{100 * test.mean:+.1f} ± {100 * test.std / math.sqrt(test.n):.1f} ({_p(test.p)})"


def _p(p: float) -> str:
    return f"{p:.1g}" if p < 0.1 else f"{p:.2f}"


def differences(rows: Rows) -> str:
    """What the true feedback adds: to altered feedback, and to the best of the plain methods."""
    lines = _head("student against student")
    there = _methods(rows)
    for name in BILEVEL:
        for how in ALTERATIONS:
            if f"{name}_{how}" in there:
                cells = [difference(rows, name, f"{name}_{how}", condition, STUDENT) for condition in CONDITIONS]
                lines.append(f"| {ENTRIES[name].title} − {ALTERATIONS[how]} | " + " | ".join(cells) + " |")
    for name in BILEVEL:
        lines.append(_against(rows, name, "plain"))
    lines += [_against(rows, "metagradient_descent", name) for name in ("example_weights", "example_weights_long")]
    lines += ["", *_head("finetuned student against the best plain read-out")]
    for name in BILEVEL:
        cells = [
            _difference(column(rows, name, condition, FINETUNED), best_plain(rows, condition))
            for condition in CONDITIONS
        ]
        lines.append(f"| {ENTRIES[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _against(rows: Rows, first: str, second: str) -> str:
    cells = [difference(rows, first, second, condition, STUDENT) for condition in CONDITIONS]
    return f"| {ENTRIES[first].title} − {ENTRIES[second].title} | " + " | ".join(cells) + " |"


def best_plain(rows: Rows, condition: str) -> list[float]:
    """Of the plain methods' students, finetuned or not, those with the highest mean on the test set, which favors
    them."""
    columns = [column(rows, name, condition, read_out) for name in BASELINES for read_out in (STUDENT, FINETUNED)]
    return max((values for values in columns if values is not None), key=statistics.fmean)


def detection(rows: Rows) -> str:
    """How well the wrong labels are found."""
    noisy = [condition for condition in CONDITIONS if not condition.startswith("imbalance")]
    lines = [
        "| AUC | " + " | ".join(CONDITIONS[condition] for condition in noisy) + " |",
        "|---|" + "---:|" * len(noisy),
    ]
    for name in _methods(rows):
        for read_out, what in (("auc", "by what it learned about labels"), ("auc_by_loss", "by its student's loss")):
            columns = [column(rows, name, condition, read_out) for condition in noisy]
            if all(values is not None for values in columns):
                cells = [_mean(values, scale=1.0) for values in columns]
                lines.append(f"| {ENTRIES[name].title}, {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def note(rows: Rows) -> str:
    """How the numbers came about."""
    tuning = [row for row in rows if not row["final"]]
    count = len(seeds(rows))
    return (
        f"Test accuracy in %, mean ± standard error over {count} seeds (400 test images each, drawn anew per seed from "
        "the same 1,797); differences are paired by seed, in points ± standard error, with p of the paired t-test "
        "over draws of these images, not "
        f"corrected for the number of cells. {len(tuning)} runs on {len({row['seed'] for row in tuning})} other seeds "
        "chose one of 4 configurations of each method in each condition. `python benchmarks/label_noise.py`; raw rows: "
        "`benchmarks/results/label_noise.jsonl`."
    )


def settings(rows: Rows) -> str:
    """The configurations that tuning chose."""
    lines = _head("chosen")
    for name in (name for name, entry in ENTRIES.items() if entry.grid):
        cells = [
            ", ".join(f"{key} {value:g}" for key, value in chosen(rows, name, condition).items())
            for condition in CONDITIONS
        ]
        lines.append(f"| {ENTRIES[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(raw: Path) -> list[str]:
    """What each method's training costs; nothing where that was not measured."""
    measured = [row["costs"] for line in raw.read_text().splitlines() if "costs" in (row := json.loads(line))]
    lines = ["| cost | processor time, s | over plain training |", "|---|---:|---:|"]
    for name, seconds in measured[-1].items() if measured else ():
        lines.append(f"| {ENTRIES[name].title} | {seconds:.1f} | {seconds / measured[-1]['plain']:.1f} |")
    return ["\n".join([*lines, "", "20 seeds side by side, one thread, by `--costs`."])] if measured else []


def block(raw: Path) -> str:
    """What stands in the documentation."""
    rows = read(raw)
    parts = [accuracies(rows, STUDENT), accuracies(rows, FINETUNED), differences(rows), detection(rows), settings(rows)]
    return "\n\n".join([*parts, *costs(raw), note(rows)])


def write(page: Path, raw: Path) -> None:
    """Put the tables between the marks of a page, and draw the figure beside the page."""
    machine.write_between_marks(page, "label_noise", block(raw))
    draw(machine.figure_of(page, f"{raw.stem}.png"), read(raw))


COLORS = {"own": "#0072B2", "altered": "#D55E00", "plain": "#555555"}
"""Of Okabe and Ito's colors, which the color-blind can tell apart."""

MARKERS = {"": ("o", "own", "its own feedback"), "permuted": ("s", "altered", "feedback permuted")}
MARKERS["random_sign"] = ("^", "altered", "feedback with random signs")


def draw(path: Path, rows: Rows) -> None:
    """Test accuracy of the students with 95 % intervals: own feedback, altered feedback, plain methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, len(CONDITIONS), sharey=True)
    there, names = _methods(rows), [*reversed(BILEVEL), *reversed(BASELINES)]
    for panel, (condition, title) in zip(panels, CONDITIONS.items(), strict=True):
        for y, name in enumerate(names):
            if name in BASELINES:
                _dot(panel, column(rows, name, condition, STUDENT), y, "D", COLORS["plain"])
                continue
            for number, (how, (marker, kind, _)) in enumerate(MARKERS.items()):
                method = f"{name}_{how}" if how else name
                if method in there:
                    _dot(panel, column(rows, method, condition, STUDENT), y - 0.22 * (number - 1), marker, COLORS[kind])
        panel.set_title(title, loc="left", fontsize=11)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
        panel.tick_params(left=False)
    panels[0].set_yticks(range(len(names)), [ENTRIES[name].title for name in names])
    handles = [
        panels[0].plot([], [], marker, color=COLORS[kind], label=words)[0] for marker, kind, words in MARKERS.values()
    ]
    handles.append(panels[0].plot([], [], "D", color=COLORS["plain"], label="plain training")[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    gains = [
        float(difference(rows, "example_weights", "example_weights_permuted", name, STUDENT).split()[0])
        for name in CONDITIONS
    ]
    figure.suptitle(
        f"Learned weights (ExampleWeights): their own feedback is {min(gains):+.1f} to {max(gains):+.1f} points above "
        f"feedback given to the wrong examples\n(test accuracy of the student in %, {len(seeds(rows))} seeds, 95 %)",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.savefig(path, dpi=150)


def _dot(panel: Any, values: Sequence[float] | None, y: float, marker: str, color: str) -> None:
    assert values is not None  # of a method that was run in every condition
    interval = paired_test(values, [0.0] * len(values)).interval
    if interval is not None:
        panel.plot([100 * x for x in interval], [y, y], color=color, linewidth=1.6, solid_capstyle="round")
    panel.plot(100 * statistics.fmean(values), y, marker, color=color, markersize=6)
