"""What was measured over the steps: a panel for each few quantities that belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metapl.apps.reports.canvas import write_heading, write_note
from metapl.apps.reports.style import NOTE_SIZE, PALETTE, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, float]]
Curves = Mapping[str, Rows]

DASHES: tuple[Any, ...] = ("-", (0, (4, 1.8)), (0, (1.2, 1.4)))


@dataclass(frozen=True)
class Panel:
    """A plot of a few quantities over the steps; the first is drawn solid, the next dashed, the third dotted."""

    title: str
    series: tuple[tuple[str, str], ...]  # (key of the rows, its name in the legend)
    percent: bool = False
    log: bool = False
    noisy: bool = True
    last_values: bool = False
    otherwise: Panel | None = None  # drawn in its place where there are no figures for it
    alone: str = ""  # what the first quantity is called where there are no figures of the others


PANELS = (
    Panel(
        "Validation accuracy",
        (("student_validation_accuracy", "student"), ("teacher_validation_accuracy", "teacher")),
        percent=True,
        noisy=False,
        last_values=True,
        alone="network",
    ),
    Panel("Losses", (("inner_loss", "inner (student)"), ("outer_loss", "outer (labeled)"))),
    Panel(
        "Losses of the network",
        (
            ("loss_cross_entropy", "labeled"),
            ("loss_uda", "unlabeled (strong view, own label)"),
            ("loss_noisy_student", "with pseudo-labels"),
        ),
    ),
    Panel(
        "Feedback to the teacher",
        (("feedback_ratio", "its gradient ÷ that of the teacher's own losses"),),
        log=True,
        otherwise=Panel("Feedback to the teacher", (("feedback_std", "standard deviation of h"),), log=True),
    ),
    Panel(
        "Pseudo-labels",
        (("pseudo_label_accuracy", "accuracy"), ("pseudo_label_confidence", "confidence"), ("agreement", "agreement")),
        percent=True,
    ),
)


def _points(panel: Panel, rows: Rows, key: str) -> list[tuple[float, float]]:
    """Steps and values that can be drawn: a logarithmic scale has no zero."""
    pairs = ((float(row["step"]), float(row[key])) for row in rows if "step" in row and row.get(key) is not None)
    return sorted(pair for pair in pairs if all(map(math.isfinite, pair)) and (pair[1] > 0 or not panel.log))


def has_figures(panel: Panel, curves: Curves) -> bool:
    """Whether there is anything to draw in a panel."""
    return any(_points(panel, rows, key) for rows in curves.values() for key, _ in panel.series)


def draw_panel(axes: Axes, panel: Panel, curves: Curves, along: str, height: float) -> None:
    """Draws the curves of all methods with their scales and a note, so many inches high with these; ``along`` says what
    steps are counted in."""
    ends: list[tuple[float, str]] = []
    pale = len(curves) * len(panel.series) <= 4
    for index, rows in enumerate(curves.values()):
        for rank, (key, _) in enumerate(panel.series):
            if not (points := _points(panel, rows, key)):
                continue
            steps, values = np.array(points).T
            color = PALETTE[index if len(curves) > 1 else rank]
            window = len(values) // 40 if panel.noisy else 0
            if window > 1 and pale:
                axes.plot(steps, values, color=color, alpha=0.16, linewidth=0.8, zorder=1)
            axes.plot(
                steps,
                _running_mean(values, window),
                color=color,
                linestyle=DASHES[rank],
                marker="o" if len(values) == 1 else None,
                markersize=5,
                zorder=3,
            )
            if panel.last_values and (rank == 0 or len(curves) == 1):
                ends.append((values[-1], color))
    _dress(axes, panel, along)
    _draw_note(axes, panel, curves)
    _label_ends(axes, sorted(ends), line=0.2 / (height - 1.3))


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean over `window` values about each, over fewer towards the ends.

    >>> _running_mean(np.array([0.0, 3.0, 6.0, 9.0]), 3).tolist()
    [1.5, 3.0, 6.0, 7.5]
    """
    span = np.ones(2 * (window // 2) + 1)
    means: NDArray[np.float64] = np.convolve(values, span, "same") / np.convolve(np.ones(len(values)), span, "same")
    return means


def _dress(axes: Axes, panel: Panel, along: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    axes.grid()
    write_heading(axes, panel.title)
    axes.set_xlabel(along, loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02, y=0.08)
    low, high = axes.get_ylim()
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # What hardly changes would leave a scale without a tick, or none at all.
        middle, half = math.sqrt(low * high), max(math.sqrt(high / low), 2.0)
        axes.set_ylim(middle / half, middle * half)
        # Within less than two decades, powers of ten alone would leave a scale of one tick or none.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if half > 10 else (1.0, 2.0, 5.0), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif panel.percent:
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    else:
        axes.set_ylim(bottom=min(0.0, low))
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _draw_note(axes: Axes, panel: Panel, curves: Curves) -> None:
    """The line between title and panel, where no curve can run through it: what each dash means, or what is drawn."""
    from matplotlib.lines import Line2D

    if len(panel.series) == 1:
        ((key, name),) = panel.series
        # A logarithmic scale has no zero, so the methods whose values are all zero are named instead.
        zero = [method for method, rows in curves.items() if _all_zero(rows, key)] if panel.log else []
        named = ", ".join(zero) if len(zero) < 3 else f"{len(zero)} methods"
        write_note(axes, f"{name}; {named}: 0" if zero else name)
        return
    present = [
        (rank, name)
        for rank, (key, name) in enumerate(panel.series)
        if any(_points(panel, rows, key) for rows in curves.values())
    ]
    if panel.alone and present == [(0, panel.series[0][1])]:
        present = [(0, panel.alone)]
    handles = [
        Line2D([], [], color=PALETTE[rank] if len(curves) == 1 else QUIET, linestyle=DASHES[rank], label=name)
        for rank, name in present
    ]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.008, 1.015), "borderpad": 0.2}
    look: dict[str, Any] = {"fontsize": NOTE_SIZE, "labelcolor": QUIET, "handlelength": 1.9, "columnspacing": 1.2}
    legend = axes.legend(handles=handles, ncols=len(handles), handletextpad=0.5, borderaxespad=0, **place, **look)
    legend.set_in_layout(False)  # as notes


def _all_zero(rows: Rows, key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and max(values) <= 0


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str]], line: float) -> None:
    """The last values beside their curves, moved up where they would touch, and all down from beyond the panel.

    Args:
        axes: the panel.
        ends: values and their colors, sorted.
        line: its height, as a share of the panel's.
    """
    low, high = axes.get_ylim()
    places: list[float] = []
    for value, _ in ends:
        wanted = (value - low) / (high - low)
        places.append(max(wanted, places[-1] + line) if places else wanted)
    beyond = max(0.0, places[-1] - 1) if places else 0.0
    look: dict[str, Any] = {"fontsize": NOTE_SIZE, "fontweight": "bold", "va": "center"}
    for place, (value, color) in zip(places, ends, strict=True):
        axes.text(1.015, place - beyond, f"{100 * value:.1f} %", transform=axes.transAxes, color=color, **look)
