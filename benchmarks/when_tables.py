"""The tables and the figure of ``when.py``, from its raw rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
from harness import BLUE, NONE, ORANGE, Bar, Row
from when import ARMS, CONDITIONS, FORMS, Arm, arm_of, chosen, read

from metapl.metrics import paired_test

READ_OUTS = ("student", "finetuned")

TITLES = {
    "none": "same loop, no feedback",
    "gradient": "feedback, weight (dies with the rate)",
    "learning_rate": "feedback ÷ learning rate",
    "ratio": "feedback, ratio to the own loss",
    "none_long": "same loop, no feedback, tuned at this length",
    "none_uda": "UDA in the teacher, no feedback, tuned at this length",
    "gradient_uda": "UDA in the teacher, feedback, tuned at this length",
    "fixed": "fixed teacher",
    "alone": "feedback alone",
    "own": "own loss on the right labels, no feedback",
    "own_and_feedback": "own loss and feedback",
    "uda": "UDA",
    "uda_aligned": "UDA, aligned to the labels' shares",
    "fixmatch": "FixMatch",
    "mpl": "Meta Pseudo Labels",
    "push": "same loop, push to equal frequencies",
    "late": "MPL, student begins late",
    "mpl_aligned": "MPL, its UDA aligned",
    "none_aligned": "same loop, no feedback, its UDA aligned",
    "algorithm_1": "MPL, Algorithm 1 as it is written (dot, mean)",
    "authors": "MPL, the authors' form (cosine, mean, baseline 0.99)",
}
AFTER = ("mpl_aligned", "none_aligned", *FORMS)
"""No part of the primary test."""

ALTERED = {
    "permuted": "rows of other examples",
    "class_means": "its mean over the batch",
    "rest": "without that mean",
    "own_class_means": "its means by the teacher's class",
    "within_class": "without these means",
    "one_number": "one number an example",
    "sign": "its signs",
    "random_sign": "with random signs",
    "negated": "negated",
    "zero": "no feedback, at the weight's rates",
    "balance": "equal class frequencies instead",
}
HEADINGS = {
    "length": "Length, labels, and what becomes of the size",
    "part": "What part of the feedback acts (2 labels a class, 1,500 steps)",
    "wrong": "A teacher that has learned wrong labels (4 right labels a class, 1,500 steps)",
    "ahead": "Student steps a teacher step, K (2 labels a class; K = 1 is above)",
    "outer": "Size of the outer batch (2 labels a class, 1,500 steps; 64 is above)",
}


class Found(NamedTuple):
    """An arm with its row, and the read-out that it is judged by.

    At equal time that is the one that tuning chose, elsewhere the better one, by the mean.
    """

    arm: Arm
    row: Row
    read_out: str

    @property
    def accuracy(self) -> list[float]:
        values: list[float] = self.row[self.read_out]
        return values


Study = dict[Arm, Found]


def collected(rows: Sequence[Row]) -> Study:
    """Return the final rows by their arms, in the order of the list."""
    final = {arm_of(row): row for row in rows if row["final"]}
    study = {}
    for arm in ARMS:
        if (row := final.get(arm)) is not None:
            better = max(READ_OUTS, key=lambda name: statistics.fmean(row[name]))
            study[arm] = Found(arm, row, chosen(rows, arm.tuned)[1] if arm.of_worth else better)
    return study


def beside(study: Study, arm: Arm, method: str) -> Found | None:
    """Return the arm of a method, with nothing altered, that saw the same batches."""
    same = (
        f
        for other, f in study.items()
        if (other.group, other.of_worth) == (arm.group, arm.of_worth)
    )
    return next(
        (f for f in same if f.arm.method == method or f.arm.method.startswith(f"{method} as many")),
        None,
    )


def control(study: Study, arm: Arm) -> Found | None:
    """Return the same loop without feedback: same data, same batches, same first weights."""
    silent = (
        "fixed"
        if arm.condition != "right"
        else "none_uda"
        if arm.method == "gradient_uda"
        else "none"
    )
    return beside(study, arm, silent)


def against(first: Found, second: Found | None) -> tuple[str, str, str]:
    """Return the difference in points, its 95 % interval, and p."""
    if second is None or first is second:
        return NONE, NONE, NONE
    gain, p = harness.difference(first.accuracy, second.accuracy)
    return gain, harness.between(first.accuracy, second.accuracy), p


def title(arm: Arm) -> str:
    """Return an arm in words, without what its table says of all."""
    method = arm.method.split()[0]
    if arm.alteration is None or arm.alteration == "zero":
        return ALTERED["zero"] if arm.alteration else TITLES[method]
    return {"alone": "", "gradient": "weight: "}.get(method, "ratio: ") + ALTERED[arm.alteration]


def place_words(arm: Arm) -> str:
    """Return what sets an arm apart from those of other groups in its table."""
    return {
        "length": f"{arm.labels} labels, {arm.steps:,} steps",
        "wrong": CONDITIONS[arm.condition],
        "outer": f"{arm.outer} examples",
        "ahead": f"K = {arm.lookahead}, {arm.steps:,} teacher steps",
    }.get(arm.part, "")


def table(study: Study, part: str) -> str:
    """Return the table of a question's arms."""
    mine = [arm for arm in study if arm.part == part]
    if part == "part":
        # Whose parts they are, and the control of them all.
        all_rows = (
            [arm for arm in study if arm.part == "length" and arm.group == mine[0].group]
            if mine
            else []
        )
        mine = [
            arm for arm in all_rows if arm.method in ("none", "gradient zero", "gradient", "ratio")
        ] + mine
    # The two without feedback side by side.
    mine.sort(key=lambda arm: (arm.method != "none", arm.alteration != "zero"))
    mine.sort(key=lambda arm: (list(CONDITIONS).index(arm.condition), arm.labels, arm.outer))
    if part == "length":
        mine.sort(key=lambda arm: (arm.labels, arm.steps))
    if part == "ahead":
        mine.sort(key=lambda arm: (arm.method.endswith("teacher steps"), arm.lookahead))
    altered = part in ("part", "wrong")
    head = [
        "arm",
        "student",
        "finetuned",
        "labels right",
        "frequency error",
        "against the control",
        "95 %",
        "p",
    ]
    head += ["against the true feedback", "p"] if altered else []
    lines = []
    last_place = ""
    for arm in mine:
        row = study[arm].row
        place = place_words(arm) if arm.part == part else ""
        if place != last_place:
            last_place = place
            lines.append([f"*{place}*", *[""] * (len(head) - 1)])
        cells = [title(arm), harness.spread(row["student"]), harness.spread(row["finetuned"])]
        cells += [
            f"{harness.points(row['labels_right']):.1f}",
            f"{harness.points(row['frequency_error']):.1f}",
        ]
        cells += against(study[arm], control(study, arm))
        if altered:
            true = beside(study, arm, arm.method.split()[0]) if arm.alteration else None
            cells += against(study[arm], true)[::2]
        lines.append(cells)
    return f"**{HEADINGS[part]}**\n\n{harness.grid(head, lines)}".replace("|  |", "| |").replace(
        "|  |", "| |"
    )


def sign_flip(first: Sequence[float], second: Sequence[float], flips: int = 200_000) -> float:
    """Return the two-sided p of the paired sign-flip test.

    It is the share of random signs under which the mean difference is as large.

    >>> sign_flip([1.0] * 10, [0.0] * 10) < 0.01
    True
    """
    d = np.asarray(first) - np.asarray(second)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (flips, len(d)))
    reached = (np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)).sum()
    return float((reached + 1) / (flips + 1))


def picked(
    first: Sequence[float], rivals: Sequence[Sequence[float]], flips: int = 200_000
) -> float:
    """Return the share of random signs under which the best of the others is as far ahead.

    A sign is of a seed, the same for all. The others are ahead of the first in units of the root
    mean square of their differences.
    """
    d = np.asarray(rivals) - np.asarray(first)
    standardized = (d / np.maximum(np.sqrt((d**2).mean(1, keepdims=True)), 1e-12)).T
    best = standardized.sum(0)[d.sum(1).argmax()]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (flips, len(standardized)))
    return float(((signs @ standardized).max(1) >= best - 1e-9).mean())


def places(study: Study) -> dict[str, dict[str, Found]]:
    """Return the arms at equal time by place and method.

    In a place every arm has a row, but for the forms of Algorithm 1, which came last.
    """
    by_place: dict[str, dict[str, Found]] = {}
    for arm, outcome in study.items():
        if arm.part == "worth":
            by_place.setdefault(arm.place, {})[arm.method] = outcome
    needed = {arm.method for arm in ARMS if arm.of_worth and arm.method not in FORMS}
    return {place: arms for place, arms in by_place.items() if needed <= {*arms}}


def gap(first: Found, second: Found) -> tuple[str, str, str]:
    """Return the mean difference in points, its 95 % interval, and p of sign flips."""
    accuracy = first.accuracy
    other_accuracy = second.accuracy
    p = f"{sign_flip(accuracy, other_accuracy):.2g}"
    return (
        f"{100 * paired_test(accuracy, other_accuracy).mean:+.1f}",
        harness.between(accuracy, other_accuracy),
        p,
    )


def primary(arms: dict[str, Found]) -> str:
    """Return the primary test in words."""
    mpl = arms["mpl"]
    rivals = [outcome for name, outcome in arms.items() if name not in ("mpl", *AFTER)]
    rival = max(rivals, key=lambda outcome: float(np.mean(outcome.accuracy)))
    gain, interval, p = gap(mpl, rival)
    share = picked(mpl.accuracy, [outcome.accuracy for outcome in rivals])
    return (
        f"Primary test ({mpl.arm.place}): Meta Pseudo Labels minus {TITLES[rival.arm.method]}, the "
        f"best other arm: {gain} points (95 % {interval}), sign-flip p = {p}, {len(mpl.accuracy)} "
        "seeds. These seeds picked that arm: under random signs of all differences, in "
        f"{100 * share:.0f} % of draws one of the {len(rivals)} others is ahead as clearly."
    )


def place_table(arms: dict[str, Found]) -> str:
    """Return the table of a place's arms."""
    head = [
        "arm",
        "steps",
        "test accuracy",
        "lowest",
        "labels right",
        "frequency error",
        "MPL above it",
        "95 %",
        "p",
    ]
    lines = []
    for name, outcome in arms.items():
        values = outcome.accuracy
        row = outcome.row
        cells = [TITLES[name], f"{outcome.arm.steps:,}"]
        cells += [
            f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}",
            f"{100 * min(values):.1f}",
        ]
        cells += [f"{100 * np.mean(row[key]):.1f}" for key in ("labels_right", "frequency_error")]
        lines.append([*cells, *(("–", "–", "–") if name == "mpl" else gap(arms["mpl"], outcome))])
    said = []
    for name in ("uda_aligned", "none_aligned"):
        gain, interval, p = gap(arms["mpl_aligned"], arms[name])
        said.append(f"{gain} ({interval}, p = {p}) against {TITLES[name]}")
    added = (
        "Added when the others' tuning runs had been seen, and run after them: "
        f"{TITLES['mpl_aligned']}, is"
    )
    title = f"**{arms['mpl'].arm.place}**"
    later = [
        f"{TITLES[form]} minus {TITLES[name]} {' '.join(beside_form(arms, form, name))}"
        for form in FORMS
        if form in arms
        for name in ("mpl", "none")
    ]
    forms = f" Added last: {'; '.join(later)}." if later else ""
    return f"{title}\n\n{harness.grid(head, lines)}\n\n{added} {' and '.join(said)}.{forms}"


def beside_form(arms: dict[str, Found], form: str, name: str) -> tuple[str, str]:
    """Return a form of Algorithm 1 minus another arm.

    The mean difference, and its interval and p in brackets.
    """
    gain, interval, p = gap(arms[form], arms[name])
    return gain, f"({interval}, p = {p})"


def draw_worth(path: Path, by_place: dict[str, dict[str, Found]]) -> None:
    """Draw Meta Pseudo Labels minus each other arm, a panel a place."""
    bars_by_place: dict[str, list[Bar]] = {}
    for place, arms in by_place.items():
        mpl = arms["mpl"].accuracy
        for name, outcome in arms.items():
            if name not in ("mpl", *AFTER):
                color = BLUE if np.mean(mpl) > np.mean(outcome.accuracy) else ORANGE
                bars_by_place.setdefault(place, []).append(
                    Bar(TITLES[name], mpl, outcome.accuracy, color)
                )
    first, arms = next(iter(by_place.items()))
    above = [gap(arms["mpl"], arms[name])[0] for name in ("uda", "uda_aligned")]
    heading = (
        f"At equal time MPL is {above[0]} points against UDA and {above[1]} against aligned UDA "
        f"({first})"
    )
    axis = (
        f"points of test accuracy, {len(arms['mpl'].accuracy)} seeds, 95 %; right of 0 Meta "
        "Pseudo Labels is ahead"
    )
    harness.bars(path, bars_by_place, heading, axis, least=-14)


def write(page: Path | None, raw: Path) -> None:
    """Put the tables between the marks of a page, and draw the figure beside it.

    Without a page, print the tables.
    """
    study = collected(read(raw))
    if any(not arm.of_worth for arm in study):
        tables = [table(study, part) for part in HEADINGS if any(arm.part == part for arm in study)]
        harness.show(page, "when", "\n\n".join(tables))
    if by_place := places(study):
        worth = [primary(next(iter(by_place.values()))), *map(place_table, by_place.values())]
        harness.show(page, "feedback-worth", "\n\n".join(worth))
        if page is not None:
            draw_worth(harness.figure_of(page, "feedback_worth.png"), by_place)
