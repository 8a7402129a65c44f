"""``report.png``, which the page of a run shows too: the curves of a training, and the confusion matrix."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metapl.apps.words import short
from metapl.metrics import Evaluation

Curves = Mapping[str, Sequence[Mapping[str, float]]]  # rows by method

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")  # those of a panel; colors and lines begin again where a figure has more
MOST_NAMED, MOST_NUMBERED = 60, 20  # classes of a matrix whose names, and whose counts, can be read


class Panel(NamedTuple):
    """A plot of a few quantities over the steps."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key of the rows, its name in the legend)
    percent: bool = False
    log: bool = False
    now_and_then: bool = False  # measured so, and not in each step: its last values count

    def points(self, rows: Sequence[Mapping[str, float]], key: str) -> Sequence[tuple[float, float]]:
        """Steps and values that can be drawn: a logarithmic scale has no zero."""
        pairs = ((float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None)
        return sorted(pair for pair in pairs if all(map(math.isfinite, pair)) and (pair[1] > 0 or not self.log))

    def means(self, values: NDArray[Any]) -> NDArray[Any]:
        """The mean about each value of many, over fewer towards the ends."""
        span = np.ones(1 if self.now_and_then else 2 * (len(values) // 80) + 1)
        found: NDArray[Any] = np.convolve(values, span, "same") / np.convolve(np.ones(len(values)), span, "same")
        return found


# Of two with one title, the first that has figures is drawn.
PANELS = (
    Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        now_and_then=True,
    ),
    Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labeled)"))),
    Panel(
        "Losses of the network",
        (
            ("loss_cross_entropy", "labeled"),
            ("loss_uda", "unlabeled (strong view, own label)"),
            ("loss_entropy", "unlabeled (entropy)"),
            ("loss_noisy_student", "with pseudo-labels"),
        ),
    ),
    Panel("Feedback to the teacher", (("feedback_std", "its standard deviation in a batch"),), log=True),
    Panel("Signal to noise of the feedback", (("feedback_snr", "of one step, by its examples"),)),
    Panel(
        "Pseudo-labels",
        (("pseudo_label_accuracy", "accuracy"), ("pseudo_label_confidence", "confidence"), ("agreement", "agreement")),
        percent=True,
    ),
    Panel("Class-frequency error", (("class_shares_vs_truth", "pseudo-labels against the truth"),), percent=True),
    Panel("Class-frequency error", (("class_shares_vs_labeled", "pseudo-labels against the labels"),), percent=True),
)


def panels_of(curves: Curves, network: str) -> list[Panel]:
    """Those that there are figures for."""
    by_title: dict[str, Panel] = {}
    for panel in PANELS:
        there = [key for key, _ in panel.series if any(panel.points(rows, key) for rows in curves.values())]
        if panel.now_and_then and there == [panel.series[0][0]]:
            panel = panel._replace(series=((there[0], network), *panel.series[1:]))
        if there:
            by_title.setdefault(panel.title, panel)
    return list(by_title.values())


def draw(*, title: str, curves: Curves, evaluation: Evaluation | None, network: str) -> bytes:
    """A panel for each group of figures, and the confusion matrix on the test set where there is one, as PNG;
    ``network``: what it is called where no method has a teacher beside it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    panels = panels_of(curves, network)
    count = len(panels) + (evaluation is not None)
    columns = 1 if count <= 1 else 2  # on the page, more would be too small to read
    figure = Figure((4.6 * columns, 3.6 * math.ceil(max(1, count) / columns) + 0.5), 150, layout="constrained")
    plain: Any = {"parse_math": False}  # a name with a $ is a name
    figure.suptitle(short(title, 90), x=0.01, ha="left", **plain)
    places = [figure.add_subplot(math.ceil(count / columns), columns, number + 1) for number in range(count)]
    for panel, axes in zip(panels, places, strict=False):
        axes.set_title(panel.title, fontsize=10, loc="left")
        for number, (method, rows) in enumerate(curves.items()):
            for rank, (key, name) in enumerate(panel.series):
                if points := panel.points(rows, key):
                    steps, values = np.array(points).T
                    axes.plot(
                        steps,
                        panel.means(values),
                        color=COLORS[(number if len(curves) > 1 else rank) % len(COLORS)],
                        linestyle=LINES[rank % len(LINES)],
                        marker="o" if len(values) == 1 else None,
                        label=f"{method}, {name}" if len(curves) > 1 else name,
                    )
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("step", loc="right")
        axes.grid(color="#dddddd")
        axes.legend(fontsize=7).set_in_layout(False)  # of many methods it is higher than the panel
    if evaluation is not None:
        counts, axes = np.array(evaluation.confusion), places[-1]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.set_title(f"Confusion on test, {100 * evaluation.accuracy:.1f} % right", fontsize=10, loc="left")
        axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)  # the root shows a mistake in a hundred
        axes.set(xlabel="predicted", ylabel="true")
        if len(counts) <= MOST_NAMED:
            names = [short(str(name), 14) for name in evaluation.classes or range(len(counts))]
            look: Any = {"fontsize": 8 if len(counts) <= MOST_NUMBERED else 5, **plain}
            axes.set_xticks(range(len(counts)), names, rotation=90, **look)
            axes.set_yticks(range(len(counts)), names, **look)
        for row, column in np.argwhere(counts) if len(counts) <= MOST_NUMBERED else ():
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, str(counts[row, column]), color=color, ha="center", va="center", fontsize=7)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # boxes stand for letters that the font does not have
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
