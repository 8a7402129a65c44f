"""The tables and the figure of ``when.py``, from its raw rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import difference, points, spread
from machine import write_between_marks
from when import ARMS, CONDITIONS, PARTS, Arm, Row, read

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
}
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
    "outer": "Size of the outer batch (2 labels a class, 1,500 steps; 64 is above)",
    "ahead": "Student steps a teacher step, K (2 labels a class; K = 1 is above)",
}


@dataclass(frozen=True)
class Found:
    """An arm with its row.

    Args:
        arm, row: as they are.
        better: its better read-out, by the mean.
    """

    arm: Arm
    row: Row

    @property
    def better(self) -> str:
        return max(READ_OUTS, key=lambda name: statistics.fmean(self.row[name]))

    @property
    def accuracy(self) -> list[float]:
        """Of the better read-out."""
        values: list[float] = self.row[self.better]
        return values


def collected(rows: Sequence[Row]) -> dict[Arm, Found]:
    """The final rows by their arms, in the order of the list."""
    final = {(row["part"], row["method"], *_place(row)): row for row in rows if row["final"]}
    found = {}
    for arm in ARMS:
        row = final.get((arm.part, arm.method, arm.condition, arm.labels, arm.steps, arm.outer, arm.lookahead))
        if row is not None:
            found[arm] = Found(arm, row)
    return found


def _place(row: Row) -> tuple[object, ...]:
    return row["condition"], row["labels"], row["steps"], row["outer"], row["lookahead"]


def control(found: dict[Arm, Found], arm: Arm) -> Found | None:
    """The same loop without feedback: same data, same batches, same first weights."""
    silent = "fixed" if arm.condition != "right" else "none_uda" if arm.method == "gradient_uda" else "none"
    return next(
        (f for other, f in found.items() if other.group == arm.group and other.method.split()[0] == silent), None
    )


def true_feedback(found: dict[Arm, Found], arm: Arm) -> Found | None:
    """The arm with the feedback as it is, for one with altered feedback."""
    if arm.alteration is None:
        return None
    return _beside(found, arm, arm.method.split()[0])


def _beside(found: dict[Arm, Found], arm: Arm, method: str) -> Found | None:
    """The arm of a method, with nothing altered, that saw the same batches."""
    same = (other for other in found if other.group == arm.group and other.alteration is None)
    return next((found[other] for other in same if other.method.split()[0] == method), None)


def against(first: Found, second: Found | None) -> tuple[str, str, str]:
    """The difference of the better read-outs in points, its 95 % interval, and p."""
    if second is None or first is second:
        return "–", "–", "–"
    gain, p = difference(first.accuracy, second.accuracy)
    interval = paired_test(first.accuracy, second.accuracy).interval
    if interval is None:
        return gain, "–", p
    low, high = (100 * end for end in interval)
    return gain, f"{low:+.1f} to {high:+.1f}", p


def title(arm: Arm) -> str:
    """An arm in words, without what its table says of all."""
    method = arm.method.split()[0]
    if arm.alteration == "zero":
        return ALTERED["zero"]
    if arm.alteration is not None:
        kind = "" if method == "alone" else "weight: " if method == "gradient" else "ratio: "
        return f"{kind}{ALTERED[arm.alteration]}"
    return TITLES[method]


def where(arm: Arm) -> str:
    """What sets an arm apart from those of other groups in its table."""
    if arm.part == "length":
        return f"{arm.labels} labels, {arm.steps:,} steps"
    if arm.part == "wrong":
        return CONDITIONS[arm.condition]
    if arm.part == "outer":
        return f"{arm.outer} examples"
    if arm.part == "ahead":
        return f"K = {arm.lookahead}, {arm.steps:,} teacher steps"
    return ""


def table(found: dict[Arm, Found], part: str) -> str:
    """The arms of a question."""
    mine = [arm for arm in found if arm.part == part]
    if part == "part":
        # Whose parts they are, and the control of them all.
        whole = [arm for arm in found if arm.part == "length" and arm.group == mine[0].group] if mine else []
        mine = [arm for arm in whole if arm.method in ("none", "gradient zero", "gradient", "ratio")] + mine
    # The two without feedback side by side.
    mine.sort(key=lambda arm: (arm.method != "none", arm.alteration != "zero"))
    mine.sort(key=lambda arm: (list(CONDITIONS).index(arm.condition), arm.labels, arm.outer))
    if part in ("length", "ahead"):
        mine.sort(
            key=lambda arm: (
                arm.labels,
                arm.method.endswith("teacher steps"),
                arm.steps if part == "length" else arm.lookahead,
            )
        )
    altered = part in ("part", "wrong")
    head = ["arm", "student", "finetuned", "labels right", "frequency error", "against the control", "95 %", "p"]
    head += ["against the true feedback", "p"] if altered else []
    lines = [f"**{HEADINGS[part]}**", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    before = ""
    for arm in mine:
        row = found[arm].row
        place = where(arm) if arm.part == part else ""
        if place != before:
            before = place
            lines.append(f"| *{place}* |" + " |" * (len(head) - 1))
        cells = [title(arm), spread(row["student"]), spread(row["finetuned"])]
        cells += [f"{points(row['labels_right']):.1f}", f"{points(row['frequency_error']):.1f}"]
        cells += against(found[arm], control(found, arm))
        if altered:
            gain, _, p = against(found[arm], true_feedback(found, arm))
            cells += [gain, p]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings(rows: Sequence[Row]) -> str:
    """What tuning chose."""
    from when import GRIDS, chosen

    tuned = {row["tuned"] for row in rows if not row["final"]}
    said = []
    for name in GRIDS:
        if name in tuned:
            rule = chosen(rows, name)
            size = "" if rule.feedback == "none" else f", size {rule.size:g}"
            said.append(f"{name}: rates {rule.student_lr:g} and {rule.teacher_lr:g}{size}")
    return "; ".join(said)


def not_run(found: dict[Arm, Found]) -> str:
    """The arms of the list that have no row."""
    left: dict[str, int] = {}
    for arm in ARMS:
        if arm not in found:
            place = f"{arm.part} ({where(arm) or arm.method.split()[0]})"
            left[place] = left.get(place, 0) + 1
    said = "; ".join(f"{place}: {count}" for place, count in left.items())
    return f"Arms in the list that were not run: {said}." if said else "All arms of the list were run."


def block(rows: Sequence[Row]) -> str:
    """All tables, and what they were made with."""
    found = collected(rows)
    parts = [table(found, part) for part in PARTS if any(arm.part == part for arm in found)]
    seeds = "/".join(str(len(each)) for each in {tuple(row["seeds"]) for row in rows if row["final"]})
    minutes = sum(row["seconds"] for row in rows) / 60
    runs = sum(len(row["seeds"]) for row in rows)
    parts.append(
        f"Test accuracy in %, mean ± standard deviation over {seeds} seeds (400 test images each, drawn anew per seed "
        "from the same 1,797). *Labels right*: the teacher's accuracy on the unlabeled images at the end. *Frequency "
        "error*: the share of the unlabeled images that the student would have to call otherwise for its class "
        "frequencies to be right. Differences are between the better read-outs, by these means, of the two, and of the "
        "means as shown, so up to 0.1 from those of the pairs; intervals and p are of the paired t-test "
        "over draws of these images, not corrected for the number of rows. "
        f"{runs:,} runs in {minutes:.0f} minutes of one core. `python benchmarks/when.py`; raw rows: "
        "`benchmarks/results/when.jsonl`."
    )
    parts.append(f"Settings that were chosen on the tuning seeds (rates of student and teacher): {settings(rows)}.")
    parts.append(not_run(found))
    return "\n\n".join(parts)


COLORS = {"gradient": "#0072B2", "learning_rate": "#009E73", "ratio": "#D55E00", "alone": "#0072B2"}
OTHER = "#555555"
LEAST = -14
"""Of the axis, in points; what is below is written there."""


def draw(path: Path, rows: Sequence[Row]) -> None:
    """The differences to the control with their intervals, a panel a question."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = collected(rows)
    compared = {
        part: [arm for arm in found if arm.part == part and (c := control(found, arm)) and c is not found[arm]]
        for part in PARTS
    }
    compared = {part: arms for part, arms in compared.items() if arms}
    heights = [len(arms) + 2 for arms in compared.values()]
    figure = Figure(figsize=(9.5, 0.6 + 0.25 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(compared), 1, squeeze=False, height_ratios=heights, sharex=True)[:, 0]
    for axes, (part, arms) in zip(panels, compared.items(), strict=True):
        for y, arm in enumerate(arms[::-1]):
            base = control(found, arm)
            assert base is not None
            test = paired_test(found[arm].accuracy, base.accuracy)
            color = COLORS.get(arm.method.split()[0], OTHER)
            if 100 * test.mean < LEAST:
                gain, _ = difference(found[arm].accuracy, base.accuracy)
                axes.annotate(f"\u2190 {gain}", (LEAST, y), fontsize=8, va="center", color=color)
                continue
            if test.interval is not None:
                axes.plot([100 * end for end in test.interval], [y, y], color=color, linewidth=1.6)
            axes.plot(100 * test.mean, y, "o", color=color, markersize=5)
        places = [arm.condition if part == "wrong" else where(arm) for arm in arms[::-1]]
        names = [f"{place}: {title(arm)}".removeprefix(": ") for place, arm in zip(places, arms[::-1], strict=True)]
        axes.set_yticks(range(len(arms)), names, fontsize=8)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_xlim(LEAST, -LEAST)
        axes.set_ylim(-0.7, len(arms) - 0.3)
        axes.set_title(HEADINGS[part], fontsize=9.5)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        for edge in ("top", "right", "left"):
            axes.spines[edge].set_visible(False)
        axes.tick_params(left=False)
    told = [
        f"{difference(one.accuracy, base.accuracy)[0]} after {arm.steps:,}"
        for arm, one in found.items()
        if (arm.method, arm.condition, arm.labels, arm.part) == ("gradient", "right", 2, "length")
        and (base := control(found, arm))
    ]
    figure.suptitle(f"What feedback adds, in points, by steps (2 labels a class): {', '.join(told)}", fontsize=11)
    panels[-1].set_xlabel("points against the loop without feedback, 95 %")
    figure.savefig(path, dpi=120)


def write(page: Path, raw: Path) -> None:
    """Put the tables between the marks of a page, and draw the figure beside it."""
    rows = read(raw)
    write_between_marks(page, "when", block(rows))
    draw(page.with_name(f"{raw.stem}.png"), rows)
