"""``report.png``: the curves of a run and its confusion matrix, to paste somewhere."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from metapl.apps.machine.sealed import replacing
from metapl.apps.reports.web import Curves, panels_of
from metapl.apps.words import short
from metapl.metrics import Evaluation

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MOST_NAMED, MOST_NUMBERED = 60, 20  # classes of a matrix whose names, and whose counts, can be read


def draw_report(path: Path, *, title: str, curves: Curves, evaluation: Evaluation | None, network: str) -> None:
    """A panel for each group of figures, and the confusion matrix on the test set where there is one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, PercentFormatter

    panels = panels_of(curves, network)
    count = len(panels) + (evaluation is not None)
    columns = max(1, min(4, math.ceil(count / 2)))
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
                        color=COLORS[number if len(curves) > 1 else rank],
                        linestyle=("-", "--", ":")[rank],
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
        axes.legend(fontsize=7)
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
    with replacing(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # boxes stand for letters that the font does not have
        figure.savefig(file, format="png", metadata={"Software": None})
