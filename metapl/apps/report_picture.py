"""The picture of a run, ``report.png``: its curves over the steps, and its confusion matrix."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.apps.printing import short
from metapl.metrics import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# A panel draws its curves in these colors and lines, and begins again where it has more.
LINES = ("-", "--", ":", "-.")

# The most classes of a matrix whose names, and whose counts, can be read.
MOST_NAMED = 60
MOST_NUMBERED = 20

# Plots of a few quantities over the steps: keys of the rows, and their names in the legend.
PANELS = {
    "Validation accuracy": {
        "student_validation_accuracy": "student",
        "teacher_validation_accuracy": "teacher",
    },
    "Losses": {"inner_loss": "inner (student)", "outer_loss": "outer (labeled)"},
    "Losses of the network": {
        "loss_cross_entropy": "labeled",
        "loss_uda": "unlabeled (strong view, own label)",
        "loss_noisy_student": "with pseudo-labels",
    },
    "Losses apart, with noise and without": {
        "labeled_loss_with_noise": "labeled, with noise",
        "labeled_loss_without_noise": "labeled, without",
        "unlabeled_loss_with_noise": "unlabeled, with noise",
        "unlabeled_loss_without_noise": "unlabeled, without",
    },
    # A mode that sends back one number has no deviation in a batch.
    "Feedback to the teacher": {
        "feedback_rms": "root mean square in a batch",
        "feedback_std": "standard deviation in a batch",
    },
    "Size of the feedback": {
        "feedback_ratio": "its gradient over that of the teacher's own losses"
    },
    "Signal to noise of the feedback": {"feedback_snr": "of one step, by its examples"},
    "Pseudo-labels": {
        "pseudo_label_accuracy": "accuracy",
        "pseudo_label_confidence": "confidence",
        "agreement": "agreement",
    },
    "Class-frequency error": {"class_shares_vs_truth": "pseudo-labels against the truth"},
    "Class-frequency error of the labels": {
        "class_shares_vs_labeled": "pseudo-labels against the labels"
    },
}
PERCENT = (
    "Validation accuracy",
    "Pseudo-labels",
    "Class-frequency error",
    "Class-frequency error of the labels",
)
# Panels of quantities that are never zero and range over orders of magnitude.
LOGARITHMIC = ("Feedback to the teacher", "Size of the feedback")


# A row of metrics.jsonl.
Row = Mapping[str, float]

# Text with a $ in it is not taken for a formula.
PLAIN: dict[str, Any] = {"parse_math": False}


@dataclass(frozen=True)
class Curve:
    """A quantity over the steps.

    Args:
        rank: the number of the quantity in its panel.
        name: in the legend.
        points: (step, value) in the order of the steps.
    """

    rank: int
    name: str
    points: list[tuple[float, float]]


def panels_of(rows: Sequence[Row], network: str) -> dict[str, list[Curve]]:
    """Return the curves of each panel that has any.

    Args:
        rows: of a phase.
        network: what it is called where it has a teacher beside it.
    """
    panels: dict[str, list[Curve]] = {}
    for panel, names in PANELS.items():
        lines: list[Curve] = []
        for rank, (column, quantity) in enumerate(names.items()):
            points = points_of(rows, column, is_logarithmic=panel in LOGARITHMIC)
            if points:
                lines.append(Curve(rank=rank, name=quantity, points=points))
        has_teacher = any(curve.rank for curve in lines)
        if panel == "Validation accuracy" and not has_teacher:
            lines = [replace(curve, name=curve.name.replace("student", network)) for curve in lines]
        if lines:
            panels[panel] = lines
    if "Class-frequency error" in panels:
        panels.pop("Class-frequency error of the labels", None)
    return panels


def points_of(
    rows: Sequence[Row], column: str, *, is_logarithmic: bool
) -> list[tuple[float, float]]:
    """Return the finite values of a column with their steps; a logarithmic scale has no zero."""
    points = []
    for row in rows:
        if "step" not in row or row.get(column) is None:
            continue
        step = float(row["step"])
        value = float(row[column])
        is_finite = math.isfinite(step) and math.isfinite(value)
        if is_finite and (value > 0 or not is_logarithmic):
            points.append((step, value))
    return sorted(points)


def draw(
    *,
    title: str,
    rows: Sequence[Row],
    evaluation: Evaluation | None,
    network: str,
) -> bytes:
    """Draw a panel for each group of figures, and the confusion matrix on the test set, as PNG.

    Args:
        title: above all panels.
        rows: of a phase, as metrics.jsonl has them.
        evaluation: on the test set; None: there is no matrix.
        network: what it is called where it has no teacher beside it.
    """
    from matplotlib.figure import Figure

    panels = panels_of(rows, network)
    count = len(panels)
    if evaluation is not None:
        count += 1
    # On the page, more columns would be too small to read.
    columns = 1 if count <= 1 else 2
    lines_of_panels = math.ceil(max(1, count) / columns)
    figure = Figure((4.6 * columns, 3.6 * lines_of_panels + 0.5), 150, layout="constrained")
    figure.suptitle(short(title, 90), x=0.01, ha="left", **PLAIN)
    places = [figure.add_subplot(lines_of_panels, columns, number + 1) for number in range(count)]
    # The last place is that of the matrix.
    for (panel, lines), axes in zip(panels.items(), places, strict=False):
        draw_panel(axes, panel, lines)
    if evaluation is not None:
        draw_confusion(places[-1], evaluation)
    return png_of(figure)


def draw_panel(axes: Axes, panel: str, curves: Sequence[Curve]) -> None:
    """Draw the curves of a panel.

    They are moving averages over a fortieth of the points, shorter at both ends.
    """
    from matplotlib.ticker import NullLocator, PercentFormatter

    axes.set_title(panel, fontsize=10, loc="left")
    for curve in curves:
        steps, values = np.array(curve.points).T
        window = np.ones(2 * (len(values) // 80) + 1)
        counts = np.convolve(np.ones(len(values)), window, "same")
        axes.plot(
            steps,
            np.convolve(values, window, "same") / counts,
            color=COLORS[curve.rank % len(COLORS)],
            linestyle=LINES[curve.rank % len(LINES)],
            marker="o" if len(values) == 1 else None,
            label=curve.name,
        )
    if panel in LOGARITHMIC:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if panel in PERCENT:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("step", loc="right")
    axes.grid(color="#dddddd")
    # The legend of many methods is higher than the panel, which is not to shrink for it.
    is_in_layout = False
    axes.legend(fontsize=7).set_in_layout(is_in_layout)


def draw_confusion(axes: Axes, evaluation: Evaluation) -> None:
    """Draw the confusion matrix, with names and counts as far as these can be read."""
    counts = np.array(evaluation.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    accuracy = f"{100 * evaluation.accuracy:.1f} %"
    axes.set_title(f"Confusion on test, {accuracy} right", fontsize=10, loc="left")
    # The square root makes one mistake in a hundred visible.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(counts) <= MOST_NAMED:
        names = evaluation.classes or range(len(counts))
        labels = [short(str(name), 14) for name in names]
        size = 8 if len(counts) <= MOST_NUMBERED else 5
        axes.set_xticks(range(len(counts)), labels, rotation=90, fontsize=size, **PLAIN)
        axes.set_yticks(range(len(counts)), labels, fontsize=size, **PLAIN)
    if len(counts) <= MOST_NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.4 else "black"
            text = str(counts[row, column])
            axes.text(column, row, text, color=color, ha="center", va="center", fontsize=7)


def png_of(figure: Figure, dots_per_inch: float | None = None) -> bytes:
    """Return a figure as the bytes of a PNG file; without ``dots_per_inch`` by the figure's own."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Boxes stand for letters that the font does not have.
        warnings.filterwarnings("ignore", message="Glyph")
        dots: Any = "figure" if dots_per_inch is None else dots_per_inch
        figure.savefig(file, format="png", dpi=dots, metadata={"Software": None})
    return file.getvalue()
