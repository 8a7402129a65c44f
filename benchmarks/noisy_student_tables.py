"""The tables and the figure of ``noisy_student.py``, from its raw rows, beside the paper's own figures."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import difference, spread
from machine import figure_of, write_between_marks
from noisy_student import STEPS, STUDIES, Row, read, tuned

from metapl.metrics import PairedTest, paired_test

SURE = 0.05
"""p below which a difference counts as shown."""

HEADINGS = {
    "noise": "Noise (Table 6; B5, with 1.3M and with 130M unlabeled images)",
    "1": "Study 1, teacher capacity (Table 9; widths for B0, B2, B4, B6, B7, best teacher for L2)",
    "2": "Study 2, unlabeled size (Table 10; B4)",
    "3": "Study 3, hard and soft labels by the teacher's confidence (Figure 5; B0; its values are not printed)",
    "4": "Study 4, student capacity (Table 11; widths 8, 16, 32, 64 for teachers B0, B2, B4, B7)",
    "5": "Study 5, balancing (Table 12; widths for B0 to B3)",
    "6": "Study 6, joint training (Table 13; widths for B0 to B3)",
    "7": "Study 7, batch ratio (Table 14; widths for B4 and for L2 with the teacher of 87.0)",
    "8": "Study 8, warm start (Table 15; B0)",
}


def _by_width(names: Sequence[str], widths: Sequence[int], values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Figures of a table of the paper, a row for each network."""
    return {
        f"width {width}: {name}": value
        for width, row in zip(widths, values, strict=True)
        for name, value in zip(names, row, strict=True)
    }


SMALL = (8, 16, 32, 64)
PAPER: dict[str, dict[str, float]] = {
    "noise": {
        f"{name}, {spoken} of the unlabeled": value
        for spoken, values in (("a sixteenth", (83.3, 83.9, 83.6, 83.2, 83.7)), ("all", (84.0, 85.1, 84.6, 84.3, 84.4)))
        for name, value in zip(
            (
                "supervised",
                "Noisy Student",
                "student without augmentation",
                "student without augmentation and dropout",
                "teacher with augmentation and dropout",
            ),
            values,
            strict=True,
        )
    },
    "1": _by_width(
        ("supervised", "same teacher", "best teacher"),
        (*SMALL, 128),
        ((77.3, 78.1, 78.8), (80.0, 81.1, 82.4), (83.2, 84.4, 85.3), (84.5, 85.9, 86.4), (85.0, 86.4, 86.9)),
    ),
    "2": {"supervised": 83.2, "1/128": 83.4, "1/64": 83.3, "1/32": 83.7, "1/16": 83.9, "1/4": 83.8, "1/1": 84.0},
    "3": {},
    "4": {
        name: value
        for teacher, values in zip(
            SMALL, ((77.3, 77.9, 79.5), (80.0, 80.7, 82.0), (83.2, 84.0, 84.7), (86.9, 86.9, 87.2)), strict=True
        )
        for name, value in zip(
            (
                f"teacher {teacher}",
                f"teacher {teacher}, student {teacher}",
                f"teacher {teacher}, student {2 * teacher}",
            ),
            values,
            strict=True,
        )
    },
    "5": _by_width(
        ("supervised", "Noisy Student", "without balancing"),
        SMALL,
        ((77.3, 77.9, 77.6), (79.2, 79.9, 79.6), (80.0, 80.7, 80.6), (81.7, 82.1, 82.1)),
    ),
    "6": _by_width(
        ("supervised", "pretraining only", "pretraining + finetuning", "joint"),
        SMALL,
        ((77.3, 72.6, 77.5, 77.9), (79.2, 75.1, 79.4, 79.9), (80.0, 75.9, 80.3, 80.7), (81.7, 76.5, 81.7, 82.1)),
    ),
    "7": {"width 16: 1:1": 84.0, "width 16: 3:1": 84.0, "width 128: 1:1": 86.7, "width 128: 3:1": 87.4},
    "8": {
        "supervised": 77.3,
        "10 %, warm": 77.4,
        "20 %, warm": 77.5,
        "40 %, warm": 77.7,
        "80 %, warm": 77.8,
        "100 %, no warm start": 77.9,
    },
}
"""Top-1 accuracy on ImageNet in % as the paper prints it, by study and arm."""


def reference(study: str, name: str) -> str | None:
    """The arm that an arm is compared with; None: it is what the others are compared with."""
    of_width = f"{name.partition(':')[0]}: "
    if study == "noise":
        other = f"Noisy Student, {name.partition(', ')[2]}"
    elif study == "1":
        other = f"{of_width}supervised"
    elif study in ("2", "3"):
        other = "supervised"
    elif study == "4":
        first = name.partition(",")[0]
        other = first if first.startswith("teacher") else f"teacher {int(first.split()[-1]) // 2}"
    elif study == "5":
        other = f"{of_width}{'Noisy Student' if name.endswith('balancing') else 'supervised'}"
    elif study == "6":
        other = f"{of_width}joint"
    elif study == "7":
        other = f"{of_width}1:1"
    else:
        other = "100 %, no warm start"
    return None if other == name else other


@dataclass(frozen=True)
class Compared:
    """An arm against another one.

    Args:
        study, name, other: the two arms.
        first, second: their accuracies by seed.
        paper: the paper's difference in points; None where it prints none.
    """

    study: str
    name: str
    other: str
    first: list[float]
    second: list[float]
    paper: float | None

    @property
    def test(self) -> PairedTest:
        return paired_test(self.first, self.second)

    @property
    def verdict(self) -> str:
        """Whether the paper's difference is seen here."""
        test = self.test
        if self.paper is None:
            return "–"
        if test.p is None or test.p >= SURE:
            return "not shown"
        if self.paper == 0:
            return "the paper has no difference"
        return "yes" if (test.mean > 0) == (self.paper > 0) else "the reverse"


def accuracies(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Test accuracies by seed, of the arms that have a row, by study and name."""
    final = [row for row in rows if row["final"]]
    return {
        study: {
            name: row["test"] for name, arm in arms.items() for row in final if row["arm"] == dataclasses.asdict(arm)
        }
        for study, arms in STUDIES.items()
    }


def comparisons(rows: Sequence[Row]) -> list[Compared]:
    """Every arm beside the one that it is compared with."""
    found = []
    for study, arms in accuracies(rows).items():
        for name, values in arms.items():
            other = reference(study, name)
            if other is None or other not in arms:
                continue
            printed = PAPER[study]
            known = name in printed and other in printed
            paper = round(printed[name] - printed[other], 1) if known else None
            found.append(Compared(study, name, other, values, arms[other], paper))
    return found


def table(study: str, rows: Sequence[Row]) -> str:
    """The arms of a study."""
    compared = {each.name: each for each in comparisons(rows) if each.study == study}
    head = ["arm", "here", "against", "difference", "95 %", "p", "paper", "its difference", "seen here"]
    lines = [
        f"**{HEADINGS[study]}**",
        "",
        "| " + " | ".join(head) + " |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, values in accuracies(rows)[study].items():
        printed = PAPER[study].get(name)
        cells = [name, spread(values)]
        each = compared.get(name)
        if each is None:
            cells += ["–"] * 4
        else:
            gain, p = difference(each.first, each.second)
            interval = each.test.interval
            ends = "–" if interval is None else "{:+.1f} to {:+.1f}".format(*(100 * end for end in interval))
            cells += [_short(each), gain, ends, p]
        cells.append("–" if printed is None else f"{printed:.1f}")
        cells.append("–" if each is None or each.paper is None else f"{each.paper:+.1f}")
        cells.append("–" if each is None else each.verdict)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(each: Compared) -> str:
    """What an arm is compared with, without what both have."""
    if each.study == "8":
        return "no warm start"
    return each.other.partition(": ")[2] or each.other.partition(", ")[0]


def verdicts(rows: Sequence[Row]) -> Counter[str]:
    """How often each verdict is given, of the paper's differences that are not zero."""
    return Counter(each.verdict for each in comparisons(rows) if each.paper not in (None, 0))


def counted(rows: Sequence[Row]) -> str:
    """How many of the paper's differences are seen."""
    counts = verdicts(rows)
    total = sum(counts.values())
    return (
        f"Of the {total} differences that the paper prints and these tables have (some rows share their arms), "
        f"{counts['yes']} are seen here with the same sign (p < {SURE}), {counts['the reverse']} with the other sign, "
        f"and {counts['not shown']} are not shown."
    )


def block(rows: Sequence[Row]) -> str:
    """All tables, and what they were made with."""
    seeds = "/".join(str(len(each)) for each in {tuple(row["seeds"]) for row in rows if row["final"]})
    lr, dropout = tuned(rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    arms = len({str(row["arm"]) for row in rows if row["final"]})
    parts = [counted(rows), *(table(study, rows) for study in STUDIES)]
    parts.append(
        f"Test accuracy in %, mean ± standard deviation over {seeds} seeds (400 test images each, drawn anew per seed "
        "from the same 1,797); differences in points, with the paired t-test's interval and p "
        "over draws of these images, not corrected for the "
        f"number of rows. Paper: top-1 on ImageNet. {arms} arms, {STEPS:,} steps each, learning rate {lr:g} and "
        f"dropout {dropout:g} by validation on other seeds; {minutes:.0f} minutes, on a machine with other work. "
        "`python benchmarks/noisy_student.py`; raw rows: `benchmarks/results/noisy_student.jsonl`."
    )
    return "\n\n".join(parts)


OURS, THEIRS, GREY = "#0072B2", "#D55E00", "#7A7A7A"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Each difference with its interval, beside the paper's, a panel a study."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found = comparisons(rows)
    studies = {study: [each for each in found if each.study == study] for study in STUDIES}
    left, right = ("noise", "1", "2", "7"), ("3", "4", "5", "6", "8")
    figure = Figure(figsize=(13, 13), layout="constrained")
    FigureCanvasAgg(figure)
    for half, names in zip(figure.subfigures(1, 2), (left, right), strict=True):
        heights = [len(studies[name]) + 2.5 for name in names]
        for axes, name in zip(half.subplots(len(names), 1, height_ratios=heights), names, strict=True):
            labels = []
            for y, each in enumerate(studies[name][::-1]):
                test = each.test
                if test.interval is not None:
                    axes.plot([100 * end for end in test.interval], [y, y], color=OURS, linewidth=1.6)
                axes.plot(100 * test.mean, y, "o", color=OURS, markersize=5)
                if each.paper is not None:
                    axes.plot(each.paper, y, "D", color=THEIRS, markersize=4)
                name_here = each.name.replace("augmentation", "aug.").replace(" of the unlabeled", "")
                labels.append(f"{name_here} − {_short(each)}")
            axes.set_yticks(range(len(labels)), labels, fontsize=7)
            axes.axvline(0, color="0.6", linewidth=1)
            axes.set_ylim(-0.7, len(labels) - 0.3)
            axes.set_title(HEADINGS[name].partition(" (")[0], fontsize=9.5, loc="left")
            axes.grid(axis="x", color="0.92")
            axes.set_axisbelow(True)
            axes.tick_params(axis="x", labelsize=8)
            axes.tick_params(left=False)
            for edge in ("top", "right", "left"):
                axes.spines[edge].set_visible(False)
    marks = [
        Line2D([], [], color=OURS, marker="o", markersize=5, label="digits, points, with 95 % interval"),
        Line2D([], [], color=THEIRS, marker="D", markersize=4, linestyle="", label="the paper, points on ImageNet"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    counts = verdicts(rows)
    figure.suptitle(
        f"Of the paper's {sum(counts.values())} differences {counts['yes']} are seen on digits, "
        f"{counts['the reverse']} the other way round, and {counts['not shown']} are not shown",
        fontsize=13,
    )
    figure.savefig(path, dpi=110)


def write(page: Path, raw: Path) -> None:
    """Put the tables between the marks of a page, and draw the figure beside it."""
    rows = read(raw)
    write_between_marks(page, "noisy-student-studies", block(rows))
    draw(figure_of(page, f"{raw.stem}.png"), rows)
